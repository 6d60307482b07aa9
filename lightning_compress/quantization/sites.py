"""Sites: the places in a forward where values are rounded, and the attention between four of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.graph import attention
from lightning_compress.quantization.affine import (
    NO_CLAMP,
    fake_quantize,
    fake_quantize_,
    fake_quantize_traced,
)
from lightning_compress.quantization.binary import binary_activation
from lightning_compress.quantization.step_sizes import quantize_with_step

if TYPE_CHECKING:
    from lightning_compress.quantization.state import Quantization


class QuantizerSite:
    """One place in a forward where a value is rounded.

    Args:
        state: The state of the whole model.
        index: Index of the quantizer among the state's ranges.
        clamp: Bounds of the activation that the rounding takes over.
        in_place: Whether the value's own memory may be overwritten.
        producer: The layer whose result the value is, if any: forward hooks on it may have kept it.
        activation: The module that the rounding takes over, if any: it is called where hooks wait for it.
        is_constant: Whether the value comes from parameters and buffers alone: its range is its own, not an average.
    """

    def __init__(
        self,
        state: Quantization,
        index: int,
        clamp: tuple[float, float],
        in_place: bool,
        producer: nn.Module | None = None,
        activation: nn.Module | None = None,
        is_constant: bool = False,
    ) -> None:
        self.state = state
        self.index = index
        self.clamp = clamp
        self.in_place = in_place
        self.producer = producer
        self.activation = activation
        self.is_constant = is_constant

    def __call__(self, x: Any) -> Any:
        """Round ``x``, or only watch it before quantization starts; what is empty or no float tensor passes."""
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.numel() == 0:
            return x
        state = self.state
        if self.activation is not None and has_hooks(self.activation):
            x = self.activation(x)
        if state.is_observing and not self.is_constant:
            self._observe(x)
        if not state.is_quantizing:
            return x.clamp(*self.clamp) if self.clamp != NO_CLAMP else x
        if state.ranges.bits[self.index] == 1:
            rounded = self._signs(x)
        elif self.is_constant:
            rounded = self._round_constant(x)
        elif self.index in state.ranges.learned:
            rounded = self._round_with_step(x)
        elif torch.compiler.is_compiling() or x.device.type != "cpu":
            rounded = self._round_with_tensors(x)
        else:
            rounded = self._round(x)
        if state.recorded is not None:
            state.recorded.append((state.ranges.names[self.index], rounded.detach()))
        return rounded

    def _observe(self, x: Tensor) -> None:
        ranges = self.state.ranges
        if self.index not in ranges.learned:  # a learned step size needs no range
            ranges.observe(self.index, *self._range(x))

    def _range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.state.ranges.methods[self.index] != "minmax" and self.clamp != NO_CLAMP:
            return self.state.ranges.estimate(self.index, x.detach().clamp(*self.clamp))
        minimum, maximum = self.state.ranges.estimate(self.index, x)
        return minimum.clamp(*self.clamp), maximum.clamp(*self.clamp)

    def _round(self, x: Tensor) -> Tensor:
        ranges = self.state.ranges
        grid = ranges.grid(self.index)
        if grid is None:
            if not self.state.is_observing:
                return x.clamp(*self.clamp) if self.clamp != NO_CLAMP else x
            grid = ranges.start_from(self.index, *self._range(x))
        # Reading the gradient's mask off the result is only fair where few values lie on a bound: at 8 bits.
        if self._may_overwrite(x) and grid.bits == 8:
            return fake_quantize_(x, grid, self.clamp)
        return fake_quantize(x, grid, self.clamp)

    def _round_constant(self, x: Tensor) -> Tensor:
        ranges = self.state.ranges
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            ranges.pin(self.index, x)
            return self._round(x)
        return self._on_grid(x, *ranges.parameters_over(self.index, *torch.aminmax(x.detach())))

    def _signs(self, x: Tensor) -> Tensor:
        if not (self.is_constant or self.state.is_observing or self.state.ranges.is_seen(self.index)):
            return x.clamp(*self.clamp) if self.clamp != NO_CLAMP else x
        return binary_activation(x, self.clamp)

    def _may_overwrite(self, x: Tensor) -> bool:
        is_kept = any(module is not None and has_hooks(module) for module in (self.producer, self.activation))
        return self.in_place and not is_kept and x.dtype == torch.float32 and not (x.is_leaf and x.requires_grad)

    def _round_with_tensors(self, x: Tensor) -> Tensor:
        ranges = self.state.ranges
        if ranges.is_seen(self.index):
            scale, zero_point = ranges.parameters(self.index)
            return self._on_grid(x, scale.to(x.device), zero_point.to(x.device))
        if self.state.is_observing:
            return self._on_grid(x, *ranges.parameters_over(self.index, *self._range(x)))
        return x.clamp(*self.clamp) if self.clamp != NO_CLAMP else x

    def _on_grid(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        largest = 2 ** self.state.ranges.bits[self.index] - 1
        if torch.compiler.is_compiling():
            return fake_quantize_traced(x, scale, zero_point, largest, self.clamp)
        clamped = x.clamp(*self.clamp) if self.clamp != NO_CLAMP else x
        return torch.fake_quantize_per_tensor_affine(clamped.float(), scale, zero_point, 0, largest).to(x.dtype)

    def _round_with_step(self, x: Tensor) -> Tensor:
        grid = self.state.ranges.learned[self.index]
        # A ReLU is the lower end of a grid that begins at zero; other bounds clip before.
        is_lower_end = self.clamp == (0.0, math.inf) and grid.zero_point == 0
        clipped = x if self.clamp == NO_CLAMP or is_lower_end else x.clamp(*self.clamp)
        return quantize_with_step(clipped, grid.step.to(x.device), *grid.bounds)


class AttentionSites:
    """`torch.nn.functional.scaled_dot_product_attention` with the operands of both matrix products rounded.

    Args:
        state: The state of the whole model.
        sites: The sites of ``query``, ``key``, ``probabilities`` and ``value``.
    """

    def __init__(self, state: Quantization, sites: dict[str, QuantizerSite]) -> None:
        self.state = state
        self.sites = sites

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the attention; as torch does until quantization starts."""
        if self.state.is_quantizing:
            return attention(*args, **kwargs, on=self._round)
        if self.state.is_observing:
            with torch.no_grad():
                attention(*args[:4], **{**_by_name(args), **kwargs, "dropout_p": 0.0}, on=self._round)
        return F.scaled_dot_product_attention(*args, **kwargs)

    def _round(self, name: str, value: Tensor) -> Tensor:
        return self.sites[name](value)  # type: ignore[no-any-return]


def _by_name(args: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(("dropout_p", "is_causal"), args[4:], strict=False))


def has_hooks(module: nn.Module) -> bool:
    """Tell whether forward hooks wait for ``module``.

    Example:
        >>> has_hooks(nn.ReLU())
        False
    """
    return bool(module._forward_hooks or module._forward_pre_hooks)
