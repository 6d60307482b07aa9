"""Scales of the least squared error: the step of a symmetric grid that rounds a row of values best."""

from __future__ import annotations

import torch
from torch import Tensor

START_SHARES = (1.0, 0.8, 0.6, 0.45, 0.3, 0.2)
"""Shares of the full range from which a scale of least squared error is sought."""

N_REFINEMENTS = 3
"""How often the best of them is refined."""


def least_squares_scales(weight: Tensor, bits: int) -> Tensor:
    """Return the symmetric scale of every output channel that rounds it with about the least squared error.

    Args:
        weight: Weight whose first dimension counts the output channels.
        bits: Bits of a weight, 2 to 8.

    Returns:
        Float32 tensor of shape (output channels,). A channel of zeros gets scale 1.

    Example:
        >>> least_squares_scales(torch.tensor([[1.0, -1.0, 1.0, 1.4]]), bits=2)
        tensor([1.1000])
    """
    return least_squares_steps(weight.detach().float().flatten(1), torch.tensor(2.0 ** (bits - 1) - 1))


def least_squares_steps(rows: Tensor, largest: Tensor, *, refines: bool = True) -> Tensor:
    """Return the step of every row whose multiples are nearest to its values, about, in squared error.

    Given the integers ``q``, the best step is ``<w, q> / <q, q>``; given the step, rounding finds the best integers
    (Hubara et al. and others alternate the two). From some shares of the full range, the best is refined this way.

    Args:
        rows: Float32 values of shape (rows, n).
        largest: The largest integer, at least 1: a scalar, or one for every column.
        refines: Whether to look for it; else the step is the least that clips nothing.

    Returns:
        Float32 tensor of shape (rows,). A row of zeros gets step 1.

    Example:
        >>> least_squares_steps(torch.tensor([[1.0, 4.0]]), torch.tensor([1.0, 2.0]), refines=False)
        tensor([2.])
    """
    largest = largest.to(rows.device)
    full = (rows.abs() / largest).amax(1)
    full = torch.where(full > torch.finfo(torch.float32).tiny, full, torch.ones_like(full))
    if not refines:
        return full
    best, least = full, torch.full_like(full, torch.inf)
    for share in START_SHARES:
        scales = _refined(rows, full * share, largest)
        error = (_codes(rows, scales, largest) * scales[:, None] - rows).square_().sum(1)
        best, least = torch.where(error < least, scales, best), torch.minimum(error, least)
    for _ in range(N_REFINEMENTS):
        best = _refined(rows, best, largest)
    return best


def _refined(rows: Tensor, scales: Tensor, largest: Tensor) -> Tensor:
    codes = _codes(rows, scales, largest)
    refined = (rows * codes).sum(1) / codes.square().sum(1)
    return torch.where(refined > torch.finfo(torch.float32).tiny, refined, scales)


def _codes(rows: Tensor, scales: Tensor, largest: Tensor) -> Tensor:
    return torch.minimum(torch.maximum((rows / scales[:, None]).round_(), -largest), largest)
