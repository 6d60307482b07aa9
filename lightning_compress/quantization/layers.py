"""Layers on rounded weights: convolutions and linear layers, as modules and as functions, and batch norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_compress.graph import StandIn
from lightning_compress.quantization.batchnorm import INT32_LIMIT, norm_factor_and_offset
from lightning_compress.quantization.sites import QuantizerSite
from lightning_compress.quantization.weights import along_axis
from lightning_compress.selection import TRANSPOSED_LAYERS

if TYPE_CHECKING:
    from lightning_compress.quantization.state import Quantization

SCALE_LIMIT = 127
"""The integer that stands for the factor of a batch norm on its own."""


class RoundedWeight:
    """Weight and bias of one layer as the layer that ships has them.

    Where a batch norm follows and computes with its running statistics, the layer takes it over, so that what is
    evaluated, and trained once the statistics are frozen, is the layer that ships: one layer with an integer bias.

    Args:
        state: The state of the whole model; its ``weights`` hold the quantizer.
        name: Name of the weight.
        norm: The batch norm that folds into the layer, or None.
        input_index: Index of the one quantizer whose grid the layer's input lies on, or None.
    """

    def __init__(self, state: Quantization, name: str, norm: nn.Module | None, input_index: int | None) -> None:
        self.state = state
        self.name = name
        self.norm = norm
        self.input_index = input_index

    def __call__(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias to compute with."""
        quantizer = self.state.weights[self.name]
        if self.state.is_learning and quantizer.step is None and torch.is_grad_enabled():
            self.state.learn_weight(self.name, weight)  # a weight that only its call knows
        rounded = quantizer.rounded(weight)
        folds = self.norm is not None and not self.norm.training
        if not folds and bias is None:
            return rounded, None
        scales = quantizer.scales(weight)
        if self.norm is not None and folds:
            factor, offset = norm_factor_and_offset(self.norm)
            rounded = rounded * along_axis(factor.to(rounded.dtype), rounded, quantizer.axis)
            scales = scales * factor.detach().abs()
            bias = offset if bias is None else offset + bias * factor
            return rounded, rounded_bias(self.state, self.input_index, bias, scales).to(rounded.dtype)
        # A batch norm that still learns its statistics takes up the bias and its rounding; only a last bias shows.
        if bias is None or self.norm is not None or scales.shape != bias.shape:
            return rounded, bias
        return rounded, rounded_bias(self.state, self.input_index, bias, scales).to(rounded.dtype)


