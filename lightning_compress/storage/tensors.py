"""Coded tensors: which entries are zero, which values the others have, and how both are written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_compress.errors import ArchiveError
from lightning_compress.quantization.affine import integer_weight
from lightning_compress.quantization.coefficients import decoded_weight
from lightning_compress.quantization.dct import LARGEST_BLOCK, LARGEST_KERNEL
from lightning_compress.storage.bits import Reader, varint
from lightning_compress.storage.coding import (
    LARGEST_ALPHABET,
    Coder,
    decode_stream,
    encode_stream,
    entropy_bits,
)
from lightning_compress.storage.huffman import Symbols

DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
)
"""What can be kept; a file holds the position in this list."""

Words = npt.NDArray[np.unsignedinteger]
"""The bits of a tensor's entries as unsigned integers of the same size."""

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_SIGNED = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SPARSE, _DENSE = 1, 0
_RAW, _SHARED, _INTEGERS, _FREQUENCIES = "raw", "shared", "integers", "frequencies"
_KINDS = (_RAW, _SHARED, _INTEGERS, _FREQUENCIES)
_MANY = 32
"""Different values from which on each output channel may be better off with a table of its own."""

_SAMPLE = 2**18
"""Entries that are looked at to choose how gaps are written."""


@dataclass(frozen=True)
class IntegerWeight:
    """What a quantized weight is: integers, and a scale for every channel.

    Args:
        integers: Int8, in the shape of the weight.
        scales: Float32, shape ``(channels,)``.
        axis: Dimension of the channels.
    """

    integers: Tensor
    scales: Tensor
    axis: int = 0

    def values(self) -> Tensor:
        """Return the weight in float32."""
        shape = [-1 if dim == self.axis else 1 for dim in range(self.integers.dim())]
        return self.integers.float() * self.scales.float().view(shape)


@dataclass(frozen=True)
class FrequencyWeight:
    """What a weight is that was quantized in its frequencies: integer coefficients, and how they decode.

    Args:
        coefficients: Int8, shape ``(channels, blocks, frequencies)``.
        steps: Of every channel, float32, shape ``(channels,)``.
        ratios: Of every frequency, float32, shape ``(frequencies,)``.
        weight: The integers that compute.
        block: Inputs of a block where the kernel has one position, or None.
        bits: Bits of the integers that compute.
        is_whole: Whether the coefficients alone decode to it; else there are zeros to be put in.
    """

    coefficients: Tensor
    steps: Tensor
    ratios: Tensor
    weight: IntegerWeight
    block: int | None
    bits: int
    is_whole: bool

    def values(self) -> Tensor:
        """Return the weight in float32."""
        return self.weight.values()


@dataclass(frozen=True)
class TensorSize:
    """What a tensor takes in an archive, stage by stage.

    Attributes:
        name: Its name in the state dict.
        shape: Its shape.
        n_nonzero: Entries that are not zero.
        n_values: Different values among those that are written, or None where each is written as it is.
        form: How it is written.
        dense_bits: Bits of all entries as they are.
        pruned_bits: Bits of the entries that are not zero and of fixed-width gaps between them; or as ``dense_bits``.
        shared_bits: The same with fixed-width indices and the table that they point to.
        bound_bits: Zero-order entropy of gaps and indices, and the table.
        coded_bits: What it takes in the file.
    """

    name: str
    shape: tuple[int, ...]
    n_nonzero: int
    n_values: int | None
    form: str
    dense_bits: int
    pruned_bits: int
    shared_bits: int
    bound_bits: float
    coded_bits: int


@dataclass(frozen=True)
class _Values:
    """One way to write the entries that are not left out: a table, and streams of symbols that point into it."""

    kind: str
    table: bytes
    streams: tuple[tuple[Symbols, int], ...] = ()  # with the size of its alphabet each

    def bits(self, can_split_bits: bool) -> float:
        """Return what it will take, about."""
        least = 0.0 if can_split_bits else 1.0
        return 8.0 * len(self.table) + sum(max(entropy_bits(one), least * len(one)) for one, _ in self.streams)

    @property
    def fixed_bits(self) -> int:
        return 8 * len(self.table) + sum(len(one) * max((size - 1).bit_length(), 1) for one, size in self.streams)

    @property
    def bound_bits(self) -> float:
        return 8.0 * len(self.table) + sum(entropy_bits(one) for one, _ in self.streams)

    @property
    def n_values(self) -> int | None:
        return max((len(np.unique(one)) for one, _ in self.streams), default=None) if self.streams else None


