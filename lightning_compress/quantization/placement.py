"""Placement: which values of a model are quantized, and where.

A value gets one quantizer, after the last operation that runtimes fuse into its producer (convolution, batch norm and
ReLU are one). Convolutions, linear layers and matrix products read integers on every input; adds, multiplications,
concatenations and poolings do where what comes after them reads integers anyway. A residual stream that only
normalisations read stays in float.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from lightning_compress.graph import Operation, Program, is_operator
from lightning_compress.quantization.affine import NO_CLAMP, AffineGrid
from lightning_compress.quantization.roles import (
    LINEAR_FUNCTIONS,
    QUANTIZABLE_LAYERS,
    TRANSPOSED_FUNCTIONS,
    WEIGHTED_FUNCTIONS,
    Role,
    clamp_bounds,
    has_own_weight,
    role,
)
from lightning_compress.quantization.scheme import Scheme
from lightning_compress.selection import TRANSPOSED_LAYERS, match_names

WeightKey = int | fx.Node
"""What holds a quantized weight: the identity of a layer, or the node of a function call."""

ATTENTION_OPERANDS = ("query", "key", "probabilities", "value")
"""The operands of the two matrix products of an attention."""


@dataclass(frozen=True)
class Place:
    """A place where a value is rounded.

    Attributes:
        quantizer: Name of the quantizer that rounds it.
        clamp: Bounds of the activation that the rounding takes over.
        escapes: Whether code without a graph gets the value: it may overwrite it.
        is_constant: Whether the value comes from parameters and buffers alone: its range is its own, not an average.
    """

    quantizer: str
    clamp: tuple[float, float] = NO_CLAMP
    escapes: bool = False
    is_constant: bool = False


@dataclass(frozen=True)
class WeightPlace:
    """A weight that is rounded.

    Attributes:
        name: Name of the layer, or of the call of a function.
        bits: Bits of the weight.
        norm: The batch norm that folds into it, or None.
        grid: The quantizer whose grid the layer's input lies on, where there is just one, else None.
    """

    name: str
    bits: int
    norm: nn.Module | None = None
    grid: str | None = None


@dataclass(frozen=True)
class PlacementRow:
    """What becomes of one operation.

    Attributes:
        name: Name of the operation.
        operation: What it does, such as ``Conv2d`` or ``add``.
        is_integer: Whether it reads and writes integers.
        quantizer: Name of the quantizer of its result, or an empty string.
        reason: Why it stays in float, or an empty string.
        weight_bits: Bits of its weight, or None where it has none.
        grid: Grid of its result, or None where that is not known (yet).
    """

    name: str
    operation: str
    is_integer: bool
    quantizer: str
    reason: str
    weight_bits: int | None = None
    grid: AffineGrid | None = None


@dataclass(eq=False)
class Placement:
    """Where a model is quantized.

    Attributes:
        bits: Bits of every quantizer, by name.
        nodes: Places by the node, of an eval graph, whose value they round.
        attentions: Places of the four operands of an attention, by its node.
        layer_inputs: Places at the input of weighted layers that untraced code calls, by layer identity.
        layer_outputs: The same at their output.
        weights: The weights that are rounded.
        norms: Batch norms that fold nowhere and become a scale and a shift, by identity, with the quantizer whose
            grid their input lies on.
        rows: What becomes of each operation.
    """

    bits: dict[str, int] = field(default_factory=dict)
    nodes: dict[fx.Node, Place] = field(default_factory=dict)
    attentions: dict[fx.Node, dict[str, Place]] = field(default_factory=dict)
    layer_inputs: dict[int, Place] = field(default_factory=dict)
    layer_outputs: dict[int, Place] = field(default_factory=dict)
    weights: dict[WeightKey, WeightPlace] = field(default_factory=dict)
    norms: dict[int, str] = field(default_factory=dict)
    rows: list[PlacementRow] = field(default_factory=list)

    @property
    def folded(self) -> set[int]:
        """Identities of the batch norms that fold into a layer."""
        return {id(weight.norm) for weight in self.weights.values() if weight.norm is not None}


def place(program: Program, scheme: Scheme | None = None, layer_names: Sequence[str] = ()) -> Placement:
    """Decide which values of ``program`` are quantized.

    Args:
        program: The traced model.
        scheme: Bits, and what stays in float; by default 8 bits everywhere.
        layer_names: Layers that the scheme may name besides those that the program runs.

    Returns:
        The placement.

    Raises:
        ValueError: If a pattern of the scheme matches no layer.

    Example:
        >>> from lightning_compress.graph import trace_program
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> placement = place(trace_program(net))
        >>> placement.bits, [row.quantizer for row in placement.rows]
        ({'input_1': 8, '2': 8}, ['2', '2', '2'])
    """
    return _Placer(program, scheme or Scheme(), layer_names).run()


class _Placer:
    """Marks the values that must be quantized, then names their quantizers."""

    def __init__(self, program: Program, scheme: Scheme, layer_names: Sequence[str]) -> None:
        self.operations = program.operations
        self.scheme = scheme
        names = weight_names(program)
        every = list(dict.fromkeys([*layer_names, *names.values()]))
        excluded = match_names(every, scheme.exclude, "exclude")
        self.excluded = {key for key, name in names.items() if name in excluded}
        self.roles = {id(operation): role(operation, self.excluded) for operation in self.operations}
        self.names = names
        self.settings = scheme.settings(every, self._edges())
        self.readers_want: dict[int, bool] = {}
        self.quantized: dict[int, Operation] = {}
        self.twins: list[list[Operation]] = []  # operations whose results must share a grid
        self.attentions: list[Operation] = []

    def run(self) -> Placement:
        for operation in reversed(self.operations):
            self.readers_want[id(operation)] = self._is_wanted(operation)
        for operation in self.operations:
            kind = self._role(operation)
            if kind == "weighted":
                self._require(operation.inputs[0])
                # A linear layer may give floats, but not through a clipping activation, which would fuse with it.
                if not self._is_linear(operation) or self._chain_is_wanted(operation) or self._is_clipped(operation):
                    self._mark(self._chain_end(operation))
            elif kind == "norm" and self._is_scale(operation):
                self._require(operation.inputs[0])
                self._mark(self._chain_end(operation))
            elif kind in ("arithmetic", "concat") and self._chain_is_wanted(operation):
                tensors = [value for value in operation.inputs if self._role(value) != "scalar"]
                for value in tensors:
                    self._require(value)
                self._mark(self._chain_end(operation))
                if kind == "concat":
                    self.twins.append([self._root(value) for value in tensors] + [operation])
        for operation in self.operations:
            if self._role(operation) == "product":
                for value in operation.inputs:
                    self._require_operand(value)
                if self._chain_is_wanted(operation):
                    self._mark(self._chain_end(operation))
            elif self._role(operation) == "attention":
                self.attentions.append(operation)
        return self._name()

    def _role(self, operation: Operation) -> Role:
        return self.roles[id(operation)]

    def _is_wanted(self, operation: Operation) -> bool:
        """Tell whether someone reads the value in integers, or it is a result of the model."""
        return operation.is_result or any(self._wants(user, operation) for user in operation.users)

    def _wants(self, user: Operation, value: Operation) -> bool:
        kind = self._role(user)
        if kind == "weighted":
            return user.inputs[0] is value
        if kind in ("arithmetic", "concat", "clamp", "transparent", "norm"):
            return self.readers_want[id(user)]
        return False

    def _chain_is_wanted(self, operation: Operation) -> bool:
        return self.readers_want[id(self._chain_end(operation))]

    def _is_linear(self, operation: Operation) -> bool:
        return isinstance(operation.target, nn.Linear) or operation.target in LINEAR_FUNCTIONS

    def _is_clipped(self, operation: Operation) -> bool:
        return self._role(self._chain_end(operation)) == "clamp"

    def _is_scale(self, norm: Operation) -> bool:
        """Tell whether a batch norm is to run in integers on its own: it folds nowhere, and is read in integers."""
        before = norm.inputs[0] if norm.inputs else None
        follows_layer = before is not None and self._role(before) == "weighted" and self._only_user(before, "norm")
        return (
            before is not None
            and norm.target.running_mean is not None
            and not follows_layer
            and self._chain_is_wanted(norm)
        )

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

    def _require_operand(self, operation: Operation) -> None:
        """Require an operand of a matrix product: rounded as late as possible, so that it has a grid of its own."""
        value = operation
        while self._role(value) == "transparent" and value.inputs and id(value) not in self.quantized:
            value = value.inputs[0]
        if id(value) not in self.quantized and self._role(value) != "scalar":
            self._mark(operation)

    def _mark(self, operation: Operation) -> None:
        self.quantized[id(operation)] = operation

    def _edges(self) -> set[str]:
        """Return the names of the first and the last layers: no other layer lies before or after them."""
        weighted = [operation for operation in self.operations if self._role(operation) == "weighted"]
        after: set[int] = set()
        first = set()
        for operation in self.operations:
            is_after = any(id(value) in after for value in operation.inputs)
            if self._role(operation) == "weighted":
                first |= set() if is_after else {self.names[_weight_key(operation)]}
                is_after = True
            if is_after:
                after.add(id(operation))
        before: set[int] = set()
        last = set()
        for operation in reversed(self.operations):
            is_before = any(id(user) in before for user in operation.users)
            if self._role(operation) == "weighted":
                last |= set() if is_before else {self.names[_weight_key(operation)]}
                is_before = True
            if is_before:
                before.add(id(operation))
        return first | last if len(weighted) > 1 else set()

    def _name(self) -> Placement:
        placement = Placement()
        names = self._shared_names()
        escaping = {operation.node for operation in self.quantized.values() if self._escapes(operation)}
        varying = {names[_place_name(operation)] for operation in self.quantized.values() if not operation.is_constant}
        for operation in self.operations:
            if id(operation) not in self.quantized:
                continue
            name = names[_place_name(operation)]
            placement.bits[name] = max(self._bits(operation), placement.bits.get(name, 0))
            clamp = clamp_bounds(operation) or NO_CLAMP
            if operation.node is not None:
                is_constant = operation.is_constant and name not in varying
                placement.nodes[operation.node] = Place(name, clamp, operation.node in escaping, is_constant)
            elif operation.kind == "input":
                placement.layer_inputs[id(operation.users[0].target)] = Place(name)
            else:
                placement.layer_outputs[id(operation.target)] = Place(name)
        for operation in self.attentions:
            assert operation.node is not None
            spots = {operand: Place(f"{_place_name(operation)}.{operand}") for operand in ATTENTION_OPERANDS}
            placement.attentions[operation.node] = spots
            placement.bits |= {spot.quantizer: self.scheme.activation_bits for spot in spots.values()}
            if self.scheme.activation_bits == 1:  # all probabilities are positive: their signs tell nothing
                placement.bits[spots["probabilities"].quantizer] = 8
        self._name_weights(placement, names)
        rows = [
            self._row(operation, placement, names)
            for operation in self.operations
            if self._role(operation) not in ("source", "scalar") and not operation.is_constant
        ]
        placement.rows = list(dict.fromkeys(rows))  # several calls of one kind are one row
        return placement

    def _bits(self, operation: Operation) -> int:
        """Return the bits of a value: the most that what reads it asks for; 8 at the edge of the model."""
        return 8 if self._is_edge(operation) else max(self._asked_bits(operation), default=8)

    def _asked_bits(self, operation: Operation) -> Iterator[int]:
        """Yield the bits that layers and matrix products ask for that read a value, as it is or joined with others.

        Additions and poolings ask for none: no runtime has kernels of less than 8 bits for them.
        """
        for value in self._same_values(operation):
            for user in value.users:
                kind = self._role(user)
                if kind == "weighted" and user.inputs[0] is value:
                    yield self.settings[self.names[_weight_key(user)]].activation_bits
                elif kind in ("product", "attention"):
                    yield self.scheme.activation_bits
                elif kind == "concat":
                    yield from self._asked_bits(user)

    def _name_weights(self, placement: Placement, names: dict[str, str]) -> None:
        norms = self._folds(placement)
        grids: dict[WeightKey, set[str]] = {}
        for operation in self.operations:
            root = names.get(_place_name(self._root(operation.inputs[0])), "") if operation.inputs else ""
            if self._role(operation) == "weighted":
                grids.setdefault(_weight_key(operation), set()).add(root)
            elif self._role(operation) == "norm" and self._is_scale(operation):
                found = placement.norms.setdefault(id(operation.target), root)
                placement.norms[id(operation.target)] = root if found == root else ""
        for key, found_grids in grids.items():
            name = self.names[key]
            grid = min(found_grids) if len(found_grids) == 1 and "" not in found_grids else None
            placement.weights[key] = WeightPlace(name, self.settings[name].weight_bits, norms.get(key), grid)

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

    def _folds(self, placement: Placement) -> dict[WeightKey, nn.Module]:
        """Find the batch norms that fold: always after one and the same layer, nothing rounded in between."""
        norms: dict[WeightKey, set[int]] = {}
        layers: dict[int, set[WeightKey]] = {}
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
                    and _scales_by_output_channel(before)
                )
                layer = _weight_key(before) if fits and before is not None else -1
                layers.setdefault(id(operation.target), set()).add(layer)
                modules[id(operation.target)] = operation.target
            elif kind == "weighted":
                norm = id(operation.users[0].target) if self._only_user(operation, "norm") else -1
                norms.setdefault(_weight_key(operation), set()).add(norm)
        # A weight that a function is called on has a node in each graph of its module: one for every shape.
        return {
            layer: modules[norm]
            for layer, found in norms.items()
            for norm in found
            if found == {norm}
            and norm != -1
            and all(norms.get(other) == {norm} and self.names[other] == self.names[layer] for other in layers[norm])
        }

    def _row(self, operation: Operation, placement: Placement, names: dict[str, str]) -> PlacementRow:
        kind = self._role(operation)
        quantizer = names.get(_place_name(self._chain_end(operation)), "")
        described = type(operation.target).__name__ if operation.kind == "module" else _spell(operation.target)
        bits = placement.weights[_weight_key(operation)].bits if kind == "weighted" else None
        is_integer, reason = bool(quantizer), "" if quantizer else "what reads it is in float"
        if kind == "weighted" or kind in ("product", "attention"):
            is_integer, reason = True, "" if quantizer else "its result is read in float"
        elif kind == "norm":
            end = operation.users[0] if self._only_user(operation, "clamp") else operation
            quantizer = names.get(_place_name(end), "")
            is_integer = id(operation.target) in placement.folded or id(operation.target) in placement.norms
            reason = "" if is_integer else "no convolution or linear layer of its own before it to fold into"
        elif kind == "transparent":
            quantizer = names.get(_place_name(self._root(operation)), "")
            is_integer = bool(quantizer)
            reason = "" if is_integer else "what it reads is in float"
        elif kind == "float":
            is_integer = False
            is_excluded = _has_weight(operation) and _weight_key(operation) in self.excluded
            reason = "excluded" if is_excluded else "no integer form"
        return PlacementRow(operation.name, described, is_integer, quantizer, reason, bits)


def weight_names(program: Program) -> dict[WeightKey, str]:
    """Return the names of all layers, and of all functions called on parameters, that a program runs.

    Args:
        program: The traced model.

    Returns:
        Names by what holds the weight.

    Example:
        >>> from lightning_compress.graph import trace_program
        >>> list(weight_names(trace_program(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))).values())
        ['0']
    """
    return {
        _weight_key(operation): operation.path if operation.kind == "module" else _place_name(operation)
        for operation in program.operations
        if _has_weight(operation)
    }


def _has_weight(operation: Operation) -> bool:
    if operation.kind == "module":
        return isinstance(operation.target, QUANTIZABLE_LAYERS) and is_operator(operation.target)
    return operation.kind == "function" and operation.target in WEIGHTED_FUNCTIONS and has_own_weight(operation)


def _weight_key(operation: Operation) -> WeightKey:
    if operation.kind == "module":
        return id(operation.target)
    assert operation.node is not None
    return operation.node


def _scales_by_output_channel(operation: Operation) -> bool:
    """Tell whether a weight has one scale for each output channel: a grouped transposed one shares them."""
    if isinstance(operation.target, TRANSPOSED_LAYERS):
        return operation.target.groups == 1
    return operation.kind == "module" or operation.target not in TRANSPOSED_FUNCTIONS


def _place_name(operation: Operation) -> str:
    if operation.node is None or operation.trace is None:
        return f"{operation.path}.input" if operation.kind == "input" else operation.path
    if operation.kind == "module" and operation.node.name.lstrip("_") == str(operation.node.target).replace(".", "_"):
        return operation.path
    path = operation.trace.path
    return f"{path}.{operation.node.name}" if path else operation.node.name


def _spell(target: Any) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))
