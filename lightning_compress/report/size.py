"""Sizes of ONNX files: the bytes on disk, and the bytes that are left when the file is zipped."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import onnx
from onnx.external_data_helper import uses_external_data

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class FileSizes:
    """Bytes of an exported file, next to those of the same network in float.

    Args:
        onnx_bytes: Bytes of the file, external data included.
        zipped_bytes: Bytes of the file after deflate at level 9, or None where not measured.
        float_onnx_bytes: Bytes of the float (fp32) file, or None where there is none.
    """

    onnx_bytes: int
    zipped_bytes: int | None = None
    float_onnx_bytes: int | None = None


def file_sizes(path: str | PathLike[str], float_path: str | PathLike[str] | None = None) -> FileSizes:
    """Measure an exported file, and the float file it is compared with.

    Args:
        path: The ONNX file.
        float_path: The ONNX file of the same network in float (fp32).

    Returns:
        The bytes of both, and those of the zipped ``path``.

    Raises:
        FileNotFoundError: If a file, or the external data it names, does not exist.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> source = '<ir_version: 8, opset_import: ["": 17]> g (float[N] x) => (float[N] y) { y = Relu(x) }'
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder) / "relu.onnx"
        ...     onnx.save(onnx.parser.parse_model(source), path)
        ...     sizes = file_sizes(path, float_path=path)
        >>> sizes.onnx_bytes == sizes.float_onnx_bytes
        True
    """
    return FileSizes(
        onnx_bytes=size_bytes(path),
        zipped_bytes=zipped_size_bytes(path),
        float_onnx_bytes=None if float_path is None else size_bytes(float_path),
    )


def size_bytes(path: str | PathLike[str]) -> int:
    """Return the bytes of an ONNX file on disk, its external data files included.

    Args:
        path: The ONNX file.

    Returns:
        Bytes.

    Raises:
        FileNotFoundError: If the file, or the external data it names, does not exist.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> source = '<ir_version: 8, opset_import: ["": 17]> g (float[N] x) => (float[N] y) { y = Relu(x) }'
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder) / "relu.onnx"
        ...     onnx.save(onnx.parser.parse_model(source), path)
        ...     size_bytes(path) == len(path.read_bytes())
        True
    """
    return sum(file.stat().st_size for file in _files(Path(path)))


def zipped_size_bytes(path: str | PathLike[str]) -> int:
    """Return the bytes of an ONNX file after zip's compression (deflate, level 9); nothing is written.

    Zeros, and the few distinct values of low-bit weights, show here and not in :func:`size_bytes`. External data
    files are included; the headers of a zip archive, about 100 bytes per file, are not.

    Args:
        path: The ONNX file.

    Returns:
        Bytes.

    Raises:
        FileNotFoundError: If the file, or the external data it names, does not exist.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> source = '<ir_version: 8, opset_import: ["": 17]> g (float[N] x) => (float[N] y) { y = Relu(x) }'
        >>> model = onnx.parser.parse_model(source)
        >>> model.doc_string = 1000 * "zeros zip well, "
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder) / "relu.onnx"
        ...     onnx.save(model, path)
        ...     size_bytes(path) > 16_000, zipped_size_bytes(path) < 300
        (True, True)
    """
    return sum(_deflated_bytes(file) for file in _files(Path(path)))


def _files(path: Path) -> list[Path]:
    graph = onnx.load(path, load_external_data=False).graph
    locations = {
        entry.value
        for tensor in _tensors(graph)
        if uses_external_data(tensor)
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return [path, *(path.parent / location for location in sorted(locations))]


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        yield from (attribute.t, *attribute.tensors)
        for subgraph in _subgraphs(attribute):
            yield from _tensors(subgraph)


def _subgraphs(attribute: onnx.AttributeProto) -> Iterable[onnx.GraphProto]:
    return [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]


def _deflated_bytes(file: Path) -> int:
    compressor = zlib.compressobj(level=9, wbits=-zlib.MAX_WBITS)  # raw deflate, as inside a zip archive
    with file.open("rb") as stream:
        deflated = sum(len(compressor.compress(chunk)) for chunk in iter(lambda: stream.read(_CHUNK_BYTES), b""))
    return deflated + len(compressor.flush())
