"""Placement: which values of a model are quantized, and where.

A value gets one quantizer, after the last operation that runtimes fuse into its producer (convolution, batch norm and
ReLU are one), so that convolutions, linear layers, adds, concatenations and poolings read integers on every input.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.nn import functional as F

from lightning_compress.graph import Operation, Program, is_operator
from lightning_compress.quantization.affine import NO_CLAMP

Role = Literal["source", "weighted", "norm", "clamp", "arithmetic", "concat", "transparent", "scalar", "float"]
"""What an operation is to quantization.

``source``: a value from outside. ``weighted``: convolution or linear layer. ``clamp``: an activation that a quantizer
takes over. ``arithmetic``, ``concat``: run in integers when all they read and write is quantized. ``transparent``:
moves or picks values, so its result lies on the grid of what it read. ``scalar``: yields no tensor. ``float``: all
else.
"""

QUANTIZABLE_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""Layers whose weights are quantized."""

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
)
_ARITHMETIC_FUNCTIONS: frozenset[Callable[..., Any]] = frozenset(
    {
        operator.add,
        operator.mul,
        operator.matmul,
        torch.add,
        torch.mul,
        torch.multiply,
        torch.matmul,
        torch.bmm,
        torch.mean,
        F.avg_pool1d,
        F.avg_pool2d,
        F.avg_pool3d,
        F.adaptive_avg_pool1d,
        F.adaptive_avg_pool2d,
        F.adaptive_avg_pool3d,
    }
)
_ARITHMETIC_METHODS = frozenset({"add", "add_", "mul", "mul_", "matmul", "bmm", "mean"})
_TWO_OPERANDS = frozenset(
    {operator.add, operator.mul, torch.add, torch.mul, torch.multiply, "add", "add_", "mul", "mul_"}
)
_ADDS = frozenset({operator.add, torch.add, "add", "add_"})
_SOFTMAX_FUNCTIONS = frozenset({F.softmax, torch.softmax, F.log_softmax, torch.log_softmax, "softmax", "log_softmax"})
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


def role(operation: Operation, excluded: Collection[int] = ()) -> Role:
    """Return what ``operation`` is to quantization.

    Args:
        operation: Any operation of a program.
        excluded: Identities of layers that stay in float.

    Example:
        >>> from lightning_compress.graph import trace_program
        >>> net = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.ReLU(), nn.MaxPool2d(2), nn.Tanh())
        >>> [role(operation) for operation in trace_program(net).operations]
        ['source', 'weighted', 'norm', 'clamp', 'transparent', 'float']
    """
    target = operation.target
    if operation.kind in ("input", "constant"):
        return "source"
    if operation.is_scalar:
        return "scalar"
    if operation.kind == "module":
        if isinstance(target, QUANTIZABLE_LAYERS):
            return "float" if id(target) in excluded else "weighted"
        if isinstance(target, NORMS):
            return "norm"
        if isinstance(target, _POOLS):
            return "arithmetic"
        if isinstance(target, _TRANSPARENT_MODULES):
            return "transparent"
    if clamp_bounds(operation) is not None:
        return "clamp"
    return _function_role(operation)


def _function_role(operation: Operation) -> Role:
    target = operation.target
    if operation.kind == "module":
        return "float"
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
    if target in _ADDS and operation.users and all(_is_softmax(user) for user in operation.users):
        return "float"  # scores with a mask of -inf, which no grid holds
    # An add or multiply by a plain number has no second operand to run on in integers.
    return "float" if target in _TWO_OPERANDS and len(operation.inputs) < 2 else found


def _is_softmax(operation: Operation) -> bool:
    is_module = isinstance(operation.target, nn.Softmax | nn.LogSoftmax)
    return is_module or (operation.kind != "module" and operation.target in _SOFTMAX_FUNCTIONS)


@dataclass(frozen=True)
class Place:
    """A place where a value is rounded.

    Attributes:
        quantizer: Name of the quantizer that rounds it.
        clamp: Bounds of the activation that the rounding takes over.
        escapes: Whether code without a graph gets the value: it may overwrite it.
    """

    quantizer: str
    clamp: tuple[float, float] = NO_CLAMP
    escapes: bool = False


@dataclass(frozen=True)
class PlacementRow:
    """What becomes of one operation.

    Attributes:
        name: Name of the operation.
        operation: What it does, such as ``Conv2d`` or ``add``.
        is_integer: Whether it reads and writes integers.
        quantizer: Name of the quantizer of its result, or an empty string.
        reason: Why it stays in float, or an empty string.
    """

    name: str
    operation: str
    is_integer: bool
    quantizer: str
    reason: str


