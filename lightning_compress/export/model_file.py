"""ONNX files written whole: checked under a temporary name, then renamed; weights beside them where they are many."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import onnx

from lightning_compress.errors import ExportError
from lightning_compress.unfinished import unfinished_folder

MAX_BYTES = 2**31 - 2**20
"""A protobuf message holds at most 2 GiB; the rest is room for the graph."""


def write_model(proto: onnx.ModelProto, path: Path, max_bytes: int = MAX_BYTES) -> None:
    """Write ``proto`` to ``path``: no half or invalid file ever stands there.

    Args:
        proto: The model; where its weights move to a second file, it is changed.
        path: Where to write; missing folders are made.
        max_bytes: Of more than this, weights go to a second file ``NAME.DIGEST.data`` in the same folder, which must
            travel with the first. Its name is that of its content, so a model never reads the weights of another.

    Raises:
        ExportError: If the model is not valid ONNX.

    Example:
        >>> model = onnx.parser.parse_model(
        ...     '<ir_version: 8, opset_import: ["": 17]> g (float[N] x) => (float[N] y) { y = Relu(x) }'
        ... )
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_model(model, Path(folder) / "relu.onnx")
        ...     os.listdir(folder)
        ['relu.onnx']
    """
    is_large = sum(len(tensor.raw_data) for tensor in proto.graph.initializer) > max_bytes
    data_name = f"{path.name}.{_digest(proto)}.data" if is_large else ""
    with unfinished_folder(path) as folder:
        written = folder / path.name
        try:
            # In a folder of its own the second file can have its final name, which the first one holds.
            onnx.save(proto, written, save_as_external_data=is_large, location=data_name, size_threshold=1024)
            onnx.checker.check_model(written, full_check=True)
        except onnx.checker.ValidationError as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise ExportError(f"The exported model is not valid ONNX: {reason}.") from error
        move_model(written, path)


def move_model(written: Path, path: Path) -> None:
    """Move a model to ``path``, which holds the old one or the new one with its own weights at every moment.

    Args:
        written: The new model, in another folder of the same disk; weights in a second file lie beside it.
        path: Where to put it. Second files of a model that lay there are removed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     new, old = Path(folder) / "new" / "m.onnx", Path(folder) / "m.onnx"
        ...     new.parent.mkdir()
        ...     for file in (new, new.with_name("m.onnx.0000000b.data"), old, old.with_name("m.onnx.0000000a.data")):
        ...         n_characters = file.write_text("graph or weights")
        ...     move_model(new, old)
        ...     sorted(os.listdir(folder))
        ['m.onnx', 'm.onnx.0000000b.data', 'new']
    """
    data = _data_files(written)
    for file in data:
        os.replace(file, path.with_name(file.name))
    os.replace(written, path)
    for file in _data_files(path):
        if file.name not in {new.name for new in data}:
            file.unlink()


def _data_files(path: Path) -> list[Path]:
    pattern = re.compile(rf"{re.escape(path.name)}\.[0-9a-f]{{8}}\.data")
    return [file for file in path.parent.iterdir() if pattern.fullmatch(file.name)]


def _digest(proto: onnx.ModelProto) -> str:
    found = hashlib.sha256()
    for tensor in proto.graph.initializer:
        found.update(f"{tensor.name} {tensor.data_type} {list(tensor.dims)}".encode())
        found.update(tensor.raw_data)
    return found.hexdigest()[:8]
