"""Affine grids: the integers a tensor is rounded to, and the rounding itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_compress.quantization.kept_memory import KeptMemory

NO_CLAMP = (-math.inf, math.inf)
"""Bounds of an activation that has none."""

SIGN_STEP = 2.0**-14
"""What is nearer to zero than half of it has no sign: runtimes take signs by rounding to multiples of it.

Sums of signs often are exactly zero in integers and next to nothing in floats: both must give the same.
"""


@dataclass(frozen=True)
class AffineGrid:
    """Unsigned integers ``0 .. 2**bits - 1`` that stand for ``scale * (integer - zero_point)``.

    With one bit these are signs: the integers 0, 1 and 2 around a zero point of 1, where what is zero stays zero.

    Args:
        scale: Distance of two neighbouring values, greater than 0.
        zero_point: The integer that stands for zero, in [0, 2**bits - 1].
        bits: Number of bits, 1 to 8.

    Example:
        >>> grid = AffineGrid(scale=0.5, zero_point=1, bits=2)
        >>> grid.bounds(), grid.bounds(clamp=(0.0, 0.6))
        ((-1, 2), (0, 1))
    """

    scale: float
    zero_point: int
    bits: int

    @property
    def largest(self) -> int:
        """The largest integer of the grid."""
        return 2 if self.bits == 1 else int(2**self.bits - 1)

    @property
    def step(self) -> float:
        """What values are divided by before they are rounded: the scale, but for signs next to nothing."""
        return SIGN_STEP if self.bits == 1 else self.scale

    def bounds(self, clamp: tuple[float, float] = NO_CLAMP) -> tuple[int, int]:
        """Return the least and the greatest multiple of ``scale`` inside both the grid and ``clamp``.

        Args:
            clamp: Bounds of the activation that the rounding takes over, such as ``(0.0, inf)`` for a ReLU.

        Returns:
            Two integers relative to the zero point.
        """
        low, high = -self.zero_point, self.largest - self.zero_point
        if self.bits == 1:
            return (low if clamp[0] < 0 else 0), (high if clamp[1] > 0 else 0)
        if clamp[0] > low * self.scale:
            low = round(clamp[0] / self.scale)
        if clamp[1] < high * self.scale:
            high = round(clamp[1] / self.scale)
        return low, high


def affine_parameters(
    minimum: Tensor, maximum: Tensor, largest: Tensor, symmetric: bool = False
) -> tuple[Tensor, Tensor]:
    """Return scales and zero points of the affine grids that cover ``[minimum, maximum]`` and zero exactly.

    Args:
        minimum: Least values, shape (n,).
        maximum: Greatest values, shape (n,).
        largest: The largest integer of each grid, ``2**bits - 1``, shape (n,).
        symmetric: Whether the zero point is to be ``2**(bits - 1)``, so that the grid covers ``-L .. L``, where L is
            the greater of the two absolute values.

    Returns:
        Scales and zero points as float32, shape (n,). A range without extent gets scale 1, and so do signs, around 1.

    Example:
        >>> scale, zero_point = affine_parameters(torch.tensor([-1.0]), torch.tensor([2.0]), torch.tensor([255.0]))
        >>> round(scale.item() * 255, 4), zero_point.item()
        (3.0, 85.0)
    """
    minimum, maximum = minimum.float().clamp(max=0.0), maximum.float().clamp(min=0.0)
    middle = (largest + 1) / 2
    scale = torch.maximum(-minimum, maximum) / (middle - 1) if symmetric else (maximum - minimum) / largest
    scale = torch.where(scale > torch.finfo(torch.float32).tiny, scale, torch.ones_like(scale))
    zero_point = middle if symmetric else (-minimum / scale).round_().clamp_(min=0.0).minimum(largest)
    has_signs = largest == 1
    return torch.where(has_signs, 1.0, scale), torch.where(has_signs, 1.0, zero_point)


def fake_quantize(x: Tensor, grid: AffineGrid, clamp: tuple[float, float] = NO_CLAMP) -> Tensor:
    """Round ``x`` to ``grid``; the gradient passes where nothing was clipped (straight-through).

    The forward is ``scale * clip(round(x / scale), low, high)`` with ties to even (Jacob et al. 2018,
    arXiv:1712.05877, eq. 12); the straight-through gradient is that of Bengio et al. 2013 (arXiv:1308.3432).

    Args:
        x: Floating-point tensor of any shape.
        grid: Where to round to.
        clamp: Bounds of the activation that this rounding takes over, such as ``(0.0, inf)`` for a ReLU.

    Returns:
        Tensor like ``x``.

    Example:
        >>> fake_quantize(torch.tensor([-1.0, 0.2, 0.3, 9.0]), AffineGrid(scale=0.5, zero_point=1, bits=2))
        tensor([-0.5000,  0.0000,  0.5000,  1.0000])
    """
    return _FakeQuantize.apply(x, grid, clamp)  # type: ignore[no-any-return]


def fake_quantize_(x: Tensor, grid: AffineGrid, clamp: tuple[float, float] = NO_CLAMP) -> Tensor:
    """Round ``x`` to ``grid`` in its own memory; for values that no backward pass needs unrounded.

    The mask of the gradient is read off the result, so that no second tensor is kept: the gradient is also zero where
    a value was rounded to a bound without being clipped. Use it at 8 bits, where such values are few.

    Args:
        x: Floating-point tensor that is not a leaf, and that its producer did not save for its own backward.
        grid: Where to round to.
        clamp: Bounds of the activation that this rounding takes over.

    Returns:
        ``x`` itself.

    Example:
        >>> x = torch.tensor([-1.0, 0.2, 0.3, 9.0])
        >>> fake_quantize_(x, AffineGrid(scale=0.5, zero_point=1, bits=2)) is x, x[3].item()
        (True, 1.0)
    """
    return _FakeQuantizeInPlace.apply(x, grid, clamp)  # type: ignore[no-any-return]


def fake_quantize_traced(
    x: Tensor, scale: Tensor, zero_point: Tensor, largest: int, clamp: tuple[float, float] = NO_CLAMP
) -> Tensor:
    """Round ``x`` as `fake_quantize` does, to a grid given as tensors, in operations that a compiler fuses.

    The native `torch.fake_quantize_per_tensor_affine` stays a call of its own in compiled code.

    Args:
        x: Floating-point tensor of any shape.
        scale: Scale of the grid, 0-d.
        zero_point: Zero point of the grid, 0-d.
        largest: The largest integer of the grid.
        clamp: Bounds of the activation that this rounding takes over, such as ``(0.0, inf)`` for a ReLU.

    Returns:
        Tensor like ``x``.

    Example:
        >>> fake_quantize_traced(torch.tensor([-1.0, 0.2, 0.3, 9.0]), torch.tensor(0.5), torch.tensor(1), largest=3)
        tensor([-0.5000,  0.0000,  0.5000,  1.0000])
    """
    return _FakeQuantizeTraced.apply(x, scale, zero_point, largest, clamp)  # type: ignore[no-any-return]


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: AffineGrid, clamp: tuple[float, float]) -> Tensor:
        low, high = grid.bounds(clamp)
        ctx.save_for_backward(x)
        ctx.bounds = (
            max((low - 0.5) * grid.scale, clamp[0]),
            min((high + 0.5) * grid.scale, clamp[1]),
        )
        rounded = (x.float() / grid.scale).round_().clamp_(low, high).mul_(grid.scale)
        return rounded.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(gradients[0], x, *ctx.bounds), None, None


class _FakeQuantizeInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: AffineGrid, clamp: tuple[float, float]) -> Tensor:
        low, high = grid.bounds(clamp)
        ctx.mark_dirty(x)
        # Division, not multiplication by the reciprocal: runtimes divide, and the two differ at ties.
        x.div_(grid.scale).round_().clamp_(low, high).mul_(grid.scale)
        ctx.save_for_backward(x)
        ctx.bounds = (low * grid.scale, high * grid.scale)
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (rounded,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(gradients[0], rounded, *ctx.bounds), None, None


class _FakeQuantizeTraced(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, largest: int, clamp: tuple[float, float]
    ) -> Tensor:
        low, high = -zero_point.float(), largest - zero_point.float()
        if clamp[0] > -math.inf:
            low = torch.maximum(low, torch.round(clamp[0] / scale))
        if clamp[1] < math.inf:
            high = torch.minimum(high, torch.round(clamp[1] / scale))
        rounded = torch.minimum(torch.maximum(torch.round(x.float() / scale), low), high) * scale
        ctx.save_for_backward(x, ((low - 0.5) * scale).clamp(min=clamp[0]), ((high + 0.5) * scale).clamp(max=clamp[1]))
        return rounded.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        x, least, greatest = ctx.saved_tensors
        return gradients[0] * ((x > least) & (x < greatest)), None, None, None, None


def weight_scales(weight: Tensor, bits: int) -> Tensor:
    """Return the symmetric scale of every output channel, ``max|w| / (2**(bits - 1) - 1)``.

    Args:
        weight: Weight whose first dimension counts the output channels.
        bits: Bits of a weight, 2 to 8.

    Returns:
        Float32 tensor of shape (output channels,). A channel of zeros gets scale 1.

    Example:
        >>> weight_scales(torch.tensor([[1.27, -0.5], [0.0, 0.0]]), bits=8)
        tensor([0.0100, 1.0000])
    """
    rows = weight.detach().float().flatten(1)
    if rows.device.type == "cpu":
        # On a CPU torch runs `vector_norm` and `aminmax` element by element, these two with vector instructions.
        largest = torch.maximum(rows.amax(1), -rows.amin(1))
    else:
        largest = torch.linalg.vector_norm(rows, ord=math.inf, dim=1)
    scales = largest / (2 ** (bits - 1) - 1)
    return torch.where(scales > torch.finfo(torch.float32).tiny, scales, torch.ones_like(scales))


def integer_weight(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return ``weight`` as integers in ``[-(2**(bits - 1) - 1), 2**(bits - 1) - 1]`` with its scales.

    Args:
        weight: Weight whose first dimension counts the output channels.
        bits: Bits of a weight, 2 to 8.

    Returns:
        Integers as int8, shaped like ``weight``, and one float32 scale an output channel.

    Example:
        >>> integers, scales = integer_weight(torch.tensor([[1.27, -0.5]]), bits=8)
        >>> integers.tolist(), scales.tolist()
        ([[127, -50]], [0.009999999776482582])
    """
    scales = weight_scales(weight, bits)
    return (weight.detach().float() / _along_channels(scales, weight)).round_().to(torch.int8), scales


