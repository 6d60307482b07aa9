"""Lowering: a copy of a trained model in which every rounding is a quantize/dequantize pair and weights are integers.

The lowered form is what runtimes are given (design: one lowered form, many runtimes). It computes what the
fake-quantized model computes in eval mode, with `torch.ops.quantized_decomposed` around real integer buffers.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import Tensor, fx, nn

from lightning_compress.graph import CallKey, Trace, call_key, forward_signature
from lightning_compress.quantization import quantization_of, strip
from lightning_compress.quantization.affine import NO_CLAMP, AffineGrid, integer_weight
from lightning_compress.quantization.batchnorm import INT32_LIMIT, fold_batchnorm
from lightning_compress.quantization.placement import Place, role
from lightning_compress.quantization.ranges import ActivationRanges
from lightning_compress.quantization.rewrite import layer_result

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
    # Results that a forward left on the module are no part of it, and have no copy of their own.
    left = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    memo: dict[int, Any] = {id(value): value.detach().clone() for value in left if not value.is_leaf}
    lowered = copy.deepcopy(model, memo).cpu().float().eval()
    quantization = quantization_of(lowered)
    if quantization is None or not quantization.is_quantizing:
        return strip(lowered)
    program, placement = quantization.analyse()
    ranges = quantization.ranges
    transparent = {operation.node for operation in program.operations if role(operation) == "transparent"}
    strip(lowered)
    with torch.no_grad():
        for trace in program.traces.values():
            forward = vars(trace.module).get("forward")
            if not isinstance(forward, _LoweredForward):
                forward = _LoweredForward(trace.module, ranges, placement.nodes, transparent, names)
                vars(trace.module)["forward"] = forward
            forward.variants[trace.key] = trace
        for module in lowered.modules():
            if id(module) in placement.weighted:
                norm = placement.folds.get(id(module))
                places = (placement.layer_inputs.get(id(module)), placement.layer_outputs.get(id(module)))
                forward_of_layer = _LoweredLayer(module, norm, quantization.weight_bits, ranges, places, names)
                vars(module)["forward"] = forward_of_layer
                if norm is not None:
                    vars(norm)["forward"] = _pass_through
    return lowered


class _LoweredForward:
    """Runs the eval graph of a module node by node, with a quantize/dequantize pair wherever there is a place."""

    def __init__(
        self,
        owner: nn.Module,
        ranges: ActivationRanges,
        places: Mapping[fx.Node, Place],
        transparent: Collection[fx.Node | None],
        names: list[str] | None,
    ) -> None:
        self.owner = owner
        self.ranges = ranges
        self.places = places
        self.transparent = transparent
        self.names = names
        self.variants: dict[CallKey, Trace] = {}
        self.__signature__ = forward_signature(owner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        key = call_key(self.__signature__, args, kwargs)
        if key is None or key not in self.variants:
            return type(self.owner).forward(self.owner, *args, **kwargs)
        bound = self.__signature__.bind(*args, **kwargs)
        bound.apply_defaults()
        values: dict[fx.Node, Any] = {}
        passed = iter([bound.arguments[name] for name, value in key if value == "<value>"])
        for node in self.variants[key].evaluation.nodes:
            if node.op == "output":
                return fx.node.map_arg(node.args[0], lambda item: values[item])
            values[node] = next(passed) if node.op == "placeholder" else self._run(node, values)
            place = self.places.get(node)
            if place is not None:
                values[node] = quantized(values[node], place, self.ranges, self.names)
            elif node in self.transparent and values[node] is not values[node.all_input_nodes[0]]:
                # Said again after an operation that only moves values: runtimes look for dequantize -> op -> quantize.
                grid = grid_of(values[node.all_input_nodes[0]])
                values[node] = _on_grid(values[node], grid, node.name, self.names)
        raise AssertionError("A graph ends with its output.")

    def _run(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        place = self.places.get(node)
        if place is not None and place.clamp != NO_CLAMP:
            return values[node.all_input_nodes[0]]  # the quantizer clips
        args = fx.node.map_arg(node.args, lambda item: values[item])
        kwargs = fx.node.map_arg(node.kwargs, lambda item: values[item])
        if node.op == "get_attr":
            value: Any = self.owner
            for name in str(node.target).split("."):
                value = getattr(value, name)
            return value
        if node.op == "call_module":
            return self.owner.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)


class _LoweredLayer:
    """A convolution or linear layer with int8 weights and, where its input lies on a grid, an int32 bias."""

    def __init__(
        self,
        owner: nn.Module,
        norm: nn.Module | None,
        bits: int,
        ranges: ActivationRanges,
        places: tuple[Place | None, Place | None],
        names: list[str] | None,
    ) -> None:
        self.owner = owner
        self.ranges = ranges
        self.before, self.after = places
        self.names = names
        weight, bias = owner.weight, owner.bias
        assert isinstance(weight, Tensor)
        self.integers, self.scales = integer_weight(weight, bits)
        self.bias = bias.detach() if isinstance(bias, Tensor) else None
        if norm is not None:
            self.integers, self.scales, self.bias = fold_batchnorm(self.integers, self.scales, self.bias, norm)
        self.suffixes: dict[AffineGrid | None, str] = {}
        for name in ("weight", "bias"):
            owner._parameters.pop(name, None)
        self.__signature__ = inspect.signature(type(owner).forward)

    def __call__(self, input: Tensor) -> Tensor:
        x = input if self.before is None else quantized(input, self.before, self.ranges, self.names)
        grid = grid_of(x)
        if grid not in self.suffixes:
            self._settle(grid)
        suffix, buffers = self.suffixes[grid], self.owner._buffers
        weight = _dequantized(buffers[f"weight{suffix}"], buffers[f"weight_scale{suffix}"])
        bias = buffers[f"bias{suffix}"]
        if bias is not None and grid is not None:
            bias = _dequantized(bias, buffers[f"bias_scale{suffix}"])
        result = layer_result(self.owner, x, weight, bias)
        return result if self.after is None else quantized(result, self.after, self.ranges, self.names)

    def _settle(self, grid: AffineGrid | None) -> None:
        """Keep weight and bias as constants for inputs on ``grid``."""
        suffix = self.suffixes[grid] = f"_{len(self.suffixes) + 1}" if self.suffixes else ""
        integers, scales, bias, bias_scales = self.integers, self.scales, self.bias, None
        if bias is not None and grid is not None:
            integers, scales = room_for_bias(integers, scales, bias, grid.scale)
            bias_scales = scales * grid.scale
            bias = (bias.double() / bias_scales.double()).round().clamp(-INT32_LIMIT, INT32_LIMIT).to(torch.int32)
        constants = {"weight": integers, "weight_scale": scales, "bias": bias, "bias_scale": bias_scales}
        for name, constant in constants.items():
            self.owner.register_buffer(f"{name}{suffix}", constant)


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
    settings = (grid.scale, grid.zero_point, grid.zero_point + low, grid.zero_point + high, torch.uint8)
    result = _OPS.dequantize_per_tensor(_OPS.quantize_per_tensor(x, *settings), *settings)
    setattr(result, _GRID, grid)
    if names is not None:
        names.append(name)
    return result


def _dequantized(integers: Tensor | None, scales: Tensor | None) -> Tensor:
    assert integers is not None
    assert scales is not None
    zero_points = torch.zeros_like(scales, dtype=torch.int64)
    limits = torch.iinfo(integers.dtype)
    result: Tensor = _OPS.dequantize_per_channel(
        integers, scales, zero_points, 0, limits.min, limits.max, integers.dtype
    )
    return result


def _pass_through(input: Tensor) -> Tensor:
    return input
