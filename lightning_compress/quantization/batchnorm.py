"""Batch norm: folded into integer weights without changing them, and frozen."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lightning_compress.quantization.roles import NORMS

INT32_LIMIT = 2**31 - 1
"""The largest integer of a bias."""


def fold_batchnorm(
    integers: Tensor, scales: Tensor, bias: Tensor | None, norm: nn.Module
) -> tuple[Tensor, Tensor, Tensor]:
    """Fold a batch norm, as it computes in eval mode, into the layer before it.

    With one symmetric scale an output channel, ``gamma / sqrt(variance + eps)`` only multiplies the scale of its
    channel: the integers stay what they were, and change sign where gamma is negative, which a symmetric range
    allows. Where gamma is zero, so is the scale.

    Args:
        integers: Integer weight, shape (out, ...), in a symmetric range.
        scales: Scale of each output channel, shape (out,).
        bias: Bias of the layer, shape (out,), or None.
        norm: The batch norm after it, over the output channels, with running statistics.

    Returns:
        Integers, scales and bias of the layer that gives what both gave.

    Example:
        >>> norm = nn.BatchNorm1d(2, eps=0.0).eval()
        >>> norm.weight.data, norm.bias.data = torch.tensor([-2.0, 0.0]), torch.tensor([0.5, 3.0])
        >>> fold_batchnorm(torch.tensor([[3], [4]]), torch.tensor([0.1, 0.1]), None, norm)
        (tensor([[-3], [ 4]]), tensor([0.2000, 0.0000]), tensor([0.5000, 3.0000]))
    """
    # In float64, so that the folded layer is as near to the two as float32 can be.
    with torch.no_grad():
        factor, offset = norm_factor_and_offset(norm, torch.float64)
    if bias is not None:
        offset = offset + bias.detach() * factor
    signs = torch.where(factor < 0, -1, 1).to(integers.dtype)
    return (
        integers * signs.view(-1, *[1] * (integers.dim() - 1)),
        (scales.double() * factor.abs()).float(),
        offset.float(),
    )


def norm_factor_and_offset(norm: nn.Module, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return what a batch norm does in eval mode as ``factor * x + offset``; gradients reach gamma and beta.

    Args:
        norm: A batch norm with running statistics.
        dtype: Precision to compute in.

    Returns:
        Factor and offset, shape (channels,).

    Example:
        >>> norm = nn.BatchNorm1d(1, eps=0.0)
        >>> norm.running_mean[0], norm.running_var[0] = 3.0, 4.0
        >>> factor, offset = norm_factor_and_offset(norm)
        >>> factor.item(), offset.item()
        (0.5, -1.5)
    """
    mean, variance = norm.running_mean, norm.running_var
    assert isinstance(mean, Tensor)
    assert isinstance(variance, Tensor)
    eps = norm.eps
    assert isinstance(eps, float)
    factor = torch.rsqrt(variance.to(dtype) + eps)
    if isinstance(norm.weight, Tensor):
        factor = factor * norm.weight.to(dtype)
    offset = -mean.to(dtype) * factor
    if isinstance(norm.bias, Tensor):
        offset = offset + norm.bias.to(dtype)
    return factor, offset


def freeze_batchnorm_(model: nn.Module) -> list[nn.Module]:
    """Let the batch norms of ``model`` use and keep their running statistics, also while it trains.

    Norms without running statistics stay as they are.

    Args:
        model: Any module.

    Returns:
        The norms that were training before; ``norm.train()`` undoes it for each.

    Example:
        >>> net = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
        >>> [type(norm).__name__ for norm in freeze_batchnorm_(net)]
        ['BatchNorm1d']
        >>> net[0].training, net[1].training
        (True, False)
    """
    trained: list[nn.Module] = [
        module
        for module in model.modules()
        if isinstance(module, NORMS) and module.running_mean is not None and module.training
    ]
    for module in trained:
        module.eval()
    return trained


def running_statistics(norms: Iterable[nn.Module]) -> list[Tensor]:
    """Return the running means and variances of ``norms``, the tensors themselves.

    Example:
        >>> running_statistics([nn.BatchNorm1d(1)])
        [tensor([0.]), tensor([1.])]
    """
    statistics = [statistic for norm in norms for statistic in (norm.running_mean, norm.running_var)]
    return [statistic for statistic in statistics if isinstance(statistic, Tensor)]
