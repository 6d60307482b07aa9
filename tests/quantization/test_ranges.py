"""What quantizers remember of what they saw."""

from __future__ import annotations

import io
import math

import pytest
import torch

from lightning_compress.errors import CompressionError
from lightning_compress.quantization.affine import AffineGrid
from lightning_compress.quantization.ranges import ActivationRanges


def seen(ranges: ActivationRanges, index: int, low: float, high: float) -> None:
    ranges.observe(index, torch.tensor(low), torch.tensor(high))


def test_the_first_observation_is_taken_as_it_is_and_later_ones_move_the_average() -> None:
    ranges = ActivationRanges(momentum=0.25)
    index = ranges.add("a", 8)
    seen(ranges, index, -1.0, 4.0)
    ranges.update()
    assert ranges.as_dict() == {"a": (-1.0, 4.0)}
    seen(ranges, index, -5.0, 8.0)
    ranges.update()
    assert ranges.as_dict() == {"a": (-2.0, 5.0)}


def test_within_a_step_the_range_is_the_union() -> None:
    ranges = ActivationRanges()
    first, other = ranges.add("first", 8), ranges.add("other", 8)
    seen(ranges, first, -1.0, 2.0)
    seen(ranges, other, 0.0, 7.0)
    seen(ranges, first, 0.0, 3.0)
    assert ranges.as_dict() == {}
    ranges.update()
    assert ranges.as_dict() == {"first": (-1.0, 3.0), "other": (0.0, 7.0)}


def test_a_quantizer_that_was_not_met_keeps_its_average() -> None:
    ranges = ActivationRanges()
    first, other = ranges.add("first", 8), ranges.add("other", 8)
    seen(ranges, first, -1.0, 2.0)
    ranges.update()
    seen(ranges, other, 0.0, 7.0)
    ranges.update()
    ranges.update()
    assert ranges.as_dict() == {"first": (-1.0, 2.0), "other": (0.0, 7.0)}


def test_a_range_gives_a_grid_and_the_same_as_tensors() -> None:
    ranges = ActivationRanges()
    index, unseen = ranges.add("a", 2), ranges.add("b", 8)
    seen(ranges, index, -1.0, 2.0)
    ranges.update()
    assert ranges.grid(index) == AffineGrid(1.0, 1, 2)
    assert [value.item() for value in ranges.parameters(index)] == [1.0, 1]
    assert (ranges.grid(unseen), ranges.is_seen(unseen), ranges.unseen()) == (None, False, ["b"])


def test_a_name_is_added_once() -> None:
    ranges = ActivationRanges()
    assert [ranges.add(name, 8) for name in ("a", "b", "a")] == [0, 1, 0]
    assert ranges.names == ["a", "b"]


def test_reset_forgets_everything() -> None:
    ranges = ActivationRanges()
    index = ranges.add("a", 8)
    seen(ranges, index, 0.0, 1.0)
    ranges.update()
    seen(ranges, index, 0.0, 100.0)
    ranges.reset()
    ranges.update()
    assert (ranges.as_dict(), ranges.unseen(), ranges.grid(index)) == ({}, ["a"], None)


NOT_FINITE = (
    "The activation at `layer1.relu` was NaN or infinite, so it has no range to quantize to. "
    "The training diverged before: lower the learning rate, clip the gradients, or check the data."
)


@pytest.mark.parametrize("low", [math.nan, -math.inf, 0.0])
@pytest.mark.parametrize("high", [math.nan, math.inf])
@pytest.mark.parametrize("steps_before", [0, 1])
def test_an_activation_that_is_not_finite_is_named(low: float, high: float, steps_before: int) -> None:
    ranges = ActivationRanges()
    ranges.add("fine", 8)
    index = ranges.add("layer1.relu", 8)
    for _ in range(steps_before):
        seen(ranges, index, 0.0, 1.0)
        ranges.update()
    seen(ranges, index, low, high)
    with pytest.raises(CompressionError) as caught:
        ranges.update()
    assert str(caught.value) == NOT_FINITE


@pytest.mark.parametrize("high", [math.nan, math.inf])
def test_a_first_value_that_is_not_finite_is_named(high: float) -> None:
    ranges = ActivationRanges()
    index = ranges.add("layer1.relu", 8)
    with pytest.raises(CompressionError) as caught:
        ranges.start_from(index, torch.tensor(0.0), torch.tensor(high))
    assert str(caught.value) == NOT_FINITE


