"""Archives: the weights of a network in one small file that can be read back, whoever wrote it.

The file: eight bytes that tell what it is, the version, then the length of the header, the header and its checksum;
then every tensor and its checksum. The header holds names, dtypes, shapes and sizes, so that all is known before
anything is decoded. Numbers are LEB128, all else is little-endian. Nothing that is read is ever run.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_compress.errors import ArchiveError
from lightning_compress.storage.bits import Reader, varint
from lightning_compress.storage.coding import Coder, check_coders
from lightning_compress.storage.size import ArchiveSize
from lightning_compress.storage.tensors import (
    DTYPES,
    FrequencyWeight,
    IntegerWeight,
    as_words,
    check_storable,
    decode_tensor,
    encode_tensor,
)
from lightning_compress.unfinished import written_whole

MAGIC = b"\x93LCW\r\n\x1a\n"
"""How every archive begins: no text, and changed by whatever changes line ends."""

VERSION = 1

_ALIAS = len(DTYPES)
"""In the place of a dtype: the tensor is another one, whose number follows."""

LARGEST = 2**32
"""Bytes that the tensors of an archive may take in memory, where nothing else is said."""

_LARGEST_HEADER = 64 * 2**20


class _Entry(NamedTuple):
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    n_bytes: int
    alias_of: int | None = None


def write_archive(
    tensors: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    coders: Sequence[Coder] = ("fixed", "huffman"),
    integers: Mapping[str, IntegerWeight | FrequencyWeight] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> ArchiveSize:
    """Write tensors into an archive, each in the form that takes the fewest bytes.

    Args:
        tensors: The tensors by name; one under several names is kept once.
        path: The file, which is there in whole or not at all; its folder is made where missing.
        coders: What to try for indices and gaps; ``"ans"`` needs the extra ``ans``, to read it too.
        integers: What quantized weights are made of, by their name.
        metadata: Text to keep beside them.

    Returns:
        What each tensor takes, stage by stage.

    Raises:
        ValueError: If a tensor has a dtype that cannot be kept, or a coder is unknown.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> weight = torch.tensor([[0.5, 0.0], [-0.5, 0.5]])
        >>> with TemporaryDirectory() as folder:
        ...     size = write_archive({"weight": weight}, f"{folder}/model.lcz", metadata={"trained": "on digits"})
        ...     with ArchiveReader(f"{folder}/model.lcz") as archive:
        ...         archive.metadata, dict(archive)["weight"].tolist()
        ({'trained': 'on digits'}, [[0.5, 0.0], [-0.5, 0.5]])
    """
    check_coders(coders)
    check_storable(tensors)
    entries, payloads, sizes = [], [], []
    first_of: dict[tuple[object, ...], int] = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        place = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()))
        first = first_of.setdefault(place, number) if tensor.numel() else number
        if first != number:
            entries.append(_Entry(name, tensor.dtype, tuple(tensor.shape), 0, first))
            continue
        payload, size = encode_tensor(name, tensor, coders, (integers or {}).get(name))
        entries.append(_Entry(name, tensor.dtype, tuple(tensor.shape), len(payload)))
        payloads.append(payload)
        sizes.append(size)
    header = _header(entries, metadata or {})
    if len(header) > _LARGEST_HEADER:
        raise ValueError(f"Names and `metadata` take {len(header)} bytes, more than {_LARGEST_HEADER}.")
    head = MAGIC + struct.pack("<H", VERSION) + varint(len(header)) + header
    with written_whole(path) as temporary:
        with temporary.open("wb") as file:
            file.write(head + _checksum(head))
            for payload in payloads:
                file.write(payload + _checksum(payload))
        with ArchiveReader(temporary, 2**62) as archive:  # before it takes the place of an earlier one
            for name, tensor in archive:
                if not np.array_equal(as_words(name, tensor), as_words(name, tensors[name])):
                    raise ArchiveError(f"{os.fspath(path)} would not give back `{name}` as it is: nothing was written.")
    return ArchiveSize(tuple(sizes), Path(path).stat().st_size)


class ArchiveReader:
    """An archive that is read tensor by tensor; iterating gives ``(name, tensor)`` in the order they were written.

    Args:
        path: The file.
        largest: Bytes that all tensors together may take in memory; decoding takes some times as much for each.

    Attributes:
        metadata: The text that was kept beside the tensors.
        shapes: Shape of every tensor.
        dtypes: Dtype of every tensor.

    Raises:
        ArchiveError: If the file is no archive, is damaged or cut off, was written by a newer version, or unpacks to
            more than ``largest``.
        FileNotFoundError: If there is no file.
    """

    def __init__(self, path: str | os.PathLike[str], largest: int = LARGEST) -> None:
        self._path = Path(path)
        self._file: BinaryIO = self._path.open("rb")
        try:
            self._entries, self.metadata = self._read_header(largest)
        except BaseException:
            self._file.close()
            raise
        self.shapes = {entry.name: entry.shape for entry in self._entries}
        self.dtypes = {entry.name: entry.dtype for entry in self._entries}

    def __enter__(self) -> ArchiveReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self._file.seek(self._begin)
        aliased = {entry.alias_of for entry in self._entries}
        kept: dict[int, Tensor] = {}
        for number, entry in enumerate(self._entries):
            if entry.alias_of is not None:
                yield entry.name, kept[entry.alias_of]
                continue
            payload = self._file.read(entry.n_bytes)
            if self._file.read(4) != _checksum(payload):
                raise ArchiveError(f"{self._path} is damaged: the checksum of `{entry.name}` does not fit.")
            try:
                tensor = decode_tensor(payload, entry.dtype, entry.shape)
            except ArchiveError as error:
                raise ArchiveError(f"{self._path} is damaged in `{entry.name}`: {error}") from error
            if number in aliased:
                kept[number] = tensor
            yield entry.name, tensor

    def _read_header(self, largest: int) -> tuple[list[_Entry], dict[str, str]]:
        n_file = os.fstat(self._file.fileno()).st_size
        start = self._file.read(len(MAGIC) + 2)
        if start[: len(MAGIC)] != MAGIC:
            raise ArchiveError(f"{self._path} is no archive of `save_compressed`: it begins with {start[:8]!r}.")
        if len(start) < len(MAGIC) + 2:
            raise self._cut_off()
        (version,) = struct.unpack("<H", start[len(MAGIC) :])
        if version > VERSION:
            raise ArchiveError(
                f"{self._path} has version {version}, and this package reads up to {VERSION}: install a newer "
                "lightning_compress."
            )
        length, n_digits = 0, 0
        digits = self._file.read(9)
        reader = Reader(digits)
        try:
            length, n_digits = reader.varint(), reader.position
        except ArchiveError as error:
            raise self._cut_off() from error
        self._begin = len(start) + n_digits + length + 4
        if length > _LARGEST_HEADER or self._begin > n_file:
            raise self._cut_off()
        self._file.seek(len(start) + n_digits)
        header = self._file.read(length)
        if self._file.read(4) != _checksum(start + digits[:n_digits] + header):
            raise ArchiveError(f"{self._path} is damaged: the checksum of its header does not fit.")
        try:
            entries, metadata = _read_entries(Reader(header))
        except (ArchiveError, ValueError, RecursionError) as error:
            raise ArchiveError(f"{self._path} is damaged: its header cannot be read: {error}") from error
        expected = self._begin + sum(entry.n_bytes + 4 for entry in entries if entry.alias_of is None)
        if n_file != expected:
            raise self._cut_off(f" It has {n_file} bytes instead of {expected}.")
        unpacked = sum(math.prod(entry.shape) * entry.dtype.itemsize for entry in entries)
        if unpacked > largest:
            raise ArchiveError(
                f"{self._path} unpacks to {unpacked} bytes, more than {largest}. Where you trust it, read it with "
                f"`largest={unpacked}`."
            )
        return entries, metadata

    def _cut_off(self, more: str = "") -> ArchiveError:
        return ArchiveError(f"{self._path} is cut off or something follows it.{more}")


def _checksum(data: bytes) -> bytes:
    return struct.pack("<I", zlib.crc32(data))


def _header(entries: Sequence[_Entry], metadata: Mapping[str, str]) -> bytes:
    found = [varint(len(entries))]
    for entry in entries:
        name = entry.name.encode()
        found += [varint(len(name)), name]
        if entry.alias_of is not None:
            found += [bytes([_ALIAS]), varint(entry.alias_of)]
            continue
        found += [bytes([DTYPES.index(entry.dtype)]), varint(len(entry.shape)), *map(varint, entry.shape)]
        found.append(varint(entry.n_bytes))
    text = json.dumps(dict(metadata), ensure_ascii=False).encode() if metadata else b""
    return b"".join([*found, varint(len(text)), text])


def _read_entries(reader: Reader) -> tuple[list[_Entry], dict[str, str]]:
    entries: list[_Entry] = []
    n = reader.varint()
    for _ in range(n):
        name = reader.take(reader.varint()).decode()
        kind = reader.byte()
        if kind == _ALIAS:
            first = reader.varint()
            if first >= len(entries) or entries[first].alias_of is not None:
                raise ArchiveError(f"`{name}` is the same as a tensor that there is not.")
            entries.append(_Entry(name, entries[first].dtype, entries[first].shape, 0, first))
            continue
        if kind >= len(DTYPES):
            raise ArchiveError(f"`{name}` has an unknown dtype, number {kind}.")
        shape = tuple(reader.varint() for _ in range(min(reader.varint(), 64)))
        entries.append(_Entry(name, DTYPES[kind], shape, reader.varint()))
    if len({entry.name for entry in entries}) < n:
        raise ArchiveError("Two tensors have one name.")
    text = reader.take(reader.varint())
    metadata = json.loads(text) if text else {}
    if reader.n_left or not isinstance(metadata, dict):
        raise ArchiveError("Something follows its end.")
    return entries, {str(key): str(value) for key, value in metadata.items()}
