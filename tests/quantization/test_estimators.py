"""The range that a grid should cover."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_compress.quantization.affine import affine_parameters
from lightning_compress.quantization.estimators import RangeMethod, estimate_range


def limits(x: Tensor, method: RangeMethod, bits: int, symmetric: bool = False) -> list[float]:
    return [value.item() for value in estimate_range(x, method, bits, symmetric)]


def test_the_extremes_are_the_range_by_default() -> None:
    assert limits(torch.tensor([[-1.5, 0.0], [2.0, 7.0]]), "minmax", 8) == [-1.5, 7.0]


def test_a_percentile_cuts_both_sides() -> None:
    # 0 to 1000: a thousandth of 1000 intervals is one of them.
    assert limits(torch.arange(1001.0), "percentile", 8) == pytest.approx([1.0, 999.0])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_range_of_least_squared_error_beats_the_extremes(bits: int, symmetric: bool) -> None:
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    low, high = estimate_range(x, "mse", bits, symmetric)

    def error(low: Tensor, high: Tensor) -> float:
        largest = torch.tensor(2.0**bits - 1)
        scale, zero_point = affine_parameters(low, high, largest, symmetric)
        integers = ((x / scale).round() + zero_point).clamp(torch.zeros(()), largest)
        return ((integers - zero_point) * scale - x).square().mean().item()

    found, extremes = error(low, high), error(x.min(), x.max())
    best = min(error(x.min() * share / 200, x.max() * share / 200) for share in range(1, 201))
    assert best <= found <= min(1.1 * best, extremes)


def test_one_outlier_hardly_moves_a_percentile() -> None:
    x = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    x[17] = 1e6
    assert limits(x, "percentile", 8)[1] < 1.0


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "learned"])
def test_equal_values_always_give_the_same_range(method: RangeMethod) -> None:
    x = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert limits(x, method, 4) == limits(x.clone(), method, 4)


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "learned"])
def test_values_that_are_all_zero_have_the_range_zero(method: RangeMethod) -> None:
    assert limits(torch.zeros(5, 3), method, 4) == [0.0, 0.0]


@pytest.mark.parametrize("method", ["percentile", "mse"])
def test_half_precision_is_estimated_in_float32(method: RangeMethod) -> None:
    x = torch.randn(500, generator=torch.Generator().manual_seed(0))
    low, high = estimate_range(x.bfloat16(), method, 4)
    assert low.dtype == high.dtype == torch.float32
    assert [low.item(), high.item()] == pytest.approx(limits(x, method, 4), rel=0.05)