def encode_tensor(
    name: str,
    tensor: Tensor,
    coders: Sequence[Coder],
    integers: IntegerWeight | FrequencyWeight | None = None,
) -> tuple[bytes, TensorSize]:
    """Return a tensor in the form that takes the fewest bytes, and what it takes.

    Every value comes back as it was, but for the sign of zeros, which is dropped.

    Args:
        name: Its name, for the messages.
        tensor: The tensor, of one of `DTYPES`.
        coders: Coders to try.
        integers: What it is made of where it is a quantized weight; it is used where it makes the very values.

    Raises:
        ValueError: If the dtype cannot be kept.

    Example:
        >>> payload, size = encode_tensor("w", torch.tensor([0.0, 0.0, 0.5, -0.5, 0.0, 0.5]), ["huffman"])
        >>> decode_tensor(payload, torch.float32, (6,)).tolist()
        [0.0, 0.0, 0.5, -0.5, 0.0, 0.5]
        >>> size.n_nonzero, size.n_values
        (3, 2)
    """
    words = as_words(name, tensor)
    kept = np.flatnonzero(words)
    can_split_bits = "ans" in coders
    forms: list[tuple[float, int, _Values]] = []
    gaps, gap_bits = _best_gaps(kept, len(words), can_split_bits) if len(words) else (np.empty(0, np.uint16), 1)
    gap_cost = max(entropy_bits(gaps), 0.0 if can_split_bits else float(len(gaps)))
    for form, among in ((_DENSE, words), (_SPARSE, words[kept])):
        for values in _ways_to_write(among, tensor.shape, None if form == _DENSE else kept):
            forms.append((values.bits(can_split_bits) + (gap_cost if form == _SPARSE else 0.0), form, values))
    if integers is not None and tensor.dtype == torch.float32 and torch.equal(integers.values(), tensor.detach().cpu()):
        for form in (_DENSE, _SPARSE):
            if isinstance(integers, IntegerWeight):
                values = _as_integers(integers, None if form == _DENSE else kept)
            elif form == _SPARSE or integers.is_whole:
                values = _as_frequencies(integers)
            else:
                continue
            forms.append((values.bits(can_split_bits) + (gap_cost if form == _SPARSE else 0.0), form, values))
    _, form, values = min(forms, key=lambda found: found[0])
    parts = [bytes([form | _KINDS.index(values.kind) << 1])]
    if form == _SPARSE:
        parts += [bytes([gap_bits]), encode_stream(gaps, 1 << gap_bits, coders)]
    parts.append(values.table)
    parts += [encode_stream(symbols, n_alphabet, coders) for symbols, n_alphabet in values.streams]
    payload = b"".join(parts)
    is_sparse = form == _SPARSE
    fixed_gaps = len(gaps) * gap_bits if is_sparse else 0
    n_written = len(kept) if is_sparse else len(words)
    size = TensorSize(
        name=name,
        shape=tuple(tensor.shape),
        n_nonzero=len(kept),
        n_values=values.n_values,
        form=("sparse " if is_sparse else "") + values.kind,
        dense_bits=8 * words.nbytes,
        pruned_bits=fixed_gaps + 8 * n_written * words.itemsize,
        shared_bits=fixed_gaps + values.fixed_bits,
        bound_bits=(entropy_bits(gaps) if is_sparse else 0.0) + values.bound_bits,
        coded_bits=8 * len(payload),
    )
    return payload, size


