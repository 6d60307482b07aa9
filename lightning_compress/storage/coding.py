"""Coded streams: numbers of a small alphabet in as few bytes as a coder needs for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from lightning_compress.errors import ArchiveError, MissingExtraError
from lightning_compress.storage import huffman
from lightning_compress.storage.bits import Reader, pack_codes, unpack_fixed, varint
from lightning_compress.storage.huffman import Symbols

Coder = Literal["fixed", "huffman", "ans"]
"""Codes of one width, whole-bit codes, or asymmetric numeral systems, which come within a bit of the entropy."""

CODERS: Sequence[Coder] = get_args(Coder)

_BLOCK = 2**20

LARGEST_ALPHABET = 4096
"""Different symbols that a stream may have."""


def check_coders(coders: Sequence[str]) -> None:
    """Check that all of ``coders`` are known and can be used here.

    Raises:
        ValueError: If one is unknown, or there is none.
        MissingExtraError: If the library of one is not installed.

    Example:
        >>> check_coders(["fixed", "huffman"])
    """
    unknown = [coder for coder in coders if coder not in CODERS]
    if unknown or not coders:
        raise ValueError(f"`coders` must be some of {', '.join(CODERS)}, got {list(coders)}.")
    if "ans" in coders:
        _constriction()


def encode_stream(symbols: Symbols, n_alphabet: int, coders: Sequence[Coder]) -> bytes:
    """Return a stream as the coder writes it that needs the fewest bytes.

    Args:
        symbols: Numbers below ``n_alphabet``, shape ``(N,)``.
        n_alphabet: How many different symbols there may be, 1 to `LARGEST_ALPHABET`.
        coders: The coders to try.

    Raises:
        MissingExtraError: If ``"ans"`` is asked for and its library is not installed.

    Example:
        >>> stream = encode_stream(np.array([1, 0, 1, 1], np.uint16), 2, ["huffman"])
        >>> decode_stream(Reader(stream), most=4).tolist()
        [1, 0, 1, 1]
    """
    head = varint(len(symbols)) + varint(n_alphabet)
    if not len(symbols):
        return head
    return head + min((bytes([CODERS.index(c)]) + _ENCODERS[c](symbols, n_alphabet) for c in coders), key=len)


def decode_stream(reader: Reader, most: int) -> Symbols:
    """Return the symbols of the stream that follows.

    Args:
        reader: At its beginning.
        most: How many symbols there may be.

    Raises:
        ArchiveError: If what follows is no stream.
        MissingExtraError: If it was written with a library that is not installed.
    """
    n, n_alphabet = reader.varint(), reader.varint()
    if not 1 <= n_alphabet <= LARGEST_ALPHABET:
        raise ArchiveError(f"A stream has {n_alphabet} symbols, more than {LARGEST_ALPHABET} or none.")
    if n == 0:
        return np.empty(0, np.uint16)
    if n > most:
        raise ArchiveError(f"A stream of {n} symbols is announced where there are at most {most}.")
    coder = reader.byte()
    if coder >= len(CODERS):
        raise ArchiveError(f"A stream was written by an unknown coder, number {coder}.")
    symbols = _DECODERS[CODERS[coder]](reader, n, n_alphabet)
    if int(symbols.max()) >= n_alphabet:
        raise ArchiveError(f"A stream of {n_alphabet} symbols holds symbol {int(symbols.max())}.")
    return symbols


def entropy_bits(symbols: Symbols) -> float:
    """Return the zero-order entropy of a stream, in bits: what no code of single symbols can do without.

    Example:
        >>> entropy_bits(np.array([0, 1, 2, 3], np.uint16)), entropy_bits(np.array([7, 7], np.uint16))
        (8.0, 0.0)
    """
    counts = np.bincount(symbols)
    counts = counts[counts > 0]
    return float((counts * np.log2(counts.sum() / counts)).sum()) if len(counts) > 1 else 0.0


def _width(n_alphabet: int) -> int:
    return max((n_alphabet - 1).bit_length(), 1)


def _encode_fixed(symbols: Symbols, n_alphabet: int) -> bytes:
    return pack_codes(symbols.astype(np.uint32), np.full(len(symbols), _width(n_alphabet), np.uint8))


def _decode_fixed(reader: Reader, n: int, n_alphabet: int) -> Symbols:
    width = _width(n_alphabet)
    return unpack_fixed(reader.take((n * width + 7) // 8), width, n).astype(np.uint16)


def _encode_ans(symbols: Symbols, n_alphabet: int) -> bytes:
    stream, counts = _constriction(), np.bincount(symbols, minlength=n_alphabet)
    coder = stream.stack.AnsCoder()
    coder.encode_reverse(symbols.astype(np.int32), _model(counts))
    words: bytes = coder.get_compressed().astype("<u4").tobytes()
    return b"".join(varint(int(count)) for count in counts) + varint(len(words) // 4) + words


def _decode_ans(reader: Reader, n: int, n_alphabet: int) -> Symbols:
    counts = np.array([reader.varint() for _ in range(n_alphabet)], np.uint64)
    words = np.frombuffer(reader.take(4 * reader.varint()), "<u4").astype(np.uint32)
    if int(sum(map(int, counts))) != n:
        raise ArchiveError(f"The counts of a stream of {n} symbols sum up to {sum(map(int, counts))}.")
    stream = _constriction()
    try:
        coder, model = stream.stack.AnsCoder(words), _model(counts.astype(np.int64))
        symbols = np.empty(n, np.uint16)
        for first in range(0, n, _BLOCK):  # the library takes four times the memory of what it decodes
            symbols[first : first + _BLOCK] = coder.decode(model, min(_BLOCK, n - first))
    except (ValueError, RuntimeError, AssertionError) as error:
        raise ArchiveError(f"A stream of asymmetric numeral systems cannot be read: {error}") from error
    if not coder.is_empty():
        raise ArchiveError("A stream of asymmetric numeral systems is longer than its symbols.")
    return symbols


def _model(counts: npt.NDArray[np.int64]) -> Any:
    chances = np.append(counts, 0) / counts.sum()  # one symbol alone is no distribution to it
    return _constriction().model.Categorical(chances, perfect=False)


def _constriction() -> Any:
    try:
        from constriction import stream  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError as error:
        raise MissingExtraError(
            'The coder "ans" needs constriction, which is not installed. Install it with '
            '`pip install "lightning_compress[ans]"`.'
        ) from error
    return stream


_ENCODERS = {"fixed": _encode_fixed, "huffman": huffman.encode, "ans": _encode_ans}
_DECODERS = {"fixed": _decode_fixed, "huffman": huffman.decode, "ans": _decode_ans}