def test_the_state_survives_a_file_that_is_loaded_as_weights_only() -> None:
    ranges = ActivationRanges()
    for name in ("a", "b", "unseen"):
        ranges.add(name, 8)
    seen(ranges, 0, -1.0, 2.0)
    seen(ranges, 1, 0.0, 7.0)
    ranges.update()
    file = io.BytesIO()
    torch.save(ranges.state_dict(), file)
    file.seek(0)

    other = ActivationRanges()
    for name in ("new", "unseen", "b", "a"):
        other.add(name, 8)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.as_dict() == {"b": (0.0, 7.0), "a": (-1.0, 2.0)}
    assert other.unseen() == ["new", "unseen"]
    assert other.grid(3) == ranges.grid(0)


def test_a_state_dict_does_not_follow_the_ranges() -> None:
    ranges = ActivationRanges(momentum=1.0)
    index = ranges.add("a", 8)
    seen(ranges, index, 0.0, 1.0)
    ranges.update()
    state = ranges.state_dict()
    ranges.load_state_dict({**state, "maximum": torch.tensor([5.0])})
    assert state["maximum"].tolist() == [1.0]


def test_a_state_of_another_architecture_is_refused() -> None:
    ranges, other = ActivationRanges(), ActivationRanges()
    ranges.add("gone", 8)
    other.add("a", 8)
    with pytest.raises(CompressionError) as caught:
        other.load_state_dict(ranges.state_dict())
    assert str(caught.value) == (
        "The checkpoint quantizes `gone`, which this model does not have. "
        "Load it into the architecture, and with the `exclude`, that it was written with."
    )


def test_a_state_at_other_bits_is_refused() -> None:
    ranges, other = ActivationRanges(), ActivationRanges()
    ranges.add("a", 8)
    other.add("a", 4)
    with pytest.raises(CompressionError) as caught:
        other.load_state_dict(ranges.state_dict())
    assert str(caught.value) == (
        "The checkpoint quantizes `a` to 8 bits, this model to 4. Use the same bits as in the run that wrote it."
    )


def test_symmetric_grids_have_zero_in_the_middle() -> None:
    ranges = ActivationRanges(symmetric=True)
    index = ranges.add("a", 3)
    seen(ranges, index, -1.0, 6.0)
    ranges.update()
    assert ranges.grid(index) == AffineGrid(2.0, 4, 3)  # 3 steps of 2 to either side, and one more below
    other = ranges.add("b", 3)
    assert ranges.start_from(other, torch.tensor(-3.0), torch.tensor(0.0)) == AffineGrid(1.0, 4, 3)


def learned(low: float, high: float) -> tuple[ActivationRanges, torch.Tensor]:
    ranges = ActivationRanges()
    index = ranges.add("a", 2, "learned")
    assert ranges.learnable() == []
    seen(ranges, index, low, high)
    ranges.update()
    assert ranges.learnable() == [index]
    step = ranges.initial_step(index).clone().requires_grad_()
    ranges.learn(index, step)
    return ranges, step


def test_a_learned_grid_begins_with_that_of_its_range_and_keeps_the_zero_point() -> None:
    ranges, step = learned(-1.0, 2.0)
    assert (ranges.grid(0), ranges.learned[0].bounds, ranges.learnable()) == (AffineGrid(1.0, 1, 2), (-1, 2), [])
    with torch.no_grad():
        step.mul_(3)
    ranges.renew_learned()
    assert ranges.grid(0) == AffineGrid(3.0, 1, 2)
    assert [value.item() for value in ranges.parameters(0)] == [3.0, 1]
    assert not ranges.parameters(0)[0].requires_grad


def test_a_learned_grid_does_not_follow_later_observations() -> None:
    ranges, _ = learned(-1.0, 2.0)
    seen(ranges, 0, -100.0, 100.0)
    ranges.update()
    assert ranges.grid(0) == AffineGrid(1.0, 1, 2)


def test_reset_forgets_what_was_learned() -> None:
    ranges, _ = learned(-1.0, 2.0)
    ranges.reset()
    assert (ranges.grid(0), ranges.unseen()) == (None, ["a"])
