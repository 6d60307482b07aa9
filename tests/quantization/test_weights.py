"""Rounding of one weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_compress.quantization.estimators import RangeMethod
from lightning_compress.quantization.scales import least_squares_scales
from lightning_compress.quantization.weights import WeightQuantizer


def test_the_least_squares_scale_of_a_channel_with_an_outlier() -> None:
    # Six weights of size 1 and one of 10, in {-1, 0, 1} * s: s = 10 drops the six (error 6), s = 1 clips the one (81).
    weight = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 10.0], [2.0, -2.0, 2.0, 2.0, 2.0, -2.0, 2.0]])
    assert least_squares_scales(weight, bits=2).tolist() == [10.0, 2.0]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_least_squares_scale_is_about_as_good_as_the_best_of_many(bits: int) -> None:
    weight = torch.randn(4, 200, generator=torch.Generator().manual_seed(0))
    largest = 2 ** (bits - 1) - 1

    def error(scales: Tensor) -> Tensor:
        rounded = (weight / scales[:, None]).round().clamp(-largest, largest) * scales[:, None]
        return (rounded - weight).square().sum(1)

    full = weight.abs().amax(1) / largest
    tried = torch.stack([error(full * share / 200) for share in range(10, 221)])
    assert (error(least_squares_scales(weight, bits)) <= 1.15 * tried.amin(0)).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_channel_of_zeros_has_scale_one(bits: int) -> None:
    assert least_squares_scales(torch.zeros(2, 3), bits).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("method", ["minmax", "mse", "learned"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("axis", [0, 1])
def test_the_integers_that_ship_are_those_of_the_training(method: RangeMethod, bits: int, axis: int) -> None:
    weight = torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(1))
    quantizer = WeightQuantizer(bits, axis, method)
    integers, scales = quantizer.integers(weight)
    channels_first = quantizer.rounded(weight).transpose(0, axis)
    assert torch.equal(integers * scales.view(-1, 1, 1), channels_first)
    assert integers.dtype == torch.int8
    assert integers.abs().max() <= 2 ** (bits - 1) - 1


def test_a_learned_step_takes_the_place_of_the_method() -> None:
    step = torch.tensor([0.5], requires_grad=True)
    quantizer = WeightQuantizer(3, method="learned", step=step)
    weight = torch.tensor([[9.0, 0.8, -0.2, 0.0]], requires_grad=True)
    rounded = quantizer.rounded(weight)
    assert rounded.tolist() == [[1.5, 1.0, -0.0, 0.0]]
    torch.autograd.backward(rounded.sum())
    assert weight.grad is not None
    assert weight.grad.tolist() == [[0.0, 1.0, 1.0, 1.0]]
    assert step.grad is not None
    integers, scales = quantizer.integers(weight)
    assert (integers.tolist(), scales.tolist(), scales.requires_grad) == ([[3, 2, 0, 0]], [0.5], False)


@pytest.mark.parametrize("method", ["minmax", "mse", "learned"])
def test_zeros_stay_zeros(method: RangeMethod) -> None:
    weight = torch.tensor([[0.0, 3.0, 0.0, -2.0]])
    assert (WeightQuantizer(2, method=method).rounded(weight) == 0).tolist() == [[True, False, True, False]]


@pytest.mark.parametrize("method", ["minmax", "mse", "learned"])
@pytest.mark.parametrize("bits", [2, 4])
def test_a_grid_is_the_same_after_a_change_of_signs(method: RangeMethod, bits: int) -> None:
    weight = torch.randn(3, 40, generator=torch.Generator().manual_seed(2))
    quantizer = WeightQuantizer(bits, method=method)
    assert torch.equal(quantizer.rounded(-weight), -quantizer.rounded(weight))
