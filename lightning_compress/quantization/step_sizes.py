"""Learned step sizes: the scales of weights and activations as parameters, trained outside the model."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from lightning_compress.processes import n_processes

LEARNING_RATE = 0.003
"""Largest relative change of a step size in one update, about."""

BETAS = (0.9, 0.999)
"""Decay of the moving averages of the gradient and of its square (Kingma & Ba 2015, arXiv:1412.6980)."""


def quantize_with_step(x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """Round ``x`` to multiples of ``step`` between ``low`` and ``high``; gradients reach ``x`` and ``step``.

    The gradients are those of learned step size quantization (Esser et al. 2020, eq. 3 and 5, arXiv:1902.08153): with
    ``v = x / step``, that of ``x`` passes where ``low < v < high``; that of ``step`` is ``round(v) - v`` there, and
    ``low`` or ``high`` beyond, times ``1 / sqrt(N * max(-low, high))``, where N counts the values that share the step
    (of one sample, where ``step`` is a scalar for a batch).

    Args:
        x: Floating-point tensor.
        step: Step sizes greater than 0: of shape (channels,) for the first dimension of ``x``, or a scalar.
        low: Least integer, at most 0.
        high: Greatest integer, at least 0.

    Returns:
        Tensor like ``x``.

    Example:
        >>> x, step = torch.tensor([-3.0, 0.2, 0.8]), torch.tensor(0.5, requires_grad=True)
        >>> quantize_with_step(x, step, -2, 1)
        tensor([-1.0000,  0.0000,  0.5000], grad_fn=<QuantizeWithStepBackward>)
    """
    return QuantizeWithStep.apply(x, step, low, high)  # type: ignore[no-any-return]


class QuantizeWithStep(torch.autograd.Function):
    """See `quantize_with_step`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
        """Round ``x``."""
        spread = _spread(step, x)
        ctx.save_for_backward(x, step)
        ctx.bounds = (low, high)
        return _codes(x, spread, low, high).mul_(spread).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Return the gradients of ``x`` and ``step``."""
        x, step = ctx.saved_tensors
        low, high = ctx.bounds
        (gradient,) = gradients
        share = 1 / math.sqrt(math.prod(x.shape[1:]) * max(-low, high))
        spread = _spread(step, x)
        needs_step = ctx.needs_input_grad[1]
        # What arrives times the rounded ratio, less what passes times the ratio.
        if step.dim() == 0 and _lie_alike(gradient, x):
            bounds = low * step.item(), high * step.item()
            if not needs_step:
                return torch.ops.aten.hardtanh_backward(gradient, x, *bounds), None, None, None
            codes = _codes(x, step, low, high)
            through_codes = _inner(gradient, codes)
            # Into the memory of the codes: fresh memory costs more than arithmetic.
            x_gradient = torch.ops.aten.hardtanh_backward.grad_input(gradient, x, *bounds, grad_input=codes)
            return x_gradient, (through_codes - _inner(x_gradient, x) / step) * share, None, None
        x_gradient = gradient * ((x > low * spread) & (x < high * spread))
        if not needs_step:
            return x_gradient, None, None, None
        parts = _codes(x, spread, low, high).mul_(gradient).sub_(x_gradient * x / spread)
        step_gradient = parts.sum() if step.dim() == 0 else parts.flatten(1).sum(1)
        return x_gradient, step_gradient * share, None, None


def _spread(step: Tensor, x: Tensor) -> Tensor:
    return step.view(-1, *[1] * (x.dim() - 1)) if step.dim() == 1 else step


def _codes(x: Tensor, spread: Tensor, low: int, high: int) -> Tensor:
    # Division, not multiplication by the reciprocal: runtimes divide, and the two differ at ties.
    return (x.float() / spread).round_().clamp_(low, high)


def _lie_alike(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors of a CPU can be read as the same long vectors."""
    return (
        not torch.compiler.is_compiling()
        and a.device.type == "cpu"
        and a.dtype == b.dtype == torch.float32
        and a.stride() == b.stride()
        and (a.is_contiguous() or a.is_contiguous(memory_format=torch.channels_last))
    )


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum of all products of two tensors that lie alike, without memory of its own."""
    flat = (a.numel(),), (1,)
    return torch.dot(a.as_strided(*flat), b.as_strided(*flat))


class StepSizes:
    """Step sizes that are trained outside the model, by Adam on their logarithms.

    They are no parameters of the model: its state dict does not know them, weight decay does not shrink them, averages
    of weights do not reach them, and the user's optimizer does not train them. On the logarithm, Adam changes a step
    by a share of itself, whatever its size and whatever the scale of the loss, and keeps it positive. Where there are
    several processes, gradients are averaged over them.

    Args:
        learning_rate: Largest relative change of a step size in one update, about.

    Example:
        >>> steps = StepSizes(learning_rate=0.1)
        >>> step = steps.add("conv", torch.tensor([1.0, 2.0]))
        >>> (step * torch.tensor([3.0, 0.0])).sum().backward()
        >>> steps.update()
        >>> step
        tensor([0.9048, 2.0000], requires_grad=True)
    """

    def __init__(self, learning_rate: float = LEARNING_RATE) -> None:
        self.learning_rate = learning_rate
        self.leaves: dict[str, Tensor] = {}
        self._moments = torch.empty(3, 0)  # first, second, and the number of updates

    def add(self, name: str, initial: Tensor) -> Tensor:
        """Take in a step size, or several in one tensor, that begins at ``initial``; return what is trained."""
        leaf = initial.detach().float().clone().requires_grad_()
        self._moments = torch.cat([self._moments.to(leaf.device), leaf.new_zeros(3, leaf.numel())], 1)
        self.leaves[name] = leaf
        return leaf

    def clear(self) -> None:
        """Forget all step sizes."""
        self.leaves.clear()
        self._moments = torch.empty(3, 0)

    def requires_grad_(self, requires_grad: bool) -> None:
        """Let gradients reach the step sizes, or not."""
        for leaf in self.leaves.values():
            leaf.requires_grad_(requires_grad)
            if not requires_grad:
                leaf.grad = None

    def to_(self, device: torch.device) -> None:
        """Move everything to ``device``."""
        for leaf in self.leaves.values():
            leaf.grad = None
            leaf.data = leaf.data.to(device)
        self._moments = self._moments.to(device)

    def update(self, factor: float = 1.0) -> None:
        """Take one step down the gradients that have gathered, and clear them.

        Args:
            factor: What the learning rate is multiplied by, of a schedule from 1 to 0.
        """
        leaves = list(self.leaves.values())
        has_gradients = any(leaf.grad is not None for leaf in leaves)
        if not leaves or not (has_gradients or n_processes() > 1):
            return
        steps = torch.cat([leaf.detach().flatten() for leaf in leaves])
        gradients = torch.cat(
            [(leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)).flatten() for leaf in leaves]
        )
        if n_processes() > 1:
            distributed.all_reduce(gradients)
            gradients /= n_processes()
        # An overflow under a loss scale must not reach the averages; the optimizer's step was skipped as well.
        slopes = torch.nan_to_num(gradients * steps, nan=0.0, posinf=0.0, neginf=0.0)
        first, second, age = self._moments
        age += 1
        first.lerp_(slopes, 1 - BETAS[0])
        second.lerp_(slopes.square(), 1 - BETAS[1])
        direction = (first / (1 - BETAS[0] ** age)) / ((second / (1 - BETAS[1] ** age)).sqrt() + 1e-20)
        steps *= torch.exp(-self.learning_rate * factor * direction)
        for leaf, new in zip(leaves, torch.split(steps, [leaf.numel() for leaf in leaves]), strict=True):
            leaf.data.copy_(new.view_as(leaf))
            leaf.grad = None

    def state_dict(self, names: Collection[str] | None = None) -> dict[str, Any]:
        """Return step sizes and averages as CPU tensors.

        Args:
            names: The step sizes that it tells of; by default all.
        """
        kept = [name for name in self.leaves if names is None or name in names]
        moments = torch.split(self._moments.cpu(), [leaf.numel() for leaf in self.leaves.values()], 1)
        by_name = dict(zip(self.leaves, moments, strict=True)) if self.leaves else {}
        return {
            "steps": {name: self.leaves[name].detach().cpu().clone() for name in kept},
            "moments": torch.cat([by_name[name] for name in kept], 1) if kept else torch.empty(3, 0),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a `state_dict`; what `add` returned before is trained no more."""
        self.clear()
        for name, step in state["steps"].items():
            self.add(name, step)
        self._moments = state["moments"].clone()


def narrowed_state(state: Mapping[str, Any], kept: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Return a `StepSizes.state_dict` with some of the channels of some step sizes alone.

    Args:
        state: The state.
        kept: The channels that stay, by the name of the step size; others stay as they are.

    Example:
        >>> steps = StepSizes()
        >>> _ = steps.add("conv", torch.tensor([1.0, 2.0, 3.0]))
        >>> narrowed_state(steps.state_dict(), {"conv": [0, 2]})["steps"]
        {'conv': tensor([1., 3.])}
    """
    moments = torch.split(state["moments"], [step.numel() for step in state["steps"].values()], 1)
    rows = [(name, step, part) for (name, step), part in zip(state["steps"].items(), moments, strict=True)]
    for number, (name, step, part) in enumerate(rows):
        if name in kept and step.dim():
            # The groups of a transposed convolution share the step sizes of a column: there are fewer than channels.
            stays = [channel for channel in kept[name] if channel < step.numel()]
            rows[number] = (name, step[stays], part[:, stays])
    return {
        "steps": {name: step for name, step, _ in rows},
        "moments": torch.cat([part for *_, part in rows], 1) if rows else state["moments"],
    }
