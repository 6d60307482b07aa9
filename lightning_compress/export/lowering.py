"""Lowering: a copy of a trained model in which every rounding is a quantize/dequantize pair and weights are integers.

The lowered form is what runtimes are given (design: one lowered form, many runtimes). It computes what the
fake-quantized model computes in eval mode, with `torch.ops.quantized_decomposed` around real integer buffers.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lightning_compress.copying import copy_of
from lightning_compress.export.products import matrix_product
from lightning_compress.graph import (
    CallKey,
    Trace,
    attention,
    call_arguments,
    call_key,
    forward_signature,
    is_in_place,
    is_passed,
    shaped_key,
)
from lightning_compress.quantization import quantization_of, strip
from lightning_compress.quantization.affine import NO_CLAMP, AffineGrid
from lightning_compress.quantization.batchnorm import INT32_LIMIT, fold_batchnorm, norm_factor_and_offset
from lightning_compress.quantization.layers import SCALE_LIMIT, layer_result
from lightning_compress.quantization.placement import Place, Placement
from lightning_compress.quantization.ranges import ActivationRanges
from lightning_compress.quantization.roles import is_spatial_mean, role
from lightning_compress.quantization.weights import WeightQuantizer

_GRID = "_affine_grid"
_OPS = torch.ops.quantized_decomposed


def lower(model: nn.Module, names: list[str] | None = None) -> nn.Module:
    """Return a copy of ``model`` in eval mode that computes with integers what ``model`` computes with rounded floats.

    Args:
        model: A module; where it was not prepared for quantization, or is not quantizing, a plain float copy is made.
        names: Takes the name of every value in the order in which it is quantized when the copy runs.

    Returns:
        The copy, on the CPU. Run it once before it is exported: layers learn the grid of their input from the run.

    Example:
        >>> from lightning_compress.quantization import calibrate, prepare
        >>> net = nn.Sequential(nn.Linear(4, 2), nn.ReLU())
        >>> quantization = prepare(net)
        >>> calibrate(net, [torch.rand(16, 4)])
        >>> quantization.is_quantizing = True
        >>> x = torch.rand(2, 4)
        >>> torch.allclose(lower(net)(x), net.eval()(x), atol=1e-6)
        True
    """
    lowered = copy_of(model).cpu().float().eval()
    quantization = quantization_of(lowered)
    if quantization is None or not quantization.is_quantizing:
        return strip(lowered)
    program, placement = quantization.analyse(in_float=True)
    transparent = {operation.node for operation in program.operations if role(operation) == "transparent"}
    strip(lowered)
    plan = _Plan(placement, quantization.ranges, quantization.weights, transparent, names)
    with torch.no_grad():
        for trace in program.traces.values():
            forward = vars(trace.module).get("forward")
            if not isinstance(forward, _LoweredForward):
                forward = _LoweredForward(trace.module, plan)
                vars(trace.module)["forward"] = forward
            forward.variants[trace.key] = trace
        for module in list(lowered.modules()):
            if id(module) in placement.weights:
                vars(module)["forward"] = _LoweredLayer(module, plan)
            elif id(module) in placement.norms:
                vars(module)["forward"] = _LoweredNorm(module, plan)
            elif id(module) in placement.folded:
                vars(module)["forward"] = _pass_through
    return lowered


@dataclass(frozen=True)
class _Plan:
    """What is put into the forwards of a copy.

    Attributes:
        placement: Where the copy is quantized.
        ranges: The ranges of its values.
        weights: What rounds its weights.
        transparent: The nodes that only move values.
        names: Takes the name of every value in the order in which it is quantized.
    """

    placement: Placement
    ranges: ActivationRanges
    weights: Mapping[str, WeightQuantizer]
    transparent: Collection[fx.Node | None]
    names: list[str] | None
    pinned: set[str] = field(default_factory=set)

    def rounded(self, value: Any, place: Place | None) -> Any:
        """Return ``value`` quantized and dequantized at ``place``."""
        if place is None:
            return value
        if place.is_constant and place.quantizer not in self.pinned:
            # Its range is what it is now, after the last step of training.
            self.ranges.pin(self.ranges.names.index(place.quantizer), value)
            self.pinned.add(place.quantizer)
        return quantized(value, place, self.ranges, self.names)


class _LoweredForward:
    """Runs the eval graph of a module node by node, with a quantize/dequantize pair wherever there is a place."""

    def __init__(self, owner: nn.Module, plan: _Plan) -> None:
        self.owner = owner
        self.plan = plan
        self.variants: dict[CallKey, Trace] = {}
        self.weights: dict[fx.Node, _IntegerWeight] = {}
        self.__signature__ = forward_signature(owner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        key = call_key(self.__signature__, args, kwargs)
        arguments = call_arguments(self.__signature__, args, kwargs)
        if key is not None and arguments is not None and key not in self.variants:
            key = shaped_key(key, arguments)
        if key is None or arguments is None or key not in self.variants:
            return type(self.owner).forward(self.owner, *args, **kwargs)
        values: dict[fx.Node, Any] = {}
        passed = iter([arguments[name] for name, value in key if is_passed(value)])
        for node in self.variants[key].evaluation.nodes:
            if node.op == "output":
                return fx.node.map_arg(node.args[0], lambda item: values[item])
            values[node] = next(passed) if node.op == "placeholder" else self._run(node, values)
            place = self.plan.placement.nodes.get(node)
            if place is not None:
                values[node] = self.plan.rounded(values[node], place)
            elif node in self.plan.transparent and values[node] is not values[node.all_input_nodes[0]]:
                # Said again after an operation that only moves values: runtimes look for dequantize -> op -> quantize.
                grid = grid_of(values[node.all_input_nodes[0]])
                values[node] = _on_grid(values[node], grid, node.name, self.plan.names)
            elif node.op != "call_module" and is_in_place(node, self.owner):
                setattr(values[node], _GRID, None)  # the tensor is the same, its values no longer lie on its grid
        raise AssertionError("A graph ends with its output.")

    def _run(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        placement = self.plan.placement
        place = placement.nodes.get(node)
        if place is not None and place.clamp != NO_CLAMP:
            return values[node.all_input_nodes[0]]  # the quantizer clips
        args: Any = _plain(fx.node.map_arg(node.args, lambda item: values[item]))
        kwargs: Any = _plain(fx.node.map_arg(node.kwargs, lambda item: values[item]))
        if node.op == "get_attr":
            value: Any = self.owner
            for name in str(node.target).split("."):
                value = getattr(value, name)
            return value
        if node.op == "call_module":
            return self.owner.get_submodule(str(node.target))(*args, **kwargs)
        if place is not None and is_spatial_mean(node) and args[0].dim() == 4:
            # A mean over rows and columns in the form for which runtimes have an integer kernel.
            pooled = nn.functional.adaptive_avg_pool2d(args[0], 1)
            keeps = kwargs.get("keepdim", args[2] if len(args) > 2 else False)
            return pooled if keeps else pooled.flatten(1)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        if node in placement.weights:
            return self._weighted(node, *args, **kwargs)
        if node in placement.attentions:
            spots = placement.attentions[node]
            return attention(*args, **kwargs, on=lambda name, value: self.plan.rounded(value, spots[name]))
        if node.target is torch.einsum and all(grid_of(value) is not None for value in args[1:]):
            return matrix_product(args[0], args[1], args[2], self._say_again)
        return node.target(*args, **kwargs)

    def _say_again(self, moved: Tensor, value: Tensor) -> Tensor:
        result: Tensor = _on_grid(moved, grid_of(value), "operand", self.plan.names)
        return result

    def _weighted(self, node: fx.Node, x: Tensor, weight: Tensor, bias: Any = None, *args: Any, **kwargs: Any) -> Any:
        if node not in self.weights:
            self.weights[node] = _IntegerWeight(self.owner, self.plan, node, f"{node.name}_", weight, bias)
        assert callable(node.target)
        return node.target(x, *self.weights[node].parameters(x), *args, **kwargs)


def _plain(value: Any) -> Any:
    """Return the arguments of a node in lists and dicts that the user's functions may change."""
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple(_plain(item) for item in value)
    if isinstance(value, fx.immutable_collections.immutable_list):
        return [_plain(item) for item in value]
    if isinstance(value, fx.immutable_collections.immutable_dict):
        return {name: _plain(item) for name, item in value.items()}
    return value