def fake_quantize_weight(weight: Tensor, bits: int, memory: KeptMemory | None = None) -> Tensor:
    """Round every output channel of ``weight`` to its symmetric grid; the gradient is passed on unchanged.

    Nothing is ever clipped, since the largest weight of a channel defines its grid, so the straight-through gradient
    needs no mask.

    Args:
        weight: Weight whose first dimension counts the output channels.
        bits: Bits of a weight, 2 to 8.
        memory: Where a float32 result is laid while gradients are recorded; by default in memory of its own.

    Returns:
        Tensor like ``weight``.

    Example:
        >>> fake_quantize_weight(torch.tensor([[3.0, -1.1, 0.4]]), bits=3)
        tensor([[ 3., -1.,  0.]])
    """
    # Without gradients several threads may compute with one network, and a compiled graph plans its own memory.
    keeps = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return _FakeQuantizeWeight.apply(weight, bits, memory if keeps else None)  # type: ignore[no-any-return]


class _FakeQuantizeWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, bits: int, memory: KeptMemory | None) -> Tensor:
        scales = _along_channels(weight_scales(weight, bits), weight)
        if memory is None or weight.dtype != torch.float32:
            return (weight.float() / scales).round_().mul_(scales).to(weight.dtype)
        return torch.div(weight, scales, out=memory.like(weight)).round_().mul_(scales)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0], None, None


def _along_channels(scales: Tensor, weight: Tensor) -> Tensor:
    return scales.view(-1, *[1] * (weight.dim() - 1))