def decode_tensor(payload: bytes, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """Return the tensor that `encode_tensor` was given.

    Args:
        payload: What it returned.
        dtype: The tensor's dtype.
        shape: The tensor's shape.

    Raises:
        ArchiveError: If ``payload`` is not that of such a tensor.
    """
    reader = Reader(payload)
    n = math.prod(shape)
    flags = reader.byte()
    if flags >> 1 >= len(_KINDS):
        raise ArchiveError(f"A tensor is written in an unknown form, number {flags}.")
    kept = _read_gaps(reader, n) if flags & 1 else None
    n_written = n if kept is None else len(kept)
    kind, unsigned = _KINDS[flags >> 1], _UNSIGNED[dtype.itemsize]
    if kind == _RAW:
        written = np.frombuffer(reader.take(n_written * dtype.itemsize), f"<u{dtype.itemsize}").astype(unsigned)
    elif kind == _SHARED:
        written = _read_shared(reader, n, n_written, shape, kept, unsigned)
    elif kind == _INTEGERS:
        written = _read_integers(reader, n, n_written, shape, kept, dtype)
    else:
        written = _read_frequencies(reader, shape, kept, dtype)
    if reader.n_left:
        raise ArchiveError(f"{reader.n_left} bytes follow a tensor that has ended.")
    if kept is not None:
        words = np.zeros(n, unsigned)
        words[kept] = written
        written = words
    found = torch.from_numpy(written.view(_SIGNED_NUMPY[dtype.itemsize]).copy())
    if dtype == torch.bool:
        return found.bool().reshape(tuple(shape))
    return found.view(dtype).reshape(tuple(shape))


_SIGNED_NUMPY = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}


def check_storable(tensors: Mapping[str, object]) -> None:
    """Check that an archive can hold all of ``tensors``.

    Raises:
        ValueError: If one is no tensor, or has another dtype or layout.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"`{name}` is no tensor but {type(tensor).__name__}, which an archive cannot hold.")
        if tensor.dtype not in DTYPES or tensor.layout != torch.strided:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise ValueError(
                f"`{name}` is a {tensor.layout} tensor of {tensor.dtype}; an archive holds strided {known}."
            )


def as_words(name: str, tensor: Tensor) -> Words:
    """Return the bits of a tensor's entries, in order, with all zeros positive."""
    check_storable({name: tensor})
    flat = tensor.detach().cpu().reshape(-1)
    flat = flat.to(torch.uint8) if flat.dtype == torch.bool else flat.contiguous().view(_SIGNED[flat.element_size()])
    words: Words = flat.numpy().view(_UNSIGNED[flat.element_size()])
    if tensor.is_floating_point():
        return np.where(words == 1 << (8 * words.itemsize - 1), words.dtype.type(0), words)
    return words


def _ways_to_write(words: Words, shape: Sequence[int], kept: npt.NDArray[np.int64] | None) -> list[_Values]:
    raw = words.astype(words.dtype.newbyteorder("<")).tobytes()
    ways = [_Values(_RAW, raw)]
    table = _few_values(words)
    if table is not None:
        symbols = np.searchsorted(table, words).astype(np.uint16)
        ways.append(_Values(_SHARED, _table([table], len(table)), ((symbols, len(table)),)))
    if len(shape) > 1 and len(words) and (table is None or len(table) > _MANY):
        ways += _shared_by_rows(words, shape, kept)
    return ways


