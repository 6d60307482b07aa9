"""Roles: what each operation of a model is to quantization."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.nn import functional as F

from lightning_compress.graph import Operation, is_operator
from lightning_compress.selection import TRANSPOSED_LAYERS

Role = Literal[
    "source",
    "weighted",
    "norm",
    "clamp",
    "arithmetic",
    "product",
    "attention",
    "concat",
    "transparent",
    "scalar",
    "float",
]
"""What an operation is to quantization.

``source``: a value from outside. ``weighted``: convolution or linear layer, a module or a function on parameters.
``norm``: a batch norm. ``clamp``: an activation that a quantizer takes over. ``arithmetic``, ``concat``: run in
integers when all they read and write is quantized. ``product``: a matrix product of two values. ``attention``: two of
them with a softmax in between. ``transparent``: moves or picks values, so its result lies on the grid of what it read.
``scalar``: yields no tensor. ``float``: all else.
"""

QUANTIZABLE_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, *TRANSPOSED_LAYERS)
"""Layers whose weights are quantized."""

TRANSPOSED_FUNCTIONS: frozenset[Callable[..., Any]] = frozenset(
    {F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}
)
LINEAR_FUNCTIONS: frozenset[Callable[..., Any]] = frozenset({F.linear})
WEIGHTED_FUNCTIONS: frozenset[Callable[..., Any]] = frozenset(
    {F.conv1d, F.conv2d, F.conv3d, *LINEAR_FUNCTIONS, *TRANSPOSED_FUNCTIONS}
)
"""Functions of an input, a weight and perhaps a bias, which are quantized where the weight comes from parameters."""

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
"""Norms that fold into the layer before them."""

_POOLS = (
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
)
_TRANSPARENT_MODULES = (
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.ChannelShuffle,
    nn.ZeroPad1d,
    nn.ZeroPad2d,
    nn.ZeroPad3d,
    nn.ReflectionPad1d,
    nn.ReflectionPad2d,
    nn.ReflectionPad3d,
    nn.ReplicationPad1d,
    nn.ReplicationPad2d,
    nn.ReplicationPad3d,
    nn.CircularPad1d,
    nn.CircularPad2d,
    nn.CircularPad3d,
    nn.UpsamplingNearest2d,
)
_CONSTANT_PADS = (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)
_ARITHMETIC_FUNCTIONS: frozenset[Callable[..., Any]] = frozenset(
    {
        operator.add,
        operator.mul,
        torch.add,
        torch.mul,
        torch.multiply,
        F.avg_pool1d,
        F.avg_pool2d,
        F.avg_pool3d,
        F.adaptive_avg_pool1d,
        F.adaptive_avg_pool2d,
        F.adaptive_avg_pool3d,
    }
)
_ARITHMETIC_METHODS = frozenset({"add", "add_", "mul", "mul_"})
_PRODUCTS: frozenset[Any] = frozenset({operator.matmul, torch.matmul, torch.bmm, "matmul", "bmm", "__matmul__"})
_TWO_OPERANDS = frozenset(
    {operator.add, operator.mul, torch.add, torch.mul, torch.multiply, "add", "add_", "mul", "mul_"}
)
_TRANSPARENT_FUNCTIONS: frozenset[Callable[..., Any]] = frozenset(
    {
        operator.getitem,
        torch.flatten,
        torch.reshape,
        torch.permute,
        torch.transpose,
        torch.squeeze,
        torch.unsqueeze,
        torch.chunk,
        torch.split,
        torch.unbind,
        F.max_pool1d,
        F.max_pool2d,
        F.max_pool3d,
        F.adaptive_max_pool1d,
        F.adaptive_max_pool2d,
        F.adaptive_max_pool3d,
        F.dropout,
        F.dropout2d,
        F.pixel_shuffle,
        F.pixel_unshuffle,
        torch.max_pool1d,
        torch.max_pool2d,
        torch.max_pool3d,
        torch.flip,
        torch.roll,
        torch.narrow,
        torch.select,
        torch.swapaxes,
        torch.movedim,
    }
)
_TRANSPARENT_METHODS = frozenset(
    {
        "flatten",
        "view",
        "reshape",
        "permute",
        "transpose",
        "contiguous",
        "squeeze",
        "unsqueeze",
        "chunk",
        "split",
        "unbind",
        "expand",
        "expand_as",
        "repeat",
        "flip",
        "roll",
        "narrow",
        "select",
        "swapaxes",
        "movedim",
        "unflatten",
        "view_as",
        "reshape_as",
        "t",
        "clone",
        "detach",
    }
)
_CONCATS: frozenset[Callable[..., Any]] = frozenset({torch.cat, torch.concat, torch.concatenate, torch.stack})
_RELU_FUNCTIONS: frozenset[Callable[..., Any]] = frozenset({F.relu, torch.relu, torch.relu_, F.relu_})


def clamp_bounds(operation: Operation) -> tuple[float, float] | None:
    """Return the bounds of an activation that clips (ReLU, ReLU6, Hardtanh), or None for any other operation.

    Bounds that leave out zero do not count, since every grid holds zero.

    Example:
        >>> from lightning_compress.graph import trace_program
        >>> program = trace_program(nn.Sequential(nn.ReLU(), nn.ReLU6(), nn.Sigmoid()))
        >>> [clamp_bounds(operation) for operation in program.operations]
        [None, (0.0, inf), (0.0, 6.0), None]
    """
    target = operation.target
    if isinstance(target, nn.ReLU) or target in _RELU_FUNCTIONS:
        return (0.0, math.inf)
    if operation.kind == "method" and target in ("relu", "relu_"):
        return (0.0, math.inf)
    if isinstance(target, nn.ReLU6) or target is F.relu6:
        return (0.0, 6.0)
    if isinstance(target, nn.Hardtanh) and target.min_val <= 0.0 <= target.max_val:
        return (float(target.min_val), float(target.max_val))
    return None


def role(operation: Operation, excluded: Collection[int | fx.Node | None] = ()) -> Role:
    """Return what ``operation`` is to quantization.

    Args:
        operation: Any operation of a program.
        excluded: Identities of layers, and nodes of calls, that stay in float.

    Example:
        >>> from lightning_compress.graph import trace_program
        >>> net = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.ReLU(), nn.MaxPool2d(2), nn.Tanh())
        >>> [role(operation) for operation in trace_program(net).operations]
        ['source', 'weighted', 'norm', 'clamp', 'transparent', 'float']
    """
    if operation.kind in ("input", "constant"):
        return "source"
    if operation.is_scalar:
        return "scalar"
    if operation.kind == "module":
        return _module_role(operation, excluded)
    if clamp_bounds(operation) is not None:
        return "clamp"
    return _function_role(operation, excluded)


def _module_role(operation: Operation, excluded: Collection[int | fx.Node | None]) -> Role:
    target = operation.target
    if not is_operator(target):
        return "float"  # its own forward has no graph, whatever it inherits from
    if isinstance(target, QUANTIZABLE_LAYERS):
        return "float" if id(target) in excluded else "weighted"
    if isinstance(target, NORMS):
        return "float" if target.running_mean is None else "norm"
    if isinstance(target, _POOLS):
        return "float" if getattr(target, "ceil_mode", False) else "arithmetic"
    if isinstance(target, _TRANSPARENT_MODULES) or (isinstance(target, _CONSTANT_PADS) and target.value == 0):
        return "transparent"
    if isinstance(target, nn.Upsample) and target.mode == "nearest":
        return "transparent"
    return "float" if clamp_bounds(operation) is None else "clamp"


def _function_role(operation: Operation, excluded: Collection[int | fx.Node | None]) -> Role:
    target = operation.target
    if target in WEIGHTED_FUNCTIONS:
        return "weighted" if has_own_weight(operation) and operation.node not in excluded else "float"
    if target is F.scaled_dot_product_attention:
        return "attention"
    if target in _PRODUCTS or (target is torch.einsum and is_matrix_product(operation)):
        return "product" if len(operation.inputs) == 2 else "float"
    if operation.node is not None and _averages_past_the_border(operation.node):
        return "float"
    if operation.node is not None and is_spatial_mean(operation.node):
        return "arithmetic"
    if operation.node is not None and (_pads_with_own_values(operation.node) or _repeats_pixels(operation.node)):
        return "transparent"
    if operation.kind == "method":
        found: Role = "arithmetic" if target in _ARITHMETIC_METHODS else "float"
        found = "transparent" if target in _TRANSPARENT_METHODS else found
    elif target in _CONCATS:
        return "concat"
    elif target is operator.getitem and role(operation.inputs[0]) in ("source", "float"):
        return "source"  # an entry of what may be a container (an LSTM's result): the first tensor of its own
    else:
        found = "arithmetic" if target in _ARITHMETIC_FUNCTIONS else "float"
        found = "transparent" if target in _TRANSPARENT_FUNCTIONS else found
    # An add or multiply by a plain number has no second operand to run on in integers.
    return "float" if target in _TWO_OPERANDS and len(operation.inputs) < 2 else found


def has_own_weight(operation: Operation) -> bool:
    """Tell whether a call of one of `WEIGHTED_FUNCTIONS` multiplies a value by what comes from parameters alone."""
    node = operation.node
    if node is None or len(node.args) < 2 or not all(isinstance(value, fx.Node) for value in node.args[:2]):
        return False
    return operation.inputs[1].is_constant and not operation.inputs[0].is_constant


def _averages_past_the_border(node: fx.Node) -> bool:
    """Tell whether ``node`` is an average pooling with ``ceil_mode``, which ONNX Runtime gets wrong in integers."""
    if node.target not in (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d):
        return False
    return bool(node.kwargs.get("ceil_mode", node.args[4] if len(node.args) > 4 else False))


def _pads_with_own_values(node: fx.Node) -> bool:
    """Tell whether ``node`` pads with zeros, which lie on every grid, or with values that are there already."""
    if node.target is not F.pad:
        return False
    named = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)) | node.kwargs
    return bool(named.get("mode", "constant") != "constant" or named.get("value") in (None, 0))


def _repeats_pixels(node: fx.Node) -> bool:
    if node.target is not F.interpolate:
        return False
    return bool(node.kwargs.get("mode", node.args[3] if len(node.args) > 3 else "nearest") == "nearest")


def is_spatial_mean(node: fx.Node) -> bool:
    """Tell whether ``node`` is a mean over rows and columns, which runtimes know in integers as a pooling."""
    if node.target not in ("mean", torch.mean):
        return False
    dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    return isinstance(dims, list | tuple) and sorted(map(str, dims)) in (["2", "3"], ["-1", "-2"])


def is_matrix_product(operation: Operation) -> bool:
    """Tell whether a call of `torch.einsum` multiplies two values, without a letter that only one of them sums over."""
    node = operation.node
    if node is None or len(node.args) != 3 or not isinstance(node.args[0], str):
        return False
    left, right, result = einsum_letters(node.args[0])
    summed = (set(left) | set(right)) - set(result)
    is_plain = len(set(left)) == len(left) and len(set(right)) == len(right)
    return is_plain and "." not in node.args[0] and summed <= (set(left) & set(right)) and bool(summed)


def einsum_letters(equation: str) -> tuple[str, str, str]:
    """Return the letters of both operands and of the result of an einsum equation.

    Example:
        >>> einsum_letters("bhid, bhjd -> bhij")
        ('bhid', 'bhjd', 'bhij')
    """
    operands, _, result = equation.replace(" ", "").partition("->")
    left, _, right = operands.partition(",")
    return left, right, result or "".join(sorted(set(left) ^ set(right)))
