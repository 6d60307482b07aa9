"""ONNX files written whole: checked under a temporary name, then renamed; weights beside them where they are many."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import onnx

from lightning_compress.errors import ExportError

MAX_BYTES = 2**31 - 2**20
"""A protobuf message holds at most 2 GiB; the rest is room for the graph."""


def write_model(proto: onnx.ModelProto, path: Path, max_bytes: int = MAX_BYTES) -> None:
    """Write ``proto`` to ``path``: no half or invalid file ever stands there.

    Args:
        proto: The model; where its weights move to a second file, it is changed.
        path: Where to write; missing folders are made.
        max_bytes: Of more than this, weights go to a second file ``NAME.data`` in the same folder, which must travel
            with the first.

    Raises:
        ExportError: If the model is not valid ONNX.

    Example:
        >>> model = onnx.parser.parse_model(
        ...     '<ir_version: 8, opset_import: ["": 17]> g (float[N] x) => (float[N] y) { y = Relu(x) }'
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_model(model, Path(folder) / "relu.onnx")
        ...     os.listdir(folder)
        ['relu.onnx']
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = path.with_name(f"{path.name}.data")
    is_large = sum(len(tensor.raw_data) for tensor in proto.graph.initializer) > max_bytes
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent) as folder:
        written = Path(folder) / path.name
        try:
            # In a folder of its own the second file can have its final name, which the first one holds.
            onnx.save(proto, written, save_as_external_data=is_large, location=data.name, size_threshold=1024)
            onnx.checker.check_model(written, full_check=True)
        except onnx.checker.ValidationError as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise ExportError(f"The exported model is not valid ONNX: {reason}.") from error
        if is_large:
            os.replace(written.with_name(data.name), data)
        os.replace(written, path)
