"""Rounding of one weight: the scales of its output channels, and the integers that ship."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_compress.quantization.affine import fake_quantize_weight, integer_weight, weight_scales
from lightning_compress.quantization.binary import binary_scales, binary_weight
from lightning_compress.quantization.estimators import RangeMethod
from lightning_compress.quantization.kept_memory import KeptMemory
from lightning_compress.quantization.step_sizes import quantize_with_step

START_SHARES = (1.0, 0.8, 0.6, 0.45, 0.3, 0.2)
"""Shares of the full range from which a scale of least squared error is sought."""

N_REFINEMENTS = 3
"""How often the best of them is refined."""


@dataclass
class WeightQuantizer:
    """Rounds a weight to symmetric integers, one scale an output channel.

    Args:
        bits: Bits of a weight, 1 to 8; with 1, weights are their signs times their mean magnitude.
        axis: Dimension of the output channels: 0, or 1 for transposed convolutions.
        method: How scales are found: by the largest weight, or by the least squared error where ``"mse"`` or
            ``"learned"``. ``"percentile"`` is for activations: weights have no outliers in it.
        step: The learned scales, shape (channels,), once they are learned; they take the place of ``method``.
        memory: Where the rounded weight is laid.

    Example:
        >>> quantizer = WeightQuantizer(bits=3)
        >>> quantizer.rounded(torch.tensor([[3.0, -1.1, 0.4]]))
        tensor([[ 3., -1.,  0.]])
    """

    bits: int
    axis: int = 0
    method: RangeMethod = "minmax"
    step: Tensor | None = None
    memory: KeptMemory = field(default_factory=KeptMemory, repr=False, compare=False)

    @property
    def largest(self) -> int:
        """The largest integer; the least is its negative."""
        return max(int(2 ** (self.bits - 1) - 1), 1)

    def scales(self, weight: Tensor) -> Tensor:
        """Return the scale of every output channel, float32 of shape (channels,)."""
        if self.bits == 1:
            return binary_scales(self._channels_first(weight))
        if self.step is not None:
            return self.step.detach().to(weight.device)
        if self.method in ("mse", "learned"):
            return least_squares_scales(self._channels_first(weight), self.bits)
        return weight_scales(self._channels_first(weight), self.bits)

    def rounded(self, weight: Tensor) -> Tensor:
        """Return ``weight`` on its grid; gradients pass straight through, and reach the learned scales."""
        channels_first = self._channels_first(weight)
        if self.bits == 1:
            result = binary_weight(channels_first)
        elif self.step is not None:
            result = quantize_with_step(channels_first, self.step.to(weight.device), -self.largest, self.largest)
        elif self.method in ("mse", "learned"):
            result = quantize_with_step(channels_first, self.scales(weight), -self.largest, self.largest)
        else:
            result = fake_quantize_weight(channels_first, self.bits, self.memory)
        return result if self.axis == 0 else result.transpose(0, self.axis)

    def integers(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``weight`` as int8, output channels first, and the scale of every output channel."""
        if self.bits == 1:
            return self._channels_first(weight).detach().sign().to(torch.int8), self.scales(weight)
        if self.step is None and self.method not in ("mse", "learned"):
            return integer_weight(self._channels_first(weight), self.bits)
        scales, rows = self.scales(weight), self._channels_first(weight).detach().float()
        ratio = rows / scales.view(-1, *[1] * (rows.dim() - 1))
        return ratio.round_().clamp_(-self.largest, self.largest).to(torch.int8), scales

    def _channels_first(self, weight: Tensor) -> Tensor:
        return weight if self.axis == 0 else weight.transpose(0, self.axis)


def least_squares_scales(weight: Tensor, bits: int) -> Tensor:
    """Return the symmetric scale of every output channel that rounds it with about the least squared error.

    Given the integers ``q``, the best scale is ``<w, q> / <q, q>``; given the scale, rounding finds the best integers
    (Hubara et al. and others alternate the two). From some shares of the full range, the best is refined this way.

    Args:
        weight: Weight whose first dimension counts the output channels.
        bits: Bits of a weight, 2 to 8.

    Returns:
        Float32 tensor of shape (output channels,). A channel of zeros gets scale 1.

    Example:
        >>> least_squares_scales(torch.tensor([[1.0, -1.0, 1.0, 1.4]]), bits=2)
        tensor([1.1000])
    """
    rows, largest = weight.detach().float().flatten(1), 2 ** (bits - 1) - 1
    full = weight_scales(weight, bits)
    best, least = full, torch.full_like(full, torch.inf)
    for share in START_SHARES:
        scales = _refined(rows, full * share, largest)
        error = (_codes(rows, scales, largest) * scales[:, None] - rows).square_().sum(1)
        best, least = torch.where(error < least, scales, best), torch.minimum(error, least)
    for _ in range(N_REFINEMENTS):
        best = _refined(rows, best, largest)
    return best


def _refined(rows: Tensor, scales: Tensor, largest: int) -> Tensor:
    codes = _codes(rows, scales, largest)
    refined = (rows * codes).sum(1) / codes.square().sum(1)
    return torch.where(refined > torch.finfo(torch.float32).tiny, refined, scales)


def _codes(rows: Tensor, scales: Tensor, largest: int) -> Tensor:
    return (rows / scales[:, None]).round_().clamp_(-largest, largest)


def along_axis(vector: Tensor, weight: Tensor, axis: int) -> Tensor:
    """Return ``vector``, of one value an output channel, in a shape that multiplies ``weight`` along ``axis``.

    Example:
        >>> along_axis(torch.ones(3), torch.ones(2, 3, 5), 1).shape
        torch.Size([1, 3, 1])
    """
    return vector.view(*[1] * axis, -1, *[1] * (weight.dim() - axis - 1))