def rounded_bias(state: Quantization, input_index: int | None, bias: Tensor, scales: Tensor) -> Tensor:
    """Round ``bias`` to the 32-bit integers that ship; the gradient passes (straight-through).

    Args:
        state: The state of the whole model.
        input_index: Index of the quantizer whose grid the layer's input lies on; None leaves the bias in float.
        bias: Bias, shape (channels,).
        scales: Scale of the weight of each channel, shape (channels,).

    Returns:
        Tensor like ``bias``.
    """
    if input_index is None or not state.ranges.is_seen(input_index):
        return bias
    step = scales * state.ranges.parameters(input_index)[0].to(scales.device)
    fits = bias.detach().abs() < step * (INT32_LIMIT // 2)
    rounded = torch.where(fits, (bias.detach() / step).round() * step, bias.detach())
    return bias + (rounded - bias.detach())


class QuantizedLayerForward(StandIn):
    """The forward of a convolution or linear layer on rounded weights.

    Args:
        owner: The layer.
        state: The state of the whole model.
        weight: Its rounded weight.
        before: Place at its input; for layers that untraced code calls.
        after: Place at its output; likewise.
    """

    def __init__(
        self,
        owner: nn.Module,
        state: Quantization,
        weight: RoundedWeight,
        before: QuantizerSite | None = None,
        after: QuantizerSite | None = None,
    ) -> None:
        super().__init__(owner)
        self.state = state
        self.weight = weight
        self.before = before
        self.after = after

    def __call__(self, input: Tensor, *rest: Any) -> Tensor:
        """Run the layer; with its own weights until quantization starts."""
        state = self.state
        if not (state.is_quantizing or state.is_observing):
            return type(self.owner).forward(self.owner, input, *rest)  # type: ignore[no-any-return]
        x: Tensor = self.before(input) if self.before is not None else input
        weight, bias = self.owner.weight, self.owner.bias
        assert isinstance(weight, Tensor)
        assert bias is None or isinstance(bias, Tensor)
        parameters = self.weight(weight, bias) if state.is_quantizing else (weight, bias)
        result = layer_result(self.owner, x, *parameters, *rest)
        return self.after(result) if self.after is not None else result


class QuantizedCall:
    """A call of a function such as `torch.nn.functional.conv2d` on a rounded weight.

    Args:
        function: The function, of an input, a weight and perhaps a bias.
        state: The state of the whole model.
        weight: Its rounded weight.
    """

    def __init__(self, function: Callable[..., Any], state: Quantization, weight: RoundedWeight) -> None:
        self.function = function
        self.state = state
        self.weight = weight

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """Run the function; on the weight as it is until quantization starts."""
        if self.state.is_quantizing:
            weight, bias = self.weight(weight, bias)
        return self.function(input, weight, bias, *args, **kwargs)  # type: ignore[no-any-return]


class FoldedNormForward(StandIn):
    """The forward of a batch norm that folds: nothing, where the layer before it has taken it over.

    Args:
        owner: The batch norm.
        state: The state of the whole model.
    """

    def __init__(self, owner: nn.Module, state: Quantization) -> None:
        super().__init__(owner)
        self.state = state

    def __call__(self, input: Tensor) -> Tensor:
        """Run the norm, or pass ``input`` through."""
        if self.state.is_quantizing and not self.owner.training:
            return input
        return type(self.owner).forward(self.owner, input)  # type: ignore[no-any-return]


class ScaledNormForward(StandIn):
    """The forward of a batch norm that folds nowhere: with running statistics, a scale and an integer shift.

    The scale of a channel is an integer, 127 or -127, times ``|factor| / 127``: it ships without a loss.

    Args:
        owner: The batch norm.
        state: The state of the whole model.
        input_index: Index of the quantizer whose grid its input lies on, or None.
    """

    def __init__(self, owner: nn.Module, state: Quantization, input_index: int | None) -> None:
        super().__init__(owner)
        self.state = state
        self.input_index = input_index

    def __call__(self, input: Tensor) -> Tensor:
        """Run the norm as it was written, or as scale and shift."""
        if not self.state.is_quantizing or self.owner.training:
            return type(self.owner).forward(self.owner, input)  # type: ignore[no-any-return]
        factor, offset = norm_factor_and_offset(self.owner)
        offset = rounded_bias(self.state, self.input_index, offset, factor.detach().abs() / SCALE_LIMIT)
        shape = [1, -1, *[1] * (input.dim() - 2)]
        return input * factor.to(input.dtype).view(shape) + offset.to(input.dtype).view(shape)


def layer_result(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    """Run a convolution or linear layer on other weights than its own.

    Args:
        layer: A convolution, transposed convolution or linear layer.
        x: Its input.
        weight: Weight shaped like the layer's.
        bias: Bias shaped like the layer's, or None.
        rest: What else its forward takes: the output size of a transposed convolution.

    Returns:
        What the layer gives with these weights.

    Example:
        >>> layer_result(nn.Linear(2, 1), torch.ones(1, 2), torch.tensor([[1.0, 2.0]]), None)
        tensor([[3.]])
    """
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(x, weight, bias)
    if isinstance(layer, TRANSPOSED_LAYERS):
        return _transposed_result(layer, x, weight, bias, *rest)
    return layer._conv_forward(x, weight, bias)  # type: ignore[operator, no-any-return]


def _transposed_result(
    layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None, output_size: list[int] | None = None
) -> Tensor:
    n_dims = weight.dim() - 2
    padding = layer._output_padding(
        x, output_size, layer.stride, layer.padding, layer.kernel_size, n_dims, layer.dilation
    )
    functions = (nn.functional.conv_transpose1d, nn.functional.conv_transpose2d, nn.functional.conv_transpose3d)
    settings = (layer.stride, layer.padding, padding, layer.groups, layer.dilation)
    return functions[n_dims - 1](x, weight, bias, *settings)