@dataclass(eq=False)
class Placement:
    """Where a model is quantized.

    Attributes:
        bits: Bits of every quantizer, by name.
        nodes: Places by the node, of an eval graph, whose value they round.
        layer_inputs: Places at the input of weighted layers that untraced code calls, by layer identity.
        layer_outputs: The same at their output.
        layer_grids: The quantizer whose grid a layer's input lies on, by layer identity, where there is just one.
        weighted: Identities of the layers whose weights are quantized.
        folds: The batch norm (value) that folds into each layer (key), by identity.
        rows: What becomes of each operation.
    """

    bits: dict[str, int] = field(default_factory=dict)
    nodes: dict[fx.Node, Place] = field(default_factory=dict)
    layer_inputs: dict[int, Place] = field(default_factory=dict)
    layer_outputs: dict[int, Place] = field(default_factory=dict)
    layer_grids: dict[int, str] = field(default_factory=dict)
    weighted: set[int] = field(default_factory=set)
    folds: dict[int, nn.Module] = field(default_factory=dict)
    rows: list[PlacementRow] = field(default_factory=list)

    def to_text(self) -> str:
        """Return the placement as an aligned table, one line an operation."""
        table = [("operation", "kind", "runs in", "grid of its result / why in float")]
        table += [
            (row.name, row.operation, "integer" if row.is_integer else "float", row.quantizer or row.reason or "-")
            for row in self.rows
        ]
        widths = [max(len(line[column]) for line in table) for column in range(3)]
        return "\n".join(
            "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[3]])
            for line in table
        )


def place(program: Program, activation_bits: int = 8, excluded: Collection[int] = ()) -> Placement:
    """Decide which values of ``program`` are quantized.

    Args:
        program: The traced model.
        activation_bits: Bits of activations, 2 to 8; inputs and results of the model keep 8.
        excluded: Identities of layers that stay in float.

    Returns:
        The placement.

    Example:
        >>> from lightning_compress.graph import trace_program
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> print(place(trace_program(net)).to_text())
        operation  kind         runs in  grid of its result / why in float
        0          Conv2d       integer  2
        1          BatchNorm2d  integer  2
        2          ReLU         integer  2
    """
    return _Placer(program, activation_bits, excluded).run()


