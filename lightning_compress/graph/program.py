"""The dataflow of a whole model: the graphs of its modules, followed from call to call.

A module that cannot be traced is a local failure: it is entered through its children.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from typing import Any, Literal

from torch import fx, nn

from lightning_compress.graph.shaped import is_shaped
from lightning_compress.graph.tracing import (
    CallKey,
    Trace,
    UntraceableError,
    call_arguments,
    call_key,
    entry_key,
    forward_signature,
    is_operator,
    overwritten_parameters,
    passed_parameters,
    trace_module,
)

_SIZE_METHODS = frozenset({"size", "dim", "numel", "ndimension", "__len__"})

_SIZE_ATTRIBUTES = frozenset({"shape", "ndim", "dtype", "device", "requires_grad", "is_cuda"})


@dataclass(eq=False)
class Operation:
    """One operation of the whole model, at one place it is called from.

    Attributes:
        kind: ``input`` (a value that enters a traced module from outside), ``constant`` (a parameter or buffer),
            ``module`` (a call of a leaf module), ``function`` or ``method``.
        target: The leaf module, the function, or the name of the method or constant.
        path: Name of the leaf module in the model, or of the module whose forward holds the operation.
        node: The operation in the eval graph of that module; None for a leaf module called from untraced code.
        trace: The trace that holds ``node``.
        inputs: Operations whose values it reads, in order.
        users: Operations that read its value.
        is_result: Whether an entry of the model returns its value.
        is_scalar: Whether it yields no tensor: a shape, a size, or arithmetic on such.
        is_constant: Whether its value comes from parameters and buffers alone.
    """

    kind: Literal["input", "constant", "module", "function", "method"]
    target: Any
    path: str
    node: fx.Node | None
    trace: Trace | None
    inputs: list[Operation] = field(default_factory=list)
    users: list[Operation] = field(default_factory=list)
    is_result: bool = False
    is_scalar: bool = False
    is_constant: bool = False

    @property
    def name(self) -> str:
        """A readable name: the module's path with the node's name where the operation is not a module of its own."""
        if self.kind == "module" or self.node is None:
            return self.path
        return f"{self.path}.{self.node.name}" if self.path else self.node.name


@dataclass(eq=False)
class Program:
    """The dataflow of a whole model.

    Attributes:
        traces: Every module's trace by module identity and call key.
        operations: All operations in the order they run.
        untraceable: Why a module's own forward has no graph, by its path. Its children are entries of their own.
    """

    traces: dict[tuple[int, CallKey], Trace] = field(default_factory=dict)
    operations: list[Operation] = field(default_factory=list)
    untraceable: dict[str, str] = field(default_factory=dict)


def trace_program(model: nn.Module, calls: Sequence[tuple[str, CallKey]] = ()) -> Program:
    """Trace every module of ``model`` that can be traced and stitch the graphs together.

    Args:
        model: Any module; it is not changed.
        calls: Further entries, as pairs of a module's path and the way it is called. Without them the model is
            entered through its own forward with every default left alone.

    Returns:
        The program. A module that cannot be traced is entered through its children.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> [operation.name for operation in trace_program(net).operations]
        ['input_1', '0', '1']
    """
    return _Stitcher(model).run(calls)


class _Stitcher:
    """Follows the calls of a model from its entries, and gathers the operations."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.program = Program()
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.entered: set[int] = set()
        self.turn = 0
        self.failures: dict[tuple[int, CallKey], str] = {}
        self.shaped: dict[int, list[CallKey]] = {}  # keys with shapes of modules that have no other graph

    def run(self, calls: Sequence[tuple[str, CallKey]]) -> Program:
        for path, key in calls:
            if is_shaped(key):
                self.shaped.setdefault(id(self.model.get_submodule(path)), []).append(key)
        plain = [(path, key) for path, key in calls if not is_shaped(key)]
        # Once for every shape that a module is called with, so that each of its graphs has its place in its callers'.
        for turn in range(max([1, *map(len, self.shaped.values())])):
            self.turn = turn
            self.entered.clear()
            self._enter(self.model)
            for path, key in plain:
                self._walk_call(path, key)
        for path, key in calls:
            if is_shaped(key) and (id(self.model.get_submodule(path)), key) not in self.program.traces:
                self._walk_call(path, key)
        return self.program

    def _walk_call(self, path: str, key: CallKey) -> None:
        trace = self._trace(self.model.get_submodule(path), key)
        if trace is not None:
            self._walk_entry(trace)

    def _enter(self, module: nn.Module) -> None:
        """Take ``module`` as called from code that has no graph."""
        if id(module) in self.entered:
            return
        self.entered.add(id(module))
        if is_operator(module):
            self._enter_operator(module)
            return
        key = None if isinstance(module, nn.ModuleList | nn.ModuleDict) else entry_key(forward_signature(module))
        trace = self._trace(module, key)
        if trace is None:
            for child in module.children():
                self._enter(child)
        else:
            self._walk_entry(trace)

    def _enter_operator(self, module: nn.Module) -> None:
        path = self.paths[id(module)]
        value = Operation("input", "input", path, None, None)
        operation = Operation("module", module, path, None, None, [value], is_result=True)
        value.users.append(operation)
        self.program.operations += [value, operation]

    def _walk_entry(self, trace: Trace) -> None:
        arguments = dict.fromkeys(passed_parameters(trace.key))
        for operation in _operations_in(self._walk(trace, arguments)):
            operation.is_result = True

    def _trace(self, module: nn.Module, key: CallKey | None) -> Trace | None:
        path = self.paths[id(module)]
        if key is None:
            if not isinstance(module, nn.ModuleList | nn.ModuleDict):
                self.program.untraceable[path] = "its forward takes *args"
            return None
        called = id(module), key
        if called not in self.program.traces and called not in self.failures:
            try:
                self.program.traces[called] = trace_module(module, key, path)
            except UntraceableError as reason:
                self.failures[called] = str(reason)
        if called in self.program.traces or is_shaped(key):
            return self.program.traces.get(called)
        fitting = [shaped for shaped in self.shaped.get(id(module), []) if _fits(shaped, key)]
        for position in range(len(fitting)):
            found = self._trace(module, fitting[(self.turn + position) % len(fitting)])
            if found is not None:
                return found
        self.program.untraceable[path] = self.failures[called]
        return None

    def _walk(self, trace: Trace, arguments: Mapping[str, Any]) -> Any:
        """Run the eval graph of ``trace`` on operations instead of tensors; return what it returns."""
        values: dict[fx.Node, Any] = {}
        placeholders = iter(passed_parameters(trace.key))
        for node in trace.evaluation.nodes:
            if node.op == "placeholder":
                values[node] = self._receive(node, trace, arguments[next(placeholders)])
            elif node.op == "output":
                return _substitute(node.args[0], values)
            elif node.op == "get_attr":
                values[node] = self._add("constant", node.target, trace.path, node, trace, values)
            elif node.op == "call_module":
                values[node] = self._call(node, trace, values)
            elif node.target is operator.getitem and isinstance(values.get(node.args[0]), tuple | list | dict):
                values[node] = _entry(values[node.args[0]], _substitute(node.args[1], values))
            elif _is_record(node.target):
                bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
                values[node] = _Record(_substitute(_entries(node.target, bound.arguments), values))
            elif node.target is getattr and isinstance(values.get(node.args[0]), _Record):
                values[node] = values[node.args[0]].get(node.args[1])
            else:
                kind: Literal["function", "method"] = "function" if node.op == "call_function" else "method"
                values[node] = self._add(kind, node.target, trace.path, node, trace, values)
        raise AssertionError("A graph ends with its output.")

    def _receive(self, node: fx.Node, trace: Trace, argument: Any) -> Any:
        # A value that only passes through the caller is taken up where it is used: the inner module may also be
        # called directly, past the outer one.
        if argument is None or (isinstance(argument, Operation) and argument.kind == "input"):
            return self._add("input", "input", trace.path, node, trace, {})
        return argument

    def _call(self, node: fx.Node, trace: Trace, values: dict[fx.Node, Any]) -> Any:
        child = trace.module.get_submodule(str(node.target))
        path = self.paths[id(child)]
        if is_operator(child):
            return self._add("module", child, path, node, trace, values)
        signature = forward_signature(child)
        key = call_key(signature, node.args, node.kwargs)
        child_trace = self._trace(child, key)
        if child_trace is not None and self._overwrites_what_is_read_again(node, child_trace, trace):
            self.program.untraceable[path] = "it overwrites its input, which is read again after it"
            del self.program.traces[id(child), child_trace.key]
            child_trace = None
        if child_trace is None or key is None:
            for grandchild in child.children():
                self._enter(grandchild)
            return self._add("module", child, path, node, trace, values)
        self.entered.add(id(child))
        arguments = call_arguments(signature, _substitute(node.args, values), _substitute(node.kwargs, values))
        assert arguments is not None
        return self._walk(child_trace, arguments)

    def _overwrites_what_is_read_again(self, node: fx.Node, child: Trace, parent: Trace) -> bool:
        """Tell whether ``node`` of ``parent``, a call of ``child``, changes a value that is read after it."""
        arguments = call_arguments(forward_signature(child.module), node.args, node.kwargs) or {}
        overwritten = [arguments.get(name) for name in overwritten_parameters(child)]
        order = {reader: position for position, reader in enumerate(parent.evaluation.nodes)}
        return any(
            order[reader] > order[node]
            for value in overwritten
            if isinstance(value, fx.Node)
            for reader in value.users
            if reader is not node
        )

    def _add(
        self,
        kind: Literal["input", "constant", "module", "function", "method"],
        target: Any,
        path: str,
        node: fx.Node,
        trace: Trace,
        values: Mapping[fx.Node, Any],
    ) -> Operation:
        inputs = list(_operations_in([_substitute(node.args, values), _substitute(node.kwargs, values)]))
        operation = Operation(kind, target, path, node, trace, inputs)
        operation.is_scalar = kind in ("function", "method") and (
            (target is getattr and node.args[1] in _SIZE_ATTRIBUTES)
            or target in _SIZE_METHODS
            or (bool(inputs) and all(value.is_scalar for value in inputs))
        )
        operation.is_constant = (
            kind == "constant"
            or (kind == "module" and not inputs)  # a parametrization computes a weight from parameters
            or (
                kind in ("function", "method")
                and any(value.is_constant for value in inputs)
                and all(value.is_constant or value.is_scalar for value in inputs)
            )
        )
        for value in inputs:
            value.users.append(operation)
        self.program.operations.append(operation)
        return operation


