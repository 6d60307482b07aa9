"""Coded tensors: every value comes back, in the form that takes the fewest bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_compress.errors import ArchiveError
from lightning_compress.storage.bits import Reader
from lightning_compress.storage.coding import decode_stream
from lightning_compress.storage.tensors import DTYPES, IntegerWeight, decode_tensor, encode_tensor

CODERS: Any = ("fixed", "huffman")


def there_and_back(tensor: Tensor, form: str | None = None, integers: IntegerWeight | None = None) -> int:
    payload, size = encode_tensor("w", tensor, CODERS, integers)
    found = decode_tensor(payload, tensor.dtype, tensor.shape)
    assert found.dtype == tensor.dtype
    assert torch.equal(found, tensor) or bool(torch.isnan(tensor).any())
    assert size.coded_bits == 8 * len(payload)
    assert size.bound_bits <= size.coded_bits
    if form is not None:
        assert size.form == form
    return len(payload)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (40, 30), (5, 4, 3, 2)])
def test_every_dtype_and_shape(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    there_and_back((100 * torch.randn(shape)).to(dtype))
    there_and_back(torch.zeros(shape).to(dtype))


def test_numbers_that_are_none_come_back_to_the_bit() -> None:
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e-45, -0.0])
    odd.view(torch.int32)[0] = 0x7F800001  # a signalling one
    found = decode_tensor(encode_tensor("w", odd, CODERS)[0], odd.dtype, odd.shape)
    assert torch.equal(found.view(torch.int32)[:4], odd.view(torch.int32)[:4])
    assert found.view(torch.int32)[4] == 0  # the sign of a zero is dropped
    halves = torch.tensor([0x7F81, 0x7FA0, 0xFF81 - 2**16], dtype=torch.int16).view(torch.bfloat16)
    found = decode_tensor(encode_tensor("w", halves, CODERS)[0], halves.dtype, halves.shape)
    assert torch.equal(found.view(torch.int16), halves.view(torch.int16))


def test_zeros_alone_take_next_to_nothing() -> None:
    assert there_and_back(torch.zeros(1_000_000)) < 700


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 400),
    st.floats(0, 1),
    st.sampled_from([1, 2, 5, 300, 100_000]),
    st.integers(0, 1000),
    st.sampled_from([None, 4, 7]),
)
def test_any_sparsity_and_number_of_values(
    n: int, density: float, n_values: int, seed: int, n_rows: int | None
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n_values, generator=generator)
    tensor = values[torch.randint(n_values, (n,), generator=generator)] * (torch.rand(n, generator=generator) < density)
    there_and_back(tensor.repeat(n_rows, 1) if n_rows else tensor)


def test_each_form_is_found() -> None:
    torch.manual_seed(0)
    noise = torch.randn(64, 200)
    mask = torch.rand(64, 200) < 0.1
    few = torch.randn(16)[torch.randint(16, (64, 200))]
    by_rows = torch.randn(64, 8).gather(1, torch.randint(8, (64, 200)))
    assert there_and_back(noise, "raw") == 4 * 64 * 200 + 1
    assert there_and_back(noise * mask, "sparse raw") < 4.7 * int(mask.sum())
    assert there_and_back(few, "shared") < 0.53 * 64 * 200
    assert there_and_back(few * mask, "sparse shared") < 1.4 * int(mask.sum())
    assert there_and_back(by_rows, "shared") < 3 / 8 * 64 * 200 + 64 * 8 * 4 + 100
    integers = torch.randint(-7, 8, (64, 200), dtype=torch.int8)
    weight = IntegerWeight(integers, torch.rand(64) + 0.1)
    assert there_and_back(weight.values(), "integers", weight) < 4 / 8 * 64 * 200 + 400
    masked = IntegerWeight(integers * mask, torch.rand(64) + 0.1)
    assert there_and_back(masked.values(), "sparse integers", masked) < 1.4 * int(mask.sum()) + 300
    turned = IntegerWeight(integers, torch.rand(200) + 0.1, axis=1)
    there_and_back(turned.values(), "integers", turned)
    there_and_back(noise, "raw", weight)  # what it is not made of is not used


def test_values_that_a_sample_misses_are_found_too() -> None:
    tensor = torch.zeros(2**19) + torch.randint(3, (2**19,))
    tensor[1::2] = 7.0
    tensor[12_345] = 99.0
    there_and_back(tensor)


def test_gaps_by_hand() -> None:
    # Zeros in front of the entries: 1, 4; two follow. At 2 bits the filler 3 covers three zeros.
    tensor = torch.zeros(9)
    tensor[1], tensor[6] = 1.0, 2.0
    from lightning_compress.storage.tensors import _gaps

    kept = np.flatnonzero(tensor.numpy())
    assert _gaps(kept, 9, 2).tolist() == [1, 3, 1]
    assert _gaps(kept, 9, 1).tolist() == [1, 0, 1, 1, 1, 1, 0, 1, 1]
    assert _gaps(np.array([], np.int64), 7, 2).tolist() == [3, 3]


def test_the_stages_by_hand() -> None:
    tensor = torch.zeros(64)
    tensor[::8] = torch.tensor([0.5, -0.5]).repeat(4)
    payload, size = encode_tensor("w", tensor, CODERS)
    assert (size.n_nonzero, size.n_values, size.form) == (8, 2, "sparse shared")
    reader = Reader(payload, 1)
    gap_bits = reader.byte()
    gaps = decode_stream(reader, 64)
    assert size.dense_bits == 64 * 32
    assert size.pruned_bits == len(gaps) * gap_bits + 8 * 32
    # One bit an index, the table of two values, and two bytes that tell its size.
    assert size.shared_bits == len(gaps) * gap_bits + 8 + 2 * 32 + 16


def test_what_cannot_be_kept_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"`w` is a torch\.strided tensor of torch\.complex64; an archive holds strided"
    ):
        encode_tensor("w", torch.zeros(2, dtype=torch.complex64), CODERS)
    with pytest.raises(ValueError, match=r"`w` is a torch\.sparse_coo tensor"):
        encode_tensor("w", torch.eye(2).to_sparse(), CODERS)


@pytest.mark.parametrize("seed", range(4))
def test_damage_is_an_error_or_another_tensor_and_nothing_else(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(6, 20, generator=generator) * (torch.rand(6, 20, generator=generator) < 0.3)
    integers = None
    if seed % 2:
        integers = IntegerWeight(tensor.sign().to(torch.int8), torch.rand(6, generator=generator))
        tensor = integers.values()
    if seed == 2:
        tensor = tensor.sign()
    payload, _ = encode_tensor("w", tensor, CODERS, integers)
    for position in range(len(payload)):
        for change in (1, 2, 4, 0x80, 0xFF):
            damaged = bytearray(payload)
            damaged[position] ^= change
            try:
                found = decode_tensor(bytes(damaged), tensor.dtype, tensor.shape)
            except ArchiveError:
                continue
            assert found.shape == tensor.shape
    for end in range(len(payload)):
        with pytest.raises(ArchiveError):
            decode_tensor(payload[:end], tensor.dtype, tensor.shape)
    with pytest.raises(ArchiveError, match="1 bytes follow a tensor that has ended"):
        decode_tensor(payload + b"x", tensor.dtype, tensor.shape)
    for shape in ((2, 20), (100, 20), (2**40,)):
        with pytest.raises(ArchiveError):
            decode_tensor(payload, tensor.dtype, shape)