def _few_values(words: Words) -> Words | None:
    """Return the different values, in order, where there are few."""
    if not len(words) or len(np.unique(words[: 2 * LARGEST_ALPHABET])) > LARGEST_ALPHABET:
        return None
    step = max(len(words) // _SAMPLE, 1)
    found = np.unique(words[::step])
    if len(found) > LARGEST_ALPHABET:
        return None
    if step > 1:  # the rest holds few others
        near = found[np.minimum(np.searchsorted(found, words), len(found) - 1)]
        others = np.unique(words[near != words])
        found = np.union1d(found, others)
    return found if len(found) <= LARGEST_ALPHABET else None


def _shared_by_rows(words: Words, shape: Sequence[int], kept: npt.NDArray[np.int64] | None) -> list[_Values]:
    """Return the way with a table for each output channel, where each has few values."""
    rows = _rows(shape, kept, len(words))
    starts = np.searchsorted(rows, np.arange(shape[0] + 1))
    tables, symbols = [], np.empty(len(words), np.uint16)
    for first, end in pairwise(starts):
        table = np.unique(words[first:end])
        if len(table) > 256 or 4 * len(table) > 3 * max(end - first, 8):
            return []
        symbols[first:end] = np.searchsorted(table, words[first:end])
        tables.append(table)
    largest = max(map(len, tables))
    return [_Values(_SHARED, _table(tables, largest), ((symbols, largest),))]


def _rows(shape: Sequence[int], kept: npt.NDArray[np.int64] | None, n_written: int) -> npt.NDArray[np.int64]:
    """Return the output channel of every entry that is written."""
    positions = np.arange(n_written) if kept is None else kept
    return positions // max(math.prod(shape[1:]), 1)


def _table(tables: Sequence[Words], width: int) -> bytes:
    whole = np.zeros((len(tables), width), tables[0].dtype)
    for row, table in zip(whole, tables, strict=True):
        row[: len(table)] = table
    return varint(len(tables)) + varint(width) + whole.astype(whole.dtype.newbyteorder("<")).tobytes()


def _read_shared(
    reader: Reader, n: int, n_written: int, shape: Sequence[int], kept: npt.NDArray[np.int64] | None, unsigned: type
) -> Words:
    n_tables, width = reader.varint(), reader.varint()
    if n_tables != 1 and (len(shape) < 2 or n_tables != shape[0]):
        raise ArchiveError(f"A tensor of the shape {tuple(shape)} has {n_tables} tables of values.")
    if not 1 <= width <= LARGEST_ALPHABET:
        raise ArchiveError(f"A table has {width} values, more than {LARGEST_ALPHABET} or none.")
    size = np.dtype(unsigned).itemsize
    table: Words = (
        np.frombuffer(reader.take(n_tables * width * size), f"<u{size}").astype(unsigned).reshape(n_tables, width)
    )
    symbols = _read_symbols(reader, n_written, width)
    rows = 0 if n_tables == 1 else _rows(shape, kept, n_written)
    found: Words = table[rows, symbols]
    return found


def _as_integers(weight: IntegerWeight, kept: npt.NDArray[np.int64] | None) -> _Values:
    flat = weight.integers.reshape(-1).numpy().astype(np.int16)
    written = flat if kept is None else flat[kept]
    least = int(written.min()) if len(written) else 0
    n_alphabet = int(written.max()) - least + 1 if len(written) else 1
    scales = weight.scales.float().numpy().astype("<f4").tobytes()
    table = bytes([weight.axis, least + 128]) + varint(len(weight.scales)) + scales
    return _Values(_INTEGERS, table, (((written - least).astype(np.uint16), n_alphabet),))


def _as_frequencies(weight: FrequencyWeight) -> _Values:
    """Return the coefficients of each frequency as a stream of its own: their ranges differ."""
    columns = weight.coefficients.numpy().astype(np.int16).reshape(-1, weight.coefficients.shape[-1]).T
    streams, least = [], []
    for column in columns:
        low = int(column.min()) if len(column) else 0
        streams.append(((column - low).astype(np.uint16), int(column.max()) - low + 1 if len(column) else 1))
        least.append(low + 128)
    floats = np.concatenate([weight.ratios.float().numpy(), weight.steps.float().numpy()]).astype("<f4")
    header = bytes([weight.weight.axis, weight.bits, weight.block or 0])
    table = header + varint(len(columns)) + varint(len(weight.steps)) + bytes(least) + floats.tobytes()
    return _Values(_FREQUENCIES, table, tuple(streams))


def _read_integers(
    reader: Reader,
    n: int,
    n_written: int,
    shape: Sequence[int],
    kept: npt.NDArray[np.int64] | None,
    dtype: torch.dtype,
) -> Words:
    axis, least, n_scales = reader.byte(), reader.byte() - 128, reader.varint()
    if dtype != torch.float32 or axis >= len(shape) or n_scales != shape[axis]:
        raise ArchiveError(f"{n_scales} scales along dimension {axis} are not those of the shape {tuple(shape)}.")
    scales = np.frombuffer(reader.take(4 * n_scales), "<f4").astype(np.float32)
    integers = _read_symbols(reader, n_written, 256).astype(np.float32) + np.float32(least)
    positions = np.arange(n) if kept is None else kept
    channels = positions // max(math.prod(shape[axis + 1 :]), 1) % shape[axis]
    return (integers * scales[channels] + np.float32(0)).view(np.uint32)


def _read_frequencies(
    reader: Reader, shape: Sequence[int], kept: npt.NDArray[np.int64] | None, dtype: torch.dtype
) -> Words:
    axis, bits, block = reader.byte(), reader.byte(), reader.byte()
    n_frequencies, n_steps = reader.varint(), reader.varint()
    if dtype != torch.float32 or len(shape) < 2 or axis > 1 or not 2 <= bits <= 8 or n_steps != shape[axis]:
        raise ArchiveError(f"{n_steps} steps along dimension {axis} are not those of the shape {tuple(shape)}.")
    if block == 1 or block > LARGEST_BLOCK:
        raise ArchiveError(f"A block has {block} inputs, which are not 2 to {LARGEST_BLOCK}.")
    first = (shape[1], shape[0], *shape[2:]) if axis else tuple(shape)  # output channels first
    n_expected = math.prod(shape[2:])
    n_expected = n_expected if n_expected > 1 else block
    if n_frequencies != n_expected or not 2 <= n_frequencies <= LARGEST_KERNEL or not math.prod(shape):
        raise ArchiveError(f"{n_frequencies} frequencies are not those of the shape {tuple(shape)}.")
    least = np.frombuffer(reader.take(n_frequencies), np.uint8).astype(np.int16) - 128
    floats = np.frombuffer(reader.take(4 * (n_frequencies + n_steps)), "<f4").astype(np.float32)
    if not np.isfinite(floats).all():
        raise ArchiveError("A step of coefficients is NaN or infinite.")
    n_blocks = -(-math.prod(first[1:]) // n_frequencies)
    columns = [_read_symbols(reader, n_steps * n_blocks, 256).astype(np.int16) + low for low in least]
    codes = np.stack(columns, -1).reshape(n_steps, n_blocks, n_frequencies)
    ratios, steps = torch.from_numpy(floats[:n_frequencies]), torch.from_numpy(floats[n_frequencies:])
    decoded = decoded_weight(torch.from_numpy(codes), steps, ratios, first, block or None)
    if kept is not None:  # what was pruned counted for nothing when the weight was rounded
        mask = torch.zeros(math.prod(shape), dtype=torch.bool)
        mask[torch.from_numpy(kept)] = True
        mask = mask.reshape(tuple(shape))
        decoded = decoded * (mask.transpose(0, 1) if axis else mask)
    integers, scales = integer_weight(decoded, bits)
    integers = integers.transpose(0, 1).contiguous() if axis else integers
    words = (IntegerWeight(integers, scales, axis).values() + 0.0).reshape(-1).numpy().view(np.uint32)
    return words if kept is None else words[kept]


def _read_symbols(reader: Reader, n: int, n_alphabet: int) -> Symbols:
    symbols = decode_stream(reader, n)
    if len(symbols) != n or (n and int(symbols.max()) >= n_alphabet):
        raise ArchiveError(f"{n} entries of {n_alphabet} values are announced, and {len(symbols)} follow.")
    return symbols


def _best_gaps(kept: npt.NDArray[np.int64], n: int, can_split_bits: bool) -> tuple[Symbols, int]:
    """Return the gaps between the entries that are not zero, and their bits, that take about the fewest bits."""
    sample = kept[: np.searchsorted(kept, _SAMPLE)] if n > _SAMPLE else kept

    def cost(bits: int) -> float:
        gaps = _gaps(sample, min(n, _SAMPLE), bits)
        return max(entropy_bits(gaps), 0.0 if can_split_bits else float(len(gaps)))

    bits = min(range(1, 9), key=cost)
    return _gaps(kept, n, bits), bits


def _gaps(kept: npt.NDArray[np.int64], n: int, bits: int) -> Symbols:
    """Return the zeros in front of every entry that is not zero; the largest number stands for zeros alone.

    Source: Han, Mao & Dally 2016, figure 2, arXiv:1510.00149: fillers come where a gap is wider than its bits tell.
    """
    widest = 2**bits - 1
    zeros = np.diff(kept, prepend=-1) - 1
    n_fillers = zeros // widest
    n_last = (n - 1 - int(kept[-1]) if len(kept) else n) // widest
    gaps = np.full(len(kept) + int(n_fillers.sum()) + n_last, widest, np.uint16)
    gaps[np.cumsum(n_fillers + 1) - 1] = zeros % widest
    return gaps


def _read_gaps(reader: Reader, n: int) -> npt.NDArray[np.int64]:
    bits = reader.byte()
    if not 1 <= bits <= 8:
        raise ArchiveError(f"Gaps have {bits} bits, which are not 1 to 8.")
    widest = 2**bits - 1
    gaps = decode_stream(reader, n)
    ends = np.cumsum(np.where(gaps == widest, widest, gaps + 1), dtype=np.int64)
    covered = int(ends[-1]) if len(ends) else 0
    if not 0 <= n - covered < widest:
        raise ArchiveError(f"The gaps of a tensor of {n} entries reach over {covered} of them.")
    kept: npt.NDArray[np.int64] = ends[gaps != widest] - 1
    return kept