def _fits(shaped: CallKey, key: CallKey) -> bool:
    """Tell whether a key with shapes is one for calls like ``key``."""
    return [name for name, _ in shaped] == [name for name, _ in key] and all(
        theirs == "<value>" or ours == theirs for (_, ours), (_, theirs) in zip(shaped, key, strict=True)
    )


def _entry(container: Any, index: Any) -> Any:
    is_by_position = isinstance(container, _Record) and not isinstance(index, str)
    return list(container.values())[index] if is_by_position else container[index]


def _entries(record: type, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that a record has as entries: one that is a dict too leaves out those that are None."""
    return {name: value for name, value in fields.items() if value is not None or not issubclass(record, dict)}


class _Record(dict[str, Any]):
    """The fields of a dataclass or named tuple that a forward makes, by name."""


def _is_record(target: Any) -> bool:
    return isinstance(target, type) and (is_dataclass(target) or hasattr(target, "_fields"))


def _substitute(argument: Any, values: Mapping[fx.Node, Any]) -> Any:
    """Replace every node in a nested argument by its value."""
    if isinstance(argument, fx.Node):
        return values[argument]
    if isinstance(argument, tuple | list):
        return tuple(_substitute(item, values) for item in argument)
    if isinstance(argument, dict):
        return {name: _substitute(item, values) for name, item in argument.items()}
    return argument


def _operations_in(value: Any) -> Iterator[Operation]:
    if isinstance(value, Operation):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _operations_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _operations_in(item)