class _Placer:
    """Marks the values that must be quantized, then names their quantizers."""

    def __init__(self, program: Program, activation_bits: int, excluded: Collection[int]) -> None:
        self.operations = program.operations
        self.activation_bits = activation_bits
        self.roles = {id(operation): role(operation, excluded) for operation in self.operations}
        self.excluded = excluded
        self.quantized: dict[int, Operation] = {}
        self.twins: list[list[Operation]] = []  # operations whose results must share a grid

    def run(self) -> Placement:
        for operation in self.operations:
            kind = self._role(operation)
            if kind == "weighted":
                self._require(operation.inputs[0])
                self._mark(self._chain_end(operation))
            elif kind in ("arithmetic", "concat"):
                tensors = [value for value in operation.inputs if self._role(value) != "scalar"]
                for value in tensors:
                    self._require(value)
                self._mark(self._chain_end(operation))
                if kind == "concat":
                    self.twins.append([self._root(value) for value in tensors] + [operation])
        return self._name()

    def _role(self, operation: Operation) -> Role:
        return self.roles[id(operation)]

    def _chain_end(self, operation: Operation) -> Operation:
        """Follow what runtimes fuse into ``operation``: a batch norm after a layer, then a clipping activation."""
        end = operation
        if self._role(operation) == "weighted" and self._only_user(end, "norm"):
            end = end.users[0]
        if self._role(operation) != "concat" and self._only_user(end, "clamp"):
            end = end.users[0]
        return end

    def _only_user(self, operation: Operation, kind: Role) -> bool:
        return len(operation.users) == 1 and not operation.is_result and self._role(operation.users[0]) == kind

    def _root(self, operation: Operation) -> Operation:
        while self._role(operation) == "transparent" and operation.inputs:
            operation = operation.inputs[0]
        return operation

    def _require(self, operation: Operation) -> None:
        root = self._root(operation)
        if self._role(root) != "scalar":
            self._mark(root)

    def _mark(self, operation: Operation) -> None:
        self.quantized[id(operation)] = operation

    def _name(self) -> Placement:
        placement = Placement()
        names = self._shared_names()
        escaping = {operation.node for operation in self.quantized.values() if self._escapes(operation)}
        for operation in self.quantized.values():
            name = names[_place_name(operation)]
            bits = 8 if self._is_edge(operation) else self.activation_bits
            placement.bits[name] = max(bits, placement.bits.get(name, 0))
            clamp = clamp_bounds(operation) or NO_CLAMP
            if operation.node is not None:
                placement.nodes[operation.node] = Place(name, clamp, operation.node in escaping)
            elif operation.kind == "input":
                placement.layer_inputs[id(operation.users[0].target)] = Place(name)
            else:
                placement.layer_outputs[id(operation.target)] = Place(name)
        placement.weighted = {id(op.target) for op in self.operations if self._role(op) == "weighted"}
        placement.layer_grids = self._layer_grids(names)
        placement.folds = self._folds(placement)
        placement.rows = [
            self._row(operation, placement, names)
            for operation in self.operations
            if self._role(operation) not in ("source", "scalar")
        ]
        return placement

    def _layer_grids(self, names: dict[str, str]) -> dict[int, str]:
        found: dict[int, set[str]] = {}
        for operation in self.operations:
            if self._role(operation) == "weighted":
                root = _place_name(self._root(operation.inputs[0]))
                found.setdefault(id(operation.target), set()).add(names.get(root, ""))
        return {layer: min(grids) for layer, grids in found.items() if len(grids) == 1 and "" not in grids}

    def _shared_names(self) -> dict[str, str]:
        """Map the name of every place to the name of its quantizer: concatenated values share one."""
        parents = {_place_name(operation): _place_name(operation) for operation in self.quantized.values()}

        def find(name: str) -> str:
            while parents[name] != name:
                name = parents[name]
            return name

        for group in self.twins:
            members = [_place_name(operation) for operation in group if _place_name(operation) in parents]
            for member in members[1:]:
                parents[find(member)] = find(members[0])
        return {name: find(name) for name in parents}

    def _is_edge(self, operation: Operation) -> bool:
        """Tell whether the value enters the model or is a result of it."""
        return operation.kind == "input" or any(value.is_result for value in self._same_values(operation))

    def _escapes(self, operation: Operation) -> bool:
        """Tell whether code without a graph gets the value: the caller of the model, or a child that has none."""
        return any(
            value.is_result or any(user.kind == "module" and not is_operator(user.target) for user in value.users)
            for value in self._same_values(operation)
        )

    def _same_values(self, operation: Operation) -> Iterator[Operation]:
        """Yield ``operation`` and all that only moves its value."""
        pending = [operation]
        while pending:
            value = pending.pop()
            yield value
            pending += [user for user in value.users if self._role(user) == "transparent"]

    def _folds(self, placement: Placement) -> dict[int, nn.Module]:
        """Find the batch norms that fold: always after one and the same layer, nothing rounded in between."""
        norms: dict[int, set[int]] = {}
        layers: dict[int, set[int]] = {}
        modules: dict[int, nn.Module] = {}
        for operation in self.operations:
            kind = self._role(operation)
            if kind == "norm":
                before = operation.inputs[0] if operation.inputs else None
                fits = (
                    before is not None
                    and operation.target.running_mean is not None
                    and self._role(before) == "weighted"
                    and self._only_user(before, "norm")
                    and before.node not in placement.nodes
                )
                layer = id(before.target) if fits and before is not None else -1
                layers.setdefault(id(operation.target), set()).add(layer)
                modules[id(operation.target)] = operation.target
            elif kind == "weighted":
                norm = id(operation.users[0].target) if self._only_user(operation, "norm") else -1
                norms.setdefault(id(operation.target), set()).add(norm)
        return {
            layer: modules[norm]
            for layer, found in norms.items()
            for norm in found
            if len(found) == 1 and norm != -1 and layers[norm] == {layer}
        }

    def _row(self, operation: Operation, placement: Placement, names: dict[str, str]) -> PlacementRow:
        kind = self._role(operation)
        end = self._chain_end(operation)
        quantizer = names.get(_place_name(end), "")
        described = type(operation.target).__name__ if operation.kind == "module" else _spell(operation.target)
        reason = ""
        if kind == "norm":
            is_integer = any(norm is operation.target for norm in placement.folds.values())
            end = operation.users[0] if self._only_user(operation, "clamp") else operation
            quantizer = names.get(_place_name(end), "")
            reason = "" if is_integer else "no convolution or linear layer of its own before it to fold into"
        elif kind == "transparent":
            quantizer = names.get(_place_name(self._root(operation)), "")
            is_integer = bool(quantizer)
            reason = "" if is_integer else "what it reads is in float"
        elif kind == "float":
            is_integer = False
            reason = "excluded" if id(operation.target) in self.excluded else "no integer form"
        else:
            is_integer = bool(quantizer)
            reason = "" if is_integer else "what reads it is in float"
        return PlacementRow(operation.name, described, is_integer, quantizer, reason)


def _place_name(operation: Operation) -> str:
    if operation.node is None or operation.trace is None:
        return f"{operation.path}.input" if operation.kind == "input" else operation.path
    if operation.kind == "module" and operation.node.name.lstrip("_") == str(operation.node.target).replace(".", "_"):
        return operation.path
    path = operation.trace.path
    return f"{path}.{operation.node.name}" if path else operation.node.name


def _spell(target: Any) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))
