"""Bits in bytes: codes of any width laid one behind the other, and numbers of any size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lightning_compress.errors import ArchiveError

LONGEST_CODE = 15
"""Bits that no code exceeds: a nibble tells its length, and one look into a table of 32,768 entries decodes it."""

_BLOCK = 2**16
"""Codes that are packed at a time: as many as fit into the processor's cache."""

Codes = npt.NDArray[np.uint32]
Lengths = npt.NDArray[np.uint8]


def pack_codes(codes: Codes, lengths: Lengths) -> bytes:
    """Lay codes one behind the other, highest bit first.

    Args:
        codes: The codes, each below ``2 ** length``, shape ``(N,)``.
        lengths: Bits of each, 0 to 32.

    Returns:
        As many bytes as it takes; the last is filled up with zeros.

    Example:
        >>> pack_codes(np.array([0b101, 0b1, 0b11110], np.uint32), np.array([3, 1, 5], np.uint8)).hex()
        'bf00'
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    n_bits = int(ends[-1]) if len(ends) else 0
    packed = np.zeros(n_bits // 32 + 2, np.uint32)
    for first in range(0, len(codes), _BLOCK):
        block = slice(first, first + _BLOCK)
        starts = ends[block] - lengths[block]
        # A code lies in one word of 32 bits or reaches into the next one.
        shifted = codes[block].astype(np.uint64) << (64 - (starts & 31) - lengths[block]).astype(np.uint64)
        first_word = int(starts[0]) >> 5
        words = (starts >> 5) - first_word
        n_words = int(words[-1]) + 2
        # Bits of different codes never meet, so sums of floats, exact up to 2^53, put them together.
        found = np.bincount(words, (shifted >> np.uint64(32)).astype(np.float64), n_words)
        found[1:] += np.bincount(words, (shifted & np.uint64(0xFFFFFFFF)).astype(np.float64), n_words)[:-1]
        both = slice(first_word, first_word + n_words)
        packed[both] = packed[both] | found.astype(np.uint64).astype(np.uint32)
    return packed.astype(">u4").tobytes()[: (n_bits + 7) // 8]


def windows(data: bytes) -> npt.NDArray[np.uint32]:
    """Return, for every byte of ``data``, the 32 bits that begin there; zeros follow the end.

    Example:
        >>> [hex(window) for window in windows(bytes([1, 2, 3]))]
        ['0x1020300', '0x2030000', '0x3000000', '0x0']
    """
    padded = np.frombuffer(data + bytes(4), np.uint8).astype(np.uint32)
    found: npt.NDArray[np.uint32] = padded[3:].copy()
    for byte, shift in ((padded[:-3], 24), (padded[1:-2], 16), (padded[2:-1], 8)):
        found |= byte << np.uint32(shift)
    return found


def unpack_fixed(data: bytes, width: int, n: int) -> npt.NDArray[np.uint32]:
    """Return ``n`` codes of ``width`` bits each, 1 to 16.

    Raises:
        ArchiveError: If ``data`` has not as many bytes as they take.

    Example:
        >>> unpack_fixed(bytes([0b10111100]), 3, 2).tolist()
        [5, 7]
    """
    if len(data) != (n * width + 7) // 8:
        raise ArchiveError(f"{n} codes of {width} bits take {(n * width + 7) // 8} bytes, got {len(data)}.")
    starts = np.arange(n, dtype=np.int64) * width
    found = windows(data)[starts >> 3] >> (32 - width - (starts & 7)).astype(np.uint32)
    codes: npt.NDArray[np.uint32] = found & np.uint32(2**width - 1)
    return codes


def varint(number: int) -> bytes:
    """Return a number in as many bytes as it needs, 7 bits in each, lowest first (LEB128).

    Example:
        >>> varint(5).hex(), varint(300).hex()
        ('05', 'ac02')
    """
    found = bytearray()
    while number >= 0x80:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)


@dataclass
class Reader:
    """Reads one thing after the other, and never past the end.

    Args:
        data: The bytes.
        position: Where to begin.

    Example:
        >>> reader = Reader(varint(300) + b"abc")
        >>> reader.varint(), reader.take(2), reader.n_left
        (300, b'ab', 1)
    """

    data: bytes
    position: int = 0

    @property
    def n_left(self) -> int:
        """Bytes that are left."""
        return len(self.data) - self.position

    def take(self, n: int) -> bytes:
        """Return the next ``n`` bytes."""
        if n > self.n_left:
            raise ArchiveError(f"{n} bytes are announced, and {self.n_left} are left.")
        self.position += n
        return self.data[self.position - n : self.position]

    def byte(self) -> int:
        """Return the next byte."""
        return self.take(1)[0]

    def varint(self) -> int:
        """Return the next number, below 2^63."""
        number = 0
        for shift in range(0, 63, 7):
            byte = self.byte()
            number |= (byte & 0x7F) << shift
            if byte < 0x80:
                return number
        raise ArchiveError("A number has more than 63 bits.")
