"""Rounding of one weight: the scales of its output channels, and the integers that ship."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_compress.quantization.affine import fake_quantize_weight, integer_weight, weight_scales
from lightning_compress.quantization.binary import binary_scales, binary_weight
from lightning_compress.quantization.coefficients import CoefficientQuantizer
from lightning_compress.quantization.estimators import RangeMethod
from lightning_compress.quantization.kept_memory import KeptMemory
from lightning_compress.quantization.scales import least_squares_scales
from lightning_compress.quantization.step_sizes import quantize_with_step


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
        coefficients: Rounds the weight to ``bits`` in its frequencies, where it has any, instead of as it is. Then
            what comes out lies on a grid of ``integer_bits``, by its extremes.
        integer_bits: Bits of the integers that compute, where coefficients are rounded.

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
    coefficients: CoefficientQuantizer | None = None
    integer_bits: int = 8

    @property
    def largest(self) -> int:
        """The largest integer; the least is its negative."""
        return max(int(2 ** (self.bits - 1) - 1), 1)

    def scales(self, weight: Tensor) -> Tensor:
        """Return the scale of every output channel, float32 of shape (channels,)."""
        if self.bits == 1:
            return binary_scales(self._channels_first(weight))
        coded = self._coded(weight)
        if coded is not None:
            return weight_scales(coded, self.integer_bits)
        if self.step is not None:
            return self.step.detach().to(weight.device)
        if self.method in ("mse", "learned"):
            return least_squares_scales(self._channels_first(weight), self.bits)
        return weight_scales(self._channels_first(weight), self.bits)

    def first_step(self, weight: Tensor) -> Tensor:
        """Return the scales that learning begins with, float32 of shape (channels,): of coefficients, if there are."""
        coefficients = self.coefficients_of(weight)
        if coefficients is None:
            return self.scales(weight)
        return coefficients.step(self._channels_first(weight), covers=self.method not in ("mse", "learned"))

    def rounded(self, weight: Tensor) -> Tensor:
        """Return ``weight`` on its grid; gradients pass straight through, and reach the learned scales."""
        channels_first = self._channels_first(weight)
        if self.bits == 1:
            result = binary_weight(channels_first)
        elif (coefficients := self.coefficients_of(weight)) is not None:
            coded = coefficients.rounded(channels_first, self.coefficient_step(weight))
            result = fake_quantize_weight(coded, self.integer_bits, self.memory).to(weight.dtype)
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
        coded = self._coded(weight)
        if coded is not None:
            return integer_weight(coded, self.integer_bits)
        if self.step is None and self.method not in ("mse", "learned"):
            return integer_weight(self._channels_first(weight), self.bits)
        scales, rows = self.scales(weight), self._channels_first(weight).detach().float()
        ratio = rows / scales.view(-1, *[1] * (rows.dim() - 1))
        return ratio.round_().clamp_(-self.largest, self.largest).to(torch.int8), scales

    def coefficients_of(self, weight: Tensor) -> CoefficientQuantizer | None:
        """Return what rounds the coefficients of a weight, or None where it is rounded as it is."""
        if self.coefficients is None or not self.coefficients.applies_to(self._channels_first(weight).shape):
            return None
        return self.coefficients

    def coefficient_step(self, weight: Tensor) -> Tensor:
        """Return the step of the coefficients of every output channel, learned or found."""
        return self.first_step(weight) if self.step is None else self.step.to(weight.device)

    def forget(self) -> None:
        """Forget what was learned and found."""
        self.step = None
        if self.coefficients is not None:
            self.coefficients.load_state_dict({})

    def coefficient_state(self) -> dict[str, Any]:
        """Return what was found for the coefficients, as CPU tensors; empty where there are none."""
        return {} if self.coefficients is None else self.coefficients.state_dict()

    def load_coefficients(self, state: Mapping[str, Any]) -> None:
        """Take over a `coefficient_state`."""
        assert self.coefficients is not None
        self.coefficients.load_state_dict(state)

    @torch.no_grad()
    def _coded(self, weight: Tensor) -> Tensor | None:
        """Return the weight from its rounded coefficients, output channels first, or None where it has none."""
        coefficients = self.coefficients_of(weight)
        if coefficients is None:
            return None
        return coefficients.rounded(self._channels_first(weight.detach()), self.coefficient_step(weight))

    def _channels_first(self, weight: Tensor) -> Tensor:
        return weight if self.axis == 0 else weight.transpose(0, self.axis)


def along_axis(vector: Tensor, weight: Tensor, axis: int) -> Tensor:
    """Return ``vector``, of one value an output channel, in a shape that multiplies ``weight`` along ``axis``.

    Example:
        >>> along_axis(torch.ones(3), torch.ones(2, 3, 5), 1).shape
        torch.Size([1, 3, 1])
    """
    return vector.view(*[1] * axis, -1, *[1] * (weight.dim() - axis - 1))