class _IntegerWeight:
    """Weight and bias of one layer as constants: int8 weights and, where its input lies on a grid, an int32 bias."""

    def __init__(
        self, owner: nn.Module, plan: _Plan, key: int | fx.Node, prefix: str, weight: Tensor, bias: Tensor | None
    ) -> None:
        place = plan.placement.weights[key]
        quantizer = plan.weights[place.name]
        self.owner = owner
        self.prefix = prefix
        self.axis = quantizer.axis
        self.integers, self.scales = quantizer.integers(weight.detach())
        self.bias = None if bias is None else bias.detach()
        if place.norm is not None:
            self.integers, self.scales, self.bias = fold_batchnorm(self.integers, self.scales, self.bias, place.norm)
        self.suffixes: dict[AffineGrid | None, str] = {}

    def parameters(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias, dequantized, for an input."""
        grid = grid_of(x)
        if grid not in self.suffixes:
            self._settle(grid)
        suffix, buffers = self.suffixes[grid], self.owner._buffers
        weight = _dequantized(
            buffers[f"{self.prefix}integer_weight{suffix}"], buffers[f"{self.prefix}weight_scale{suffix}"], self.axis
        )
        bias, bias_scale = buffers[f"{self.prefix}integer_bias{suffix}"], buffers[f"{self.prefix}bias_scale{suffix}"]
        return weight, bias if bias is None or bias_scale is None else _dequantized(bias, bias_scale)

    def _settle(self, grid: AffineGrid | None) -> None:
        """Keep weight and bias as constants for inputs on ``grid``."""
        suffix = self.suffixes[grid] = f"_{len(self.suffixes) + 1}" if self.suffixes else ""
        integers, scales, bias, bias_scales = self.integers, self.scales, self.bias, None
        if bias is not None and grid is not None and bias.shape == scales.shape:
            integers, scales = room_for_bias(integers, scales, bias, grid.scale)
            bias_scales = scales * grid.scale
            bias = (bias.double() / bias_scales.double()).round().clamp(-INT32_LIMIT, INT32_LIMIT).to(torch.int32)
        weight = integers.transpose(0, self.axis).contiguous()
        constants = {
            "integer_weight": weight,
            "weight_scale": scales,
            "integer_bias": bias,
            "bias_scale": bias_scales,
        }
        for name, constant in constants.items():
            self.owner.register_buffer(f"{self.prefix}{name}{suffix}", constant)


class _LoweredLayer:
    """A convolution or linear layer with integer weights."""

    def __init__(self, owner: nn.Module, plan: _Plan) -> None:
        self.owner = owner
        self.plan = plan
        self.before = plan.placement.layer_inputs.get(id(owner))
        self.after = plan.placement.layer_outputs.get(id(owner))
        _settle_parametrizations(owner)
        weight, bias = owner.weight, owner.bias
        assert isinstance(weight, Tensor)
        assert bias is None or isinstance(bias, Tensor)
        # The float weight stays: code around the layer may read it. What is not read is not exported.
        self.weight = _IntegerWeight(owner, plan, id(owner), "", weight, bias)
        self.__signature__ = inspect.signature(type(owner).forward)

    def __call__(self, input: Tensor, *rest: Any) -> Tensor:
        x = self.plan.rounded(input, self.before)
        mode = getattr(self.owner, "padding_mode", "zeros")
        weight, bias = self.weight.parameters(x)
        if mode == "zeros":
            result = layer_result(self.owner, x, weight, bias, *rest)
        else:
            result = self._padded_result(x, weight, bias, str(mode))
        return self.plan.rounded(result, self.after)  # type: ignore[no-any-return]

    def _padded_result(self, x: Tensor, weight: Tensor, bias: Tensor | None, mode: str) -> Tensor:
        """Pad with values of the input itself, which lie on its grid, and say the grid again."""
        layer: Any = self.owner
        padded = nn.functional.pad(x, layer._reversed_padding_repeated_twice, mode)
        padded = _on_grid(padded, grid_of(x), "padded", self.plan.names)
        convolve = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[weight.dim() - 3]
        return convolve(padded, weight, bias, layer.stride, 0, layer.dilation, layer.groups)


class _LoweredNorm:
    """A batch norm on its own, as a convolution of each channel with one integer, 127 or -127."""

    def __init__(self, owner: nn.Module, plan: _Plan) -> None:
        self.owner = owner
        self.factor, self.offset = norm_factor_and_offset(owner)
        self.is_settled = False

    def __call__(self, input: Tensor) -> Tensor:
        grid = grid_of(input)
        n_dims = input.dim() - 2
        if grid is None or n_dims == 0:
            shape = [1, -1, *[1] * n_dims]
            return input * self.factor.view(shape) + self.offset.view(shape)
        if not self.is_settled:
            self._settle(grid, n_dims)
        buffers = self.owner._buffers
        weight = _dequantized(buffers["factor"], buffers["factor_scale"])
        bias = _dequantized(buffers["offset"], buffers["offset_scale"])
        convolve = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[n_dims - 1]
        return convolve(input, weight, bias, groups=len(self.factor))

    def _settle(self, grid: AffineGrid, n_dims: int) -> None:
        integers = torch.where(self.factor < 0, -SCALE_LIMIT, SCALE_LIMIT).to(torch.int8)
        integers, scales = room_for_bias(
            integers.view(-1, 1, *[1] * n_dims), self.factor.abs() / SCALE_LIMIT, self.offset, grid.scale
        )
        offset_scale = scales * grid.scale
        offset = (self.offset.double() / offset_scale.double()).round().clamp(-INT32_LIMIT, INT32_LIMIT)
        constants = {"factor": integers, "factor_scale": scales, "offset": offset.to(torch.int32)}
        for name, constant in {**constants, "offset_scale": offset_scale}.items():
            self.owner.register_buffer(name, constant)
        self.is_settled = True


def _settle_parametrizations(layer: nn.Module) -> None:
    """Make the parameters that a layer computes from others (weight norm and the like) plain ones."""
    if parametrize.is_parametrized(layer):
        # Not by torch's `remove_parametrizations`: it takes the attribute off a class that copies share.
        assert isinstance(layer.parametrizations, nn.ModuleDict)
        values = {name: getattr(layer, name).detach() for name in layer.parametrizations}
        layer.__class__ = type(layer).__bases__[0]
        del layer.parametrizations
        for name, value in values.items():
            layer.register_parameter(name, nn.Parameter(value))
    for key, hook in list(layer._forward_pre_hooks.items()):
        if isinstance(hook, WeightNorm | SpectralNorm | prune.BasePruningMethod):
            hook.remove(layer)
            del layer._forward_pre_hooks[key]


def room_for_bias(integers: Tensor, scales: Tensor, bias: Tensor, input_scale: float) -> tuple[Tensor, Tensor]:
    """Coarsen the channels whose bias does not fit an int32 at scale ``input_scale * scale``.

    That happens only where a batch norm scales a channel to (nearly) nothing: there the weights are rounded again, to
    the finest scale at which the bias fits, which is far below what an output can show.

    Args:
        integers: Integer weight, shape (out, ...).
        scales: Scale of each output channel, shape (out,), at least 0.
        bias: Bias, shape (out,).
        input_scale: Scale of the layer's input.

    Returns:
        Integers and scales; unchanged in every channel whose bias fits.

    Example:
        >>> integers, scales = torch.tensor([[3], [4]], dtype=torch.int8), torch.tensor([0.1, 0.0])
        >>> integers, scales = room_for_bias(integers, scales, torch.tensor([0.5, 3.0]), input_scale=1.0)
        >>> integers.tolist(), bool(scales[1] > 0)
        ([[3], [0]], True)
    """
    least = bias.abs().double() / (INT32_LIMIT // 2) / input_scale
    least = least.clamp(min=torch.finfo(torch.float32).tiny * 2**24)
    coarse = scales.double() < least
    if not coarse.any():
        return integers, scales
    ratio = torch.where(coarse, scales.double() / least, 1.0).view(-1, *[1] * (integers.dim() - 1))
    rounded = (integers.double() * ratio).round().to(integers.dtype)
    return rounded, torch.where(coarse, least, scales.double()).float()


def quantized(x: Any, place: Place, ranges: ActivationRanges, names: list[str] | None = None) -> Any:
    """Return ``x`` quantized and dequantized at ``place``; what is no floating-point tensor passes through.

    Args:
        x: Any value.
        place: Where it is rounded, and the activation that the rounding takes over.
        ranges: The ranges of the model.
        names: Takes the quantizer's name.

    Returns:
        A tensor that remembers its grid.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    grid = ranges.grid(ranges.names.index(place.quantizer))
    if grid is None:
        return x.clamp(*place.clamp) if place.clamp != NO_CLAMP else x
    # The activation clips integers, not floats: so nothing stands between a layer and its quantizer.
    return _on_grid(x, grid, place.quantizer, names, grid.bounds(place.clamp))


def grid_of(value: Any) -> AffineGrid | None:
    """Return the grid that a value of a lowered model was last put on, or None.

    Example:
        >>> grid_of(torch.zeros(1)) is None
        True
    """
    return getattr(value, _GRID, None)


def _on_grid(
    x: Any, grid: AffineGrid | None, name: str, names: list[str] | None, bounds: tuple[int, int] | None = None
) -> Any:
    """Return ``x``, or each tensor of a tuple ``x``, as a quantize/dequantize pair on ``grid`` within ``bounds``."""
    if grid is None:
        return x
    if isinstance(x, tuple | list):
        return type(x)(_on_grid(item, grid, name, names, bounds) for item in x)
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    low, high = bounds or grid.bounds()
    settings = (grid.zero_point, grid.zero_point + low, grid.zero_point + high, torch.uint8)
    integers = _OPS.quantize_per_tensor(x, grid.step, *settings)
    result = _OPS.dequantize_per_tensor(integers, grid.scale, *settings)
    setattr(result, _GRID, grid)
    if names is not None:
        names.append(name)
    return result


def _dequantized(integers: Tensor | None, scales: Tensor | None, axis: int = 0) -> Tensor:
    assert integers is not None
    assert scales is not None
    zero_points = torch.zeros_like(scales, dtype=torch.int64)
    limits = torch.iinfo(integers.dtype)
    result: Tensor = _OPS.dequantize_per_channel(
        integers, scales, zero_points, axis, limits.min, limits.max, integers.dtype
    )
    return result


def _pass_through(input: Tensor) -> Tensor:
    return input
