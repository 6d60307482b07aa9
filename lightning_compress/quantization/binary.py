"""Binary weights: the sign of every weight, and one magnitude for each output channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
