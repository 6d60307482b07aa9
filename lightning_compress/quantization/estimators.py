"""Range estimators: the range of values that a grid should cover, from one tensor."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_compress.quantization.affine import affine_parameters

RangeMethod = Literal["minmax", "percentile", "mse", "learned"]
"""How ranges are found: extremes, a percentile, the least squared error, or by gradient descent from the latter."""

RANGE_METHODS = ("minmax", "percentile", "mse", "learned")

PERCENTILE = 99.9
"""The percentile of the values, from below and from above, at which ``"percentile"`` cuts."""

MAX_SAMPLES = 8192
"""Values of a tensor that percentiles and squared errors are estimated from: every k-th, so always the same ones."""

N_CANDIDATES = 40
"""Ranges among which the one of least squared error is found: equal steps up to the full range."""


def estimate_range(x: Tensor, method: RangeMethod, bits: int, symmetric: bool = False) -> tuple[Tensor, Tensor]:
    """Return the range that the grid of ``x`` should cover.

    Args:
        x: Values, of any shape but not empty.
        method: ``"minmax"`` for the extremes; ``"percentile"`` for the `PERCENTILE`-th from both sides (McKinstry et
            al. 2018, arXiv:1809.04191); ``"mse"`` for the part of the full range whose grid rounds with the least
            squared error (Sung et al. 2015, arXiv:1511.06488); ``"learned"`` starts from the same.
        bits: Bits of the grid.
        symmetric: Whether the zero point lies in the middle of the grid.

    Returns:
        Least and greatest value, as float32 0-d tensors.

    Example:
        >>> x = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 2.0, 3.0, 4.2])
        >>> low, high = estimate_range(x, "mse", bits=2)
        >>> low.item(), round(high.item(), 3)
        (0.0, 3.36)
    """
    x = x.detach()
    if method == "minmax":
        minimum, maximum = torch.aminmax(x)
        return minimum, maximum
    sample = _sample(x)
    if method == "percentile":
        share = PERCENTILE / 100
        low, high = torch.quantile(sample, torch.tensor([1 - share, share], device=sample.device)).unbind()
        return low, high
    minimum, maximum = torch.aminmax(x)
    return _least_squares_range(sample, minimum.float(), maximum.float(), bits, symmetric)


def _sample(x: Tensor) -> Tensor:
    values = x.flatten().float()
    # A stride without common divisors with the usual numbers of channels and pixels meets all of them.
    stride = max(1, len(values) // MAX_SAMPLES)
    return values[:: stride + 1 - stride % 2] if stride > 1 else values


def _least_squares_range(
    sample: Tensor, minimum: Tensor, maximum: Tensor, bits: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    shares = torch.arange(1, N_CANDIDATES + 1, device=sample.device) / N_CANDIDATES
    lows, highs = minimum * shares, maximum * shares
    largest = torch.full_like(shares, 2**bits - 1)
    scales, zero_points = affine_parameters(lows, highs, largest, symmetric)
    scales, zero_points = scales[:, None], zero_points[:, None]
    rounded = (sample / scales).round_().maximum(-zero_points).minimum(largest[:, None] - zero_points).mul_(scales)
    best = (rounded - sample).square_().mean(1).argmin()
    return lows[best], highs[best]
