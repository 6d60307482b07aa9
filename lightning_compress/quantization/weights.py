"""Rounding of one weight: the scales of its output channels, and the integers that ship."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from lightning_compress.quantization.affine import fake_quantize_weight, integer_weight, weight_scales
from lightning_compress.quantization.kept_memory import KeptMemory


@dataclass
class WeightQuantizer:
    """Rounds a weight to symmetric integers, one scale an output channel.

    Args:
        bits: Bits of a weight, 2 to 8.
        axis: Dimension of the output channels: 0, or 1 for transposed convolutions.
        memory: Where the rounded weight is laid.

    Example:
        >>> import torch
        >>> quantizer = WeightQuantizer(bits=3)
        >>> quantizer.rounded(torch.tensor([[3.0, -1.1, 0.4]]))
        tensor([[ 3., -1.,  0.]])
    """

    bits: int
    axis: int = 0
    memory: KeptMemory = field(default_factory=KeptMemory, repr=False, compare=False)

    def scales(self, weight: Tensor) -> Tensor:
        """Return the scale of every output channel, float32 of shape (channels,)."""
        return weight_scales(self._channels_first(weight), self.bits)

    def rounded(self, weight: Tensor) -> Tensor:
        """Return ``weight`` on its grid; gradients pass straight through."""
        if self.axis == 0:
            return fake_quantize_weight(weight, self.bits, self.memory)
        return fake_quantize_weight(weight.transpose(0, self.axis), self.bits, self.memory).transpose(0, self.axis)

    def integers(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``weight`` as int8, output channels first, and the scale of every output channel."""
        return integer_weight(self._channels_first(weight), self.bits)

    def _channels_first(self, weight: Tensor) -> Tensor:
        return weight if self.axis == 0 else weight.transpose(0, self.axis)


def along_axis(vector: Tensor, weight: Tensor, axis: int) -> Tensor:
    """Return ``vector``, of one value an output channel, in a shape that multiplies ``weight`` along ``axis``.

    Example:
        >>> import torch
        >>> along_axis(torch.ones(3), torch.ones(2, 3, 5), 1).shape
        torch.Size([1, 3, 1])
    """
    return vector.view(*[1] * axis, -1, *[1] * (weight.dim() - axis - 1))
