"""The grids and the rounding, against torch's own and against numbers checked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_compress.quantization.affine import (
    AffineGrid,
    affine_parameters,
    fake_quantize,
    fake_quantize_,
    fake_quantize_traced,
    fake_quantize_weight,
    integer_weight,
    weight_scales,
)

GRIDS = [AffineGrid(0.05, 128, 8), AffineGrid(0.013, 0, 8), AffineGrid(0.4, 3, 4), AffineGrid(1.3, 1, 2)]


def spread_values() -> Tensor:
    """Values far over the ends of every grid above, none of them on a tie."""
    torch.manual_seed(0)
    return torch.randn(5000) * 6.0


def in_place(x: Tensor, grid: AffineGrid, clamp: tuple[float, float] = (-math.inf, math.inf)) -> Tensor:
    return fake_quantize_(x * 1.0, grid, clamp)


@pytest.mark.parametrize(
    ("grid", "clamp", "bounds"),
    [
        (AffineGrid(0.5, 0, 8), (-math.inf, math.inf), (0, 255)),
        (AffineGrid(0.5, 100, 8), (-math.inf, math.inf), (-100, 155)),
        (AffineGrid(0.5, 100, 8), (0.0, math.inf), (0, 155)),
        (AffineGrid(0.5, 100, 8), (0.0, 6.0), (0, 12)),
        (AffineGrid(0.5, 0, 4), (0.0, 6.0), (0, 12)),
        (AffineGrid(0.5, 0, 3), (0.0, 6.0), (0, 7)),
        (AffineGrid(1.0, 3, 3), (-2.0, 2.0), (-2, 2)),
    ],
)
def test_the_bounds_are_the_narrower_of_grid_and_activation(
    grid: AffineGrid, clamp: tuple[float, float], bounds: tuple[int, int]
) -> None:
    assert grid.bounds(clamp) == bounds


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("rounding", [fake_quantize, in_place])
def test_the_rounded_values_are_those_of_torch(rounding: object, grid: AffineGrid) -> None:
    x = spread_values()
    expected = torch.fake_quantize_per_tensor_affine(x, grid.scale, grid.zero_point, 0, grid.largest)
    torch.testing.assert_close(rounding(x, grid), expected, rtol=1e-6, atol=0)  # type: ignore[operator]


@pytest.mark.parametrize("grid", GRIDS)
def test_the_gradient_is_that_of_torch(grid: AffineGrid) -> None:
    x, upstream = spread_values(), torch.randn(5000)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    fake_quantize(ours, grid).backward(upstream)  # type: ignore[no-untyped-call]
    torch.fake_quantize_per_tensor_affine(theirs, grid.scale, grid.zero_point, 0, grid.largest).backward(upstream)  # type: ignore[no-untyped-call]
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.equal(ours.grad, theirs.grad)
    assert 0 < int((ours.grad == 0).sum()) < 5000


@pytest.mark.parametrize("grid", GRIDS)
def test_rounding_in_place_passes_the_gradient_strictly_inside_the_bounds(grid: AffineGrid) -> None:
    x, upstream = spread_values(), torch.randn(5000)
    leaf = x.clone().requires_grad_()
    rounded = in_place(leaf, grid)
    rounded.backward(upstream)  # type: ignore[no-untyped-call]
    low, high = grid.bounds()
    integers = (x / grid.scale).round()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, torch.where((integers > low) & (integers < high), upstream, 0.0))


@pytest.mark.parametrize("clamp", [(-math.inf, math.inf), (0.0, math.inf), (0.0, 6.0), (-1.0, 1.0)])
@pytest.mark.parametrize("grid", GRIDS)
def test_what_a_compiler_gets_rounds_and_differentiates_as_eager_code_does(
    grid: AffineGrid, clamp: tuple[float, float]
) -> None:
    x, upstream = spread_values(), torch.randn(5000)
    eager, traced = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = fake_quantize(eager, grid, clamp)
    found = fake_quantize_traced(traced, torch.tensor(grid.scale), torch.tensor(grid.zero_point), grid.largest, clamp)
    assert torch.equal(found, expected)
    expected.backward(upstream)  # type: ignore[no-untyped-call]
    found.backward(upstream)  # type: ignore[no-untyped-call]
    assert eager.grad is not None
    assert traced.grad is not None
    assert torch.equal(traced.grad, eager.grad)


def test_rounding_in_place_uses_no_memory_of_its_own() -> None:
    x = torch.tensor([0.26, 9.0]) * 1.0
    address = x.data_ptr()
    assert fake_quantize_(x, AffineGrid(0.5, 0, 2)).data_ptr() == address
    assert x.tolist() == [0.5, 1.5]


@pytest.mark.parametrize("rounding", [fake_quantize, in_place])
def test_ties_go_to_the_even_neighbour(rounding: object) -> None:
    ties = torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5])
    rounded = rounding(ties, AffineGrid(1.0, 8, 4))  # type: ignore[operator]
    assert rounded.tolist() == [-2.0, 0.0, 0.0, 2.0, 2.0]


@pytest.mark.parametrize("rounding", [fake_quantize, in_place])
def test_a_relu_that_the_rounding_takes_over_equals_a_relu_before_it(rounding: object) -> None:
    x, grid = spread_values(), AffineGrid(0.1, 100, 8)
    assert torch.equal(rounding(x, grid, (0.0, math.inf)), fake_quantize(x.relu(), grid))  # type: ignore[operator]


def test_the_gradient_of_a_relu6_taken_over_is_that_of_relu6_then_rounding() -> None:
    x, grid = spread_values(), AffineGrid(0.1, 0, 8)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    fake_quantize(ours, grid, (0.0, 6.0)).sum().backward()  # type: ignore[no-untyped-call]
    fake_quantize(torch.nn.functional.relu6(theirs), grid).sum().backward()  # type: ignore[no-untyped-call]
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_keep_their_type(dtype: torch.dtype) -> None:
    rounded = fake_quantize(torch.tensor([0.3, 9.0], dtype=dtype), AffineGrid(0.5, 0, 2))
    assert (rounded.dtype, rounded.tolist()) == (dtype, [0.5, 1.5])


def test_a_grid_holds_zero_exactly_and_covers_its_range() -> None:
    minimum, maximum = torch.tensor([-1.0, 0.5, -3.0, 0.0]), torch.tensor([2.0, 2.0, -1.0, 0.0])
    scale, zero_point = affine_parameters(minimum, maximum, torch.full((4,), 3.0))
    # [-1, 2], [0, 2], [-3, 0] and nothing at all, in three steps.
    assert scale.tolist() == pytest.approx([1.0, 2 / 3, 1.0, 1.0])
    assert zero_point.tolist() == [1.0, 0.0, 3.0, 0.0]


def test_weights_are_symmetric_integers_by_channel() -> None:
    weight = torch.tensor([[12.7, -0.1, 0.26], [0.0, 0.0, 0.0], [-1.27, 1.27, 0.014]])
    integers, scales = integer_weight(weight, bits=8)
    assert integers.dtype == torch.int8
    assert integers.tolist() == [[127, -1, 3], [0, 0, 0], [-127, 127, 1]]
    assert scales.tolist() == pytest.approx([0.1, 1.0, 0.01])


@pytest.mark.parametrize(("bits", "largest"), [(2, 1), (3, 3), (4, 7), (8, 127)])
def test_the_least_integer_of_a_weight_is_never_used(bits: int, largest: int) -> None:
    torch.manual_seed(0)
    integers, _ = integer_weight(torch.randn(16, 9), bits)
    assert integers.abs().amax(1).tolist() == [largest] * 16


def test_rounded_weights_are_integers_times_scales() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 3, 3, 3)
    integers, scales = integer_weight(weight, 4)
    assert torch.equal(fake_quantize_weight(weight, 4), integers * scales.view(6, 1, 1, 1))
    assert torch.equal(scales, weight_scales(weight, 4))


def test_the_gradient_of_a_weight_passes_unchanged() -> None:
    weight, upstream = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5)
    fake_quantize_weight(weight, 3).backward(upstream)  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    assert torch.equal(weight.grad, upstream)
