"""Coders: what they write is read back, as short as theory allows, and nothing else is taken for it."""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_compress.errors import ArchiveError
from lightning_compress.storage import huffman
from lightning_compress.storage.bits import Reader, pack_codes, unpack_fixed, varint
from lightning_compress.storage.coding import CODERS, Coder, decode_stream, encode_stream, entropy_bits

pytest.importorskip("constriction")


def symbols_of(n: int, n_alphabet: int, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    return rng.choice(n_alphabet, n, p=rng.dirichlet(np.full(n_alphabet, 0.5))).astype(np.uint16)


@given(st.lists(st.tuples(st.integers(0, 32), st.integers(0, 2**32 - 1))))
def test_codes_lie_one_behind_the_other(pairs: list[tuple[int, int]]) -> None:
    codes = [(number % (1 << n), n) for n, number in pairs]
    text = "".join(f"{code:0{n}b}" if n else "" for code, n in codes)
    text += "0" * (-len(text) % 8)
    expected = bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))
    lengths = np.array([n for _, n in codes], np.uint8)
    assert pack_codes(np.array([code for code, _ in codes], np.uint32), lengths) == expected


def test_many_codes_cross_the_blocks_they_are_packed_in() -> None:
    codes = np.random.default_rng(0).integers(0, 2**7, 200_000).astype(np.uint32)
    packed = pack_codes(codes, np.full(len(codes), 7, np.uint8))
    assert np.array_equal(unpack_fixed(packed, 7, len(codes)), codes)


@given(st.integers(0, 2**63 - 1))
def test_numbers_of_any_size_come_back(number: int) -> None:
    reader = Reader(varint(number))
    assert reader.varint() == number
    assert reader.n_left == 0


def test_a_number_without_an_end_is_refused() -> None:
    with pytest.raises(ArchiveError, match="A number has more than 63 bits"):
        Reader(b"\xff" * 20).varint()
    with pytest.raises(ArchiveError, match="1 bytes are announced, and 0 are left"):
        Reader(b"\xff").varint()


def huffman_bits(counts: list[int]) -> int:
    """Bits of all codes together, by Huffman's own algorithm: the sum of all nodes that are made."""
    heap = [count for count in counts if count]
    if len(heap) == 1:
        return heap[0]
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        node = heapq.heappop(heap) + heapq.heappop(heap)
        total += node
        heapq.heappush(heap, node)
    return total


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=40).filter(any))
def test_lengths_are_the_shortest(counts: list[int]) -> None:
    lengths = huffman.code_lengths(np.array(counts))
    assert sum(int(n) * count for n, count in zip(lengths, counts, strict=True)) == huffman_bits(counts)
    assert all((n == 0) == (count == 0) for n, count in zip(lengths, counts, strict=True))


def test_no_code_is_longer_than_the_longest() -> None:
    fibonacci = [1, 1]
    while len(fibonacci) < 24:  # Huffman's own code has 23 bits
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    lengths = huffman.code_lengths(np.array(fibonacci))
    assert int(lengths.max()) == 15
    assert float((0.5 ** lengths.astype(float)).sum()) <= 1.0
    bits = int((lengths * np.array(fibonacci)).sum())
    assert huffman_bits(fibonacci) < bits < 1.001 * huffman_bits(fibonacci)


def test_the_example_of_the_paper_by_hand() -> None:
    # Counts 5, 1, 1, 2: codes 0, 110, 111, 10 in order of symbol.
    symbols = np.array([0, 1, 0, 3, 2, 0, 0, 3, 0], np.uint16)
    written = huffman.encode(symbols, 4)
    bits = "011001011100100"
    assert written == bytes([0x13, 0x32, len(bits), int(bits[:8], 2), int(bits[8:].ljust(8, "0"), 2)])


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(CODERS),
    st.integers(1, 300).flatmap(lambda a: st.tuples(st.just(a), st.lists(st.integers(0, a - 1), max_size=300))),
)
def test_every_coder_gives_back_what_it_got(coder: Coder, stream: tuple[int, list[int]]) -> None:
    n_alphabet, symbols = stream
    reader = Reader(encode_stream(np.array(symbols, np.uint16), n_alphabet, [coder]))
    assert decode_stream(reader, most=len(symbols)).tolist() == symbols
    assert reader.n_left == 0


@pytest.mark.parametrize("n", [4095, 4096, 4097, 131_072, 131_073, 200_001])
@pytest.mark.parametrize("coder", CODERS)
def test_long_streams_in_lanes(coder: Coder, n: int) -> None:
    symbols = symbols_of(n, 64)
    written = encode_stream(symbols, 64, [coder])
    assert np.array_equal(decode_stream(Reader(written), n), symbols)
    bound = entropy_bits(symbols) / 8
    allowed = {"fixed": 0.75 * n + 8, "huffman": 1.02 * bound + 60, "ans": 1.001 * bound + 130}
    assert bound <= len(written) <= allowed[coder]


def test_the_smallest_is_taken() -> None:
    uniform, skewed = np.arange(256, dtype=np.uint16), np.zeros(1000, np.uint16)
    assert encode_stream(uniform, 256, CODERS) == encode_stream(uniform, 256, ["fixed"])
    assert encode_stream(skewed, 4, CODERS) == encode_stream(skewed, 4, ["ans"])
    assert encode_stream(skewed, 4, ["fixed", "huffman"]) == encode_stream(skewed, 4, ["huffman"])


def test_entropy_by_hand() -> None:
    assert entropy_bits(np.array([0, 0, 1, 2], np.uint16)) == pytest.approx(2 * 1 + 2 * 2)


@pytest.mark.parametrize("coder", CODERS)
def test_damage_is_an_error_or_other_symbols_and_nothing_else(coder: Coder) -> None:
    written = encode_stream(symbols_of(200, 9), 9, [coder])
    for position in range(len(written)):
        for change in (1, 0x80, 0xFF):
            damaged = bytearray(written)
            damaged[position] ^= change
            try:
                found = decode_stream(Reader(bytes(damaged)), most=1000)
            except ArchiveError:
                continue
            assert len(found) <= 1000
    for end in range(len(written)):
        with pytest.raises(ArchiveError):
            decode_stream(Reader(written[:end]), most=200)


def test_more_symbols_than_there_can_be_are_refused_before_memory_is_taken() -> None:
    announced = varint(2**50) + varint(4) + bytes([0])
    with pytest.raises(
        ArchiveError, match="A stream of 1125899906842624 symbols is announced where there are at most 7"
    ):
        decode_stream(Reader(announced), most=7)
    with pytest.raises(ArchiveError, match="A stream has 5000 symbols, more than 4096"):
        decode_stream(Reader(varint(1) + varint(5000)), most=7)
    with pytest.raises(ArchiveError, match="unknown coder, number 9"):
        decode_stream(Reader(varint(1) + varint(4) + bytes([9])), most=7)
    with pytest.raises(ArchiveError, match="lengths of a Huffman code are those of none"):
        decode_stream(Reader(varint(3) + varint(4) + bytes([1, 0x11, 0x10, 3, 0])), most=7)
