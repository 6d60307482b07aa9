"""Huffman codes: the shortest whole-bit code of every symbol, in canonical form (Huffman 1952)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lightning_compress.errors import ArchiveError
from lightning_compress.storage.bits import LONGEST_CODE, Codes, Lengths, Reader, pack_codes, varint, windows

LANE, LONG_LANE = 1024, 4096
"""Symbols that are decoded one after the other; lanes are decoded side by side. Few symbols go into long lanes."""

Symbols = npt.NDArray[np.uint16]


def code_lengths(counts: npt.NDArray[np.int64], longest: int = LONGEST_CODE) -> Lengths:
    """Return the bits of every symbol's code, the least in sum among codes of at most ``longest`` bits.

    Source: package-merge, Larmore & Hirschberg 1990, "A fast algorithm for optimal length-limited Huffman codes".

    Args:
        counts: How often each symbol occurs, shape ``(alphabet,)``.
        longest: Most bits of a code; ``2 ** longest`` must be at least the number of symbols that occur.

    Returns:
        Bits of every symbol: 0 where it does not occur, else at least 1.

    Example:
        >>> code_lengths(np.array([5, 0, 1, 1, 2])).tolist()
        [1, 0, 3, 3, 2]
    """
    lengths = np.zeros(len(counts), np.uint8)
    used = np.flatnonzero(counts)
    if len(used) == 1:
        lengths[used] = 1
    if len(used) < 2:
        return lengths
    # A coin is a symbol at one of its bits: the cheapest coins that are worth n - 1 whole bits are the code.
    coins = sorted((int(counts[symbol]), (int(symbol),)) for symbol in used)
    packages: list[tuple[int, tuple[int, ...]]] = []
    for _ in range(longest):
        merged = sorted([*coins, *packages])
        packages = [
            (first[0] + second[0], first[1] + second[1])
            for first, second in zip(merged[::2], merged[1::2], strict=False)
        ]
    for _, symbols in packages[: len(used) - 1]:
        np.add.at(lengths, list(symbols), 1)
    return lengths


def canonical_codes(lengths: Lengths) -> Codes:
    """Return the codes that go with their lengths: in the order of length, then of symbol.

    Raises:
        ArchiveError: If no code has these lengths.

    Example:
        >>> [f"{code:b}" for code in canonical_codes(np.array([1, 0, 3, 3, 2], np.uint8))]
        ['0', '0', '110', '111', '10']
    """
    codes = np.zeros(len(lengths), np.uint32)
    code = previous = 0
    for symbol in np.lexsort((np.arange(len(lengths)), lengths)):
        length = int(lengths[symbol])
        if length == 0:
            continue
        code <<= length - previous
        if code >= 1 << length:
            raise ArchiveError("The lengths of a Huffman code are those of none.")
        codes[symbol], previous = code, length
        code += 1
    return codes


def encode(symbols: Symbols, n_alphabet: int) -> bytes:
    """Return the lengths of the codes, the bits of the lanes, and the codes of all symbols.

    Args:
        symbols: Numbers below ``n_alphabet``, shape ``(N,)``.
        n_alphabet: How many different symbols there may be, at most 32,768.
    """
    lengths = code_lengths(np.bincount(symbols, minlength=n_alphabet))
    codes = canonical_codes(lengths)
    bits = lengths[symbols]
    lane = _lane(len(symbols))
    lanes = b"".join(varint(int(n)) for n in np.add.reduceat(bits, np.arange(0, len(bits), lane), dtype=np.int64))
    return _nibbles(lengths) + lanes + pack_codes(codes[symbols], bits)


def decode(reader: Reader, n: int, n_alphabet: int) -> Symbols:
    """Return what `encode` was given.

    Args:
        reader: At the beginning of what `encode` returned.
        n: How many symbols there are.
        n_alphabet: As `encode` got it.

    Raises:
        ArchiveError: If that is not what follows.
    """
    lengths = _from_nibbles(reader.take((n_alphabet + 1) // 2), n_alphabet)
    symbol_of, length_of = _table(lengths)
    lane = _lane(n)
    n_lanes = -(-n // lane)
    if n_lanes > reader.n_left:
        raise ArchiveError(f"{n_lanes} lanes are announced, and {reader.n_left} bytes are left.")
    ends = np.cumsum([reader.varint() for _ in range(n_lanes)], dtype=np.int64)
    if (ends < 0).any() or int(ends[-1]) > 8 * reader.n_left:
        raise ArchiveError("The codes of a stream are longer than the file.")
    seen = windows(reader.take((int(ends[-1]) + 7) // 8))
    positions = np.concatenate([[0], ends[:-1]])
    found = np.empty((lane, n_lanes), np.uint16)
    n_last = n - (n_lanes - 1) * lane
    last = int(ends[-1])
    for step in range(lane):
        if step == n_last:  # the last lane is at its end
            if positions[-1] != last:
                raise ArchiveError("A stream of Huffman codes ends in the middle of one.")
            positions, n_lanes = positions[:-1], n_lanes - 1
            if not n_lanes:
                break
        nearby = np.minimum(positions, last)
        codes = seen[nearby >> 3] >> (32 - LONGEST_CODE - (nearby & 7)).astype(np.uint32) & (2**LONGEST_CODE - 1)
        found[step, :n_lanes] = symbol_of[codes]
        positions = positions + length_of[codes]
    if (positions != ends[: len(positions)]).any():
        raise ArchiveError("A stream of Huffman codes ends in the middle of one.")
    return found.T.reshape(-1)[:n].copy()


def _lane(n: int) -> int:
    return LANE if n > 32 * LONG_LANE else LONG_LANE


def _table(lengths: Lengths) -> tuple[Symbols, npt.NDArray[np.int64]]:
    """Return the symbol and the length of the code that the next 15 bits begin with; more than they hold for none."""
    symbol_of = np.zeros(2**LONGEST_CODE, np.uint16)
    length_of = np.full(2**LONGEST_CODE, 2**40, np.int64)
    codes = canonical_codes(lengths)
    for symbol in np.flatnonzero(lengths):
        rest = LONGEST_CODE - int(lengths[symbol])
        first = int(codes[symbol]) << rest
        symbol_of[first : first + (1 << rest)] = symbol
        length_of[first : first + (1 << rest)] = lengths[symbol]
    return symbol_of, length_of


def _nibbles(lengths: Lengths) -> bytes:
    padded = np.append(lengths, np.zeros(len(lengths) % 2, np.uint8))
    return (padded[::2] << 4 | padded[1::2]).astype(np.uint8).tobytes()


def _from_nibbles(data: bytes, n: int) -> Lengths:
    pairs = np.frombuffer(data, np.uint8)
    return np.stack([pairs >> 4, pairs & 15], 1).reshape(-1)[:n]
