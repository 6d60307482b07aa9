"""Learned step sizes: the gradients of the paper, and the optimizer of our own."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from torch import Tensor

from lightning_compress.quantization.step_sizes import StepSizes, quantize_with_step


def backward(result: Tensor, upstream: Tensor | None = None) -> None:
    torch.autograd.backward(result.sum() if upstream is None else (result * upstream).sum())


def gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


@pytest.mark.parametrize(
    ("x", "rounded", "x_gradient", "step_gradient"),
    [
        (-9.0, -4.0, 0.0, -2.0),  # clipped below: -Qn
        (-4.0, -4.0, 0.0, -2.0),  # on the bound counts as clipped
        (-1.0, -0.0, 1.0, 0.5),  # v = -0.5 ties to even: 0 + 0.5
        (0.0, 0.0, 1.0, 0.0),
        (0.5, 0.0, 1.0, -0.25),  # v = 0.25
        (1.5, 2.0, 1.0, 0.25),  # v = 0.75
        (2.5, 2.0, 0.0, 1.0),  # v = 1.25 lies beyond the greatest integer
        (7.0, 2.0, 0.0, 1.0),
    ],
)
def test_the_gradients_are_those_of_equations_3_and_5(
    x: float, rounded: float, x_gradient: float, step_gradient: float
) -> None:
    value = torch.tensor([x], requires_grad=True)
    step = torch.tensor(2.0, requires_grad=True)
    result = quantize_with_step(value, step, -2, 1)
    assert result.item() == rounded
    backward(result)
    assert gradient(value).item() == x_gradient
    assert gradient(step).item() == pytest.approx(step_gradient / math.sqrt(1 * 2))


def test_the_gradient_of_a_step_is_scaled_by_the_values_that_share_it() -> None:
    weight = torch.full((2, 8), 0.75)
    per_channel = torch.ones(2, requires_grad=True)
    backward(quantize_with_step(weight, per_channel, -1, 1))
    # 8 values of a channel with 0.25 each, over sqrt(8 * 1)
    assert gradient(per_channel).tolist() == pytest.approx([2 / math.sqrt(8)] * 2)
    whole_batch = torch.ones((), requires_grad=True)
    backward(quantize_with_step(weight, whole_batch, -3, 3))
    # 16 values, of which 8 belong to one sample
    assert gradient(whole_batch).item() == pytest.approx(4 / math.sqrt(8 * 3))


def straight_through(x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """The method as the paper's appendix writes it: autograd through everything but the rounding."""
    ratio = (x / step).clamp(low, high)
    rounded = ratio + (ratio.round() - ratio).detach()
    return rounded * step


@pytest.mark.parametrize(("low", "high"), [(-1, 1), (-7, 7), (0, 15), (-5, 10)])
def test_value_and_gradients_are_those_of_the_straight_through_form(low: int, high: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 5, generator=generator)
    upstream = torch.randn(4, 3, 5, generator=generator)
    ours = [x.clone().requires_grad_(), torch.tensor([0.1, 0.2, 0.3, 0.7], requires_grad=True)]
    theirs = [x.clone().requires_grad_(), ours[1].detach().clone().requires_grad_()]
    result = quantize_with_step(ours[0], ours[1], low, high)
    expected = straight_through(theirs[0], theirs[1].view(4, 1, 1), low, high)
    assert torch.allclose(result, expected)
    backward(result, upstream)
    backward(expected, upstream)
    assert torch.allclose(gradient(ours[0]), gradient(theirs[0]))
    assert torch.allclose(gradient(ours[1]), gradient(theirs[1]) / math.sqrt(15 * max(-low, high)), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_float_types_keep_their_type(dtype: torch.dtype) -> None:
    x = torch.tensor([0.2, 0.9], dtype=dtype, requires_grad=True)
    step = torch.tensor(0.5, requires_grad=True)
    result = quantize_with_step(x, step, -2, 1)
    backward(result)
    assert (result.dtype, gradient(x).dtype, gradient(step).dtype) == (dtype, dtype, torch.float32)


def test_an_update_is_adam_on_the_logarithm() -> None:
    steps = StepSizes(learning_rate=0.1)
    step = steps.add("a", torch.tensor([1.0, 4.0]))
    reference = torch.tensor([1.0, 4.0]).log().requires_grad_()
    adam = torch.optim.Adam([reference], lr=0.1, eps=1e-20)
    for slope in ([1.0, -3.0], [0.5, 2.0], [-2.0, 0.1]):
        backward(step * torch.tensor(slope))
        backward(reference.exp() * torch.tensor(slope))
        steps.update()
        adam.step()
        adam.zero_grad()
    assert torch.allclose(step, reference.exp(), rtol=1e-5)
    assert step.grad is None


def test_the_scale_of_the_loss_does_not_matter() -> None:
    found = []
    for scale in (1.0, 65536.0):
        steps = StepSizes(learning_rate=0.01)
        step = steps.add("a", torch.tensor(2.0))
        backward(step * scale)
        steps.update()
        found.append(step.item())
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_an_overflow_changes_nothing() -> None:
    steps = StepSizes(learning_rate=0.01)
    step = steps.add("a", torch.tensor(2.0))
    backward(step * torch.tensor(math.inf))
    steps.update()
    assert step.item() == 2.0


def test_a_step_without_a_gradient_stays() -> None:
    steps = StepSizes(learning_rate=0.01)
    used, unused = steps.add("used", torch.tensor(2.0)), steps.add("unused", torch.tensor(3.0))
    backward(used.square())
    steps.update()
    assert used.item() == pytest.approx(2.0 * math.exp(-0.01))
    assert unused.item() == 3.0


def test_nothing_is_learned_after_learning_was_switched_off() -> None:
    steps = StepSizes(learning_rate=0.01)
    step = steps.add("a", torch.tensor(2.0))
    steps.requires_grad_(False)
    steps.update()
    assert (step * 2).requires_grad is False
    assert step.item() == 2.0


def one_update(steps: StepSizes, slope: float) -> float:
    backward(steps.leaves["a"] * slope)
    steps.update()
    return float(steps.leaves["a"].item())


def test_a_state_that_was_loaded_goes_on_as_the_one_that_was_saved() -> None:
    steps = StepSizes(learning_rate=0.01)
    steps.add("a", torch.tensor(2.0))
    one_update(steps, 1.0)
    file = io.BytesIO()
    torch.save(steps.state_dict(), file)
    file.seek(0)
    loaded = StepSizes(learning_rate=0.01)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    copied, pickled = copy.deepcopy(steps), pickle.loads(pickle.dumps(steps))
    expected = one_update(steps, -0.3)
    assert [one_update(other, -0.3) for other in (loaded, copied, pickled)] == [expected] * 3


def test_a_late_comer_begins_with_fresh_averages() -> None:
    steps = StepSizes(learning_rate=0.01)
    steps.add("a", torch.tensor(2.0))
    one_update(steps, 1.0)
    late = steps.add("late", torch.tensor(2.0))
    backward(late)
    steps.update()
    assert late.item() == pytest.approx(2.0 * math.exp(-0.01))


def test_an_update_of_no_steps_is_none() -> None:
    StepSizes(learning_rate=0.01).update()
