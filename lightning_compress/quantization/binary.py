"""Signs: of weights, with one magnitude for each output channel, and of activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_compress.quantization.affine import NO_CLAMP, AffineGrid

SIGNS = AffineGrid(scale=1.0, zero_point=1, bits=1)
"""The grid of binary activations."""

LARGEST_LATENT = 1.0
"""Where the weights behind the signs end: further out, nothing would ever bring the sign back."""


def binary_scales(weight: Tensor) -> Tensor:
    """Return the mean magnitude of every output channel's weights, which is the best scale of their signs.

    Source: Rastegari et al. 2016, "XNOR-Net", section 3.1, arXiv:1603.05279. Zeros, as of pruned weights, stay zeros
    and do not count.

    Args:
        weight: Weight whose first dimension counts the output channels.

    Returns:
        Float32 tensor of shape (output channels,). A channel of zeros gets scale 1.

    Example:
        >>> binary_scales(torch.tensor([[0.5, -1.5, 0.0], [0.0, 0.0, 0.0]]))
        tensor([1., 1.])
    """
    magnitudes = weight.detach().float().flatten(1).abs()
    counts = (magnitudes > 0).sum(1)
    return torch.where(counts > 0, magnitudes.sum(1) / counts.clamp_min(1), torch.ones_like(magnitudes[:, 0]))


def binary_weight(weight: Tensor) -> Tensor:
    """Return the signs of ``weight`` times `binary_scales`; the gradient passes where a weight lies within [-1, 1].

    Source of the gradient: Courbariaux et al. 2016, "Binarized neural networks", equation 4, arXiv:1602.02830.

    Args:
        weight: Weight whose first dimension counts the output channels.

    Example:
        >>> weight = torch.tensor([[0.5, -1.5]], requires_grad=True)
        >>> rounded = binary_weight(weight)
        >>> rounded.sum().backward()
        >>> rounded.tolist(), weight.grad.tolist()
        ([[1.0, -1.0]], [[1.0, 0.0]])
    """
    return _BinaryWeight.apply(weight)  # type: ignore[no-any-return]


def binary_activation(x: Tensor, clamp: tuple[float, float] = NO_CLAMP) -> Tensor:
    """Return the signs of ``x``; the gradient passes where it lies within [-1, 1] and within ``clamp``.

    Source: Courbariaux et al. 2016, "Binarized neural networks", equations 1 and 4, arXiv:1602.02830; what is zero, as
    a channel that was removed, stays zero.

    Args:
        x: Floating-point tensor of any shape.
        clamp: Bounds of the activation that this rounding takes over: behind a ReLU the signs are 0 and 1.

    Example:
        >>> x = torch.tensor([-3.0, -0.5, 0.0, 0.5], requires_grad=True)
        >>> signs = binary_activation(x)
        >>> signs.sum().backward()
        >>> signs.tolist(), x.grad.tolist(), binary_activation(x, clamp=(0.0, 6.0)).tolist()
        ([-1.0, -1.0, 0.0, 1.0], [0.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0])
    """
    return _BinaryActivation.apply(x, clamp)  # type: ignore[no-any-return]


class _BinaryActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, clamp: tuple[float, float]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bounds = max(-LARGEST_LATENT, clamp[0]), min(LARGEST_LATENT, clamp[1])
        return (x.float() / SIGNS.step).round_().clamp_(*SIGNS.bounds(clamp)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(gradients[0], x, *ctx.bounds), None


class _BinaryWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        scales = binary_scales(weight).view(-1, *[1] * (weight.dim() - 1))
        return (weight.sign().float() * scales).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (weight,) = ctx.saved_tensors
        passes: Tensor = weight.abs() <= LARGEST_LATENT
        return gradients[0] * passes
