"""Tracing one module: the graph of its own forward, with all its children as leaves."""

from __future__ import annotations

import copy
import inspect
import logging
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from lightning_compress.graph.equivalents import equivalent_of
from lightning_compress.graph.in_place import functionalize_, is_in_place, memory_of
from lightning_compress.graph.shaped import (
    RecordedFactories,
    ShapedTracing,
    is_opaque,
    is_passed,
    is_shaped,
    new_mode,
    takes_weights,
)
from lightning_compress.graph.stand_ins import has_own_forward

_PASSED = "<value>"
"""Stands in a call key for an argument whose value is known only when the module runs."""

CallKey = tuple[tuple[str, Any], ...]
"""How a module is called: each parameter's name with its constant (None, bool, str), or with `"<value>"`."""


class UntraceableError(Exception):
    """A module whose forward has no fixed graph; the message says why."""


def call_key(signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> CallKey | None:
    """Return how a forward with ``signature`` is called, or None where no fixed graph can describe it.

    Control flow hangs on None, booleans and strings, so these are part of the key; tensors, numbers and containers
    are not.

    Args:
        signature: Signature of the bound forward, without ``self``.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.

    Returns:
        The key, or None for a call that fills ``*args`` or does not fit the signature.

    Example:
        >>> def forward(image, mask=None, *, scale=2.0): ...
        >>> call_key(inspect.signature(forward), (torch.ones(1),), {"scale": 3.0})
        (('image', '<value>'), ('mask', None), ('scale', '<value>'))
    """
    arguments = call_arguments(signature, args, kwargs)
    return None if arguments is None else tuple((name, _constant_or_passed(arguments[name])) for name in arguments)


def call_arguments(
    signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Return the arguments of a call by name, defaults and the entries of ``**kwargs`` among them.

    Args:
        signature: Signature of the bound forward, without ``self``.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.

    Returns:
        The arguments, or None for a call that fills ``*args`` or does not fit the signature.

    Example:
        >>> def forward(image, scale=2.0, **settings): ...
        >>> call_arguments(inspect.signature(forward), (1,), {"size": 3})
        {'image': 1, 'scale': 2.0, 'size': 3}
    """
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError:
        return None
    bound.apply_defaults()
    found: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            found.update(value)
        elif kind is not inspect.Parameter.VAR_POSITIONAL:
            found[name] = value
        elif value:
            return None
    return found


def entry_key(signature: inspect.Signature) -> CallKey | None:
    """Return the key of a call that passes what has no default and leaves the rest at its default.

    Example:
        >>> def forward(image, mask=None): ...
        >>> entry_key(inspect.signature(forward))
        (('image', '<value>'), ('mask', None))
    """
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [
        name
        for name, parameter in signature.parameters.items()
        if parameter.default is inspect.Parameter.empty and parameter.kind not in variable
    ]
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds or any(
        signature.parameters[name].kind is inspect.Parameter.POSITIONAL_ONLY for name in required
    ):
        return None
    return call_key(signature, (), dict.fromkeys(required, 0))


def passed_parameters(key: CallKey) -> list[str]:
    """Return the names of the parameters whose values are known only when the module runs.

    Example:
        >>> passed_parameters((("image", "<value>"), ("mask", None)))
        ['image']
    """
    return [name for name, value in key if is_passed(value)]


def forward_signature(module: nn.Module) -> inspect.Signature:
    """Return the signature of the forward that the class of ``module`` defines, without ``self``.

    Example:
        >>> list(forward_signature(nn.Linear(2, 2)).parameters)
        ['input']
    """
    signature = inspect.signature(type(module).forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def is_operator(module: nn.Module) -> bool:
    """Tell whether ``module`` counts as one operation: its forward was written in `torch.nn`, and it calls no other.

    Example:
        >>> is_operator(nn.Conv2d(1, 1, 1)), is_operator(nn.Sequential())
        (True, False)
    """
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return False
    if isinstance(module, torch.jit.ScriptModule):
        return True  # compiled already, and closed
    if has_own_forward(module) or any(name != "parametrizations" for name, _ in module.named_children()):
        return False
    owner = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    return owner.__module__.startswith("torch.nn.")


def _fits_always(values: Sequence[Any]) -> bool:
    return True


@dataclass(eq=False)
class Trace:
    """The graphs of one module for one way of calling it.

    Attributes:
        path: Name of the module in the model, as of ``named_modules()``.
        module: The module itself.
        key: How it is called.
        evaluation: Graph in eval mode: the one that ships.
        training: Graph in train mode; it may differ by dropout, auxiliary heads and the like.
        is_exact: Whether the graphs give the module's own bits; False where the forward of a module of torch was
            traced in an equivalent form.
        fits: Tells whether the graphs stand for a call with these values.
    """

    path: str
    module: nn.Module
    key: CallKey
    evaluation: fx.Graph
    training: fx.Graph
    is_exact: bool = True
    fits: Callable[[Sequence[Any]], bool] = field(default=_fits_always)


def trace_module(module: nn.Module, key: CallKey, path: str = "") -> Trace:
    """Trace the forward of ``module`` alone, in eval and in train mode, with all its children as leaves.

    Args:
        module: A module whose forward is not one of `torch.nn`.
        key: How it is called: constants are traced as such.
        path: Name of the module in the model.

    Returns:
        The two graphs.

    Raises:
        UntraceableError: If the forward has no fixed graph: control flow on values, tensors or random numbers made
            while it ran, or attributes that it sets.

    Example:
        >>> trace = trace_module(nn.Sequential(nn.ReLU(), nn.Flatten()), (("input", "<value>"),))
        >>> [node.op for node in trace.evaluation.nodes]
        ['placeholder', 'call_module', 'call_module', 'output']
    """
    if has_own_forward(module):
        raise UntraceableError("its forward was set on the module itself, and not by its class")
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    equivalent = equivalent_of(module)
    forward = type(module).forward if equivalent is None else equivalent.forward
    try:
        evaluation = _trace_forward(module.eval(), forward, key)
        training = _trace_forward(module.train(), forward, key)
    finally:
        for submodule, mode in modes:
            submodule.training = mode
    if equivalent is None:
        return Trace(path, module, key, evaluation, training)
    return Trace(path, module, key, evaluation, training, equivalent.is_exact, equivalent.fits)


def _trace_forward(module: nn.Module, forward: Callable[..., Any], key: CallKey) -> fx.Graph:
    generators = _Generators()
    attributes = _Attributes(module)
    # Where shapes are followed, children run on tensors without data, and nothing of that may stay with them.
    children = [_Attributes(child) for child in module.modules() if child is not module] if is_shaped(key) else []
    for child in children:
        vars(child.module).update(_forward_hooks=OrderedDict(), _forward_pre_hooks=OrderedDict())
    changed = None
    try:
        graph = _graph_of(module, forward, key)
    finally:
        for child in children:
            child.restore()
        changed = attributes.restore()
        drew = generators.restore()
    if drew:
        raise UntraceableError("its forward draws random numbers that a graph would freeze")
    if changed is not None:
        raise UntraceableError(f"its forward changes its attribute `{changed}`, which a graph would leave out")
    for node in graph.nodes:
        if node.op == "call_function" and is_opaque(node.target) and not node.users:
            raise UntraceableError(f"it calls `{node.target.__name__}` for what that changes, which no graph tells")
        node.meta.pop("is_wrapped", None)  # functions registered with `torch.fx.wrap` are not registered once more
    written = functionalize_(graph, module)
    if written is not None:
        raise UntraceableError(f"it writes into a part of `{written}`, which others may read")
    return graph


def _graph_of(module: nn.Module, forward: Callable[..., Any], key: CallKey) -> fx.Graph:
    tracers = (_RecordingTracer, _ShapedTracer) if is_shaped(key) else (_ShallowTracer,)
    reason = None
    for tracer in tracers:
        try:
            with _silent_attempts():
                return tracer(forward, dict(key)).trace(module)
        except UntraceableError as error:
            reason = reason or error
        except Exception as error:  # user code on proxies may raise anything at all: whatever it is, a graph is missing
            first_line = str(error).strip().splitlines()[0] if str(error) else ""
            reason = reason or UntraceableError(f"{type(error).__name__}: {first_line}")
            reason.__cause__ = reason.__cause__ or error
    assert reason is not None
    raise reason


@contextmanager
def _silent_attempts() -> Iterator[None]:
    """Keep torch from printing the trace of what fails on tensors without data: that is an answer here."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was_disabled


class _Generators:
    """The states of the generators of random numbers, of torch, Python and numpy."""

    def __init__(self) -> None:
        self.torch, self.python = torch.get_rng_state(), random.getstate()
        self.numpy: tuple[Any, ...] = np.random.get_state(legacy=True)  # type: ignore[assignment]

    def restore(self) -> bool:
        """Set them as they were; tell whether any number was drawn since."""
        now = _Generators()
        torch.set_rng_state(self.torch)
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        # The third part of numpy's state counts the numbers drawn from the second.
        same = torch.equal(self.torch, now.torch) and self.python == now.python and self.numpy[2] == now.numpy[2]
        return not same


class _Attributes:
    """The attributes of a module, to be put back after its forward ran on stand-ins for tensors."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.values = dict(vars(module))
        self.entries = {name: copy.copy(value) for name, value in self.values.items() if type(value) in (list, dict)}
        buffers = {name: buffer for name, buffer in module._buffers.items() if buffer is not None}
        self.buffers = [(name, buffer, buffer.clone(), buffer._version) for name, buffer in buffers.items()]

    def restore(self) -> str | None:
        """Put everything back; return the name of an attribute that had changed, or None."""
        own = vars(self.module)
        changed = [name for name in own if name not in self.values or own[name] is not self.values[name]]
        changed += [name for name in self.values if name not in own]
        for name in changed:
            own.pop(name, None)
            if name in self.values:
                own[name] = self.values[name]
        for name, entries in self.entries.items():
            if not _holds_the_same(own[name], entries):
                changed.append(_changed_entry(own[name], entries) if name == "_buffers" else name)
                own[name].clear()
                if isinstance(entries, dict):
                    own[name].update(entries)
                else:
                    own[name].extend(entries)
        for name, buffer, value, version in self.buffers:
            if buffer._version != version:
                changed.append(name)
                with torch.no_grad():
                    buffer.copy_(value)
        return changed[0] if changed else None


def _changed_entry(container: dict[str, Any], entries: dict[str, Any]) -> str:
    return next(name for name in {**entries, **container} if container.get(name) is not entries.get(name))


def _holds_the_same(container: Any, entries: Any) -> bool:
    if len(container) != len(entries):
        return False
    if isinstance(entries, dict):
        return all(name in container and container[name] is entry for name, entry in entries.items())
    return all(one is other for one, other in zip(container, entries, strict=True))


def overwritten_parameters(trace: Trace) -> set[str]:
    """Return the names of the parameters of a forward whose values it overwrites.

    Example:
        >>> overwritten_parameters(trace_module(nn.Sequential(nn.ReLU(inplace=True)), (("input", "<value>"),)))
        {'input'}
    """
    names = passed_parameters(trace.key)
    found = set()
    for graph in (trace.evaluation, trace.training):
        parameters = dict(zip((node for node in graph.nodes if node.op == "placeholder"), names, strict=True))
        for node in graph.nodes:
            if is_in_place(node, trace.module):
                found.add(parameters.get(memory_of(node, trace.module), ""))
    return found - {""}


class _ShallowTracer(fx.Tracer):
    """Traces one forward: every child is a leaf, and constants of the call stay constants."""

    proxy_buffer_attributes = True
    """What a forward computes from buffers is part of its graph."""

    def __init__(self, forward: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self._forward = forward
        self._arguments = arguments

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        values = {
            name: self.create_proxy("placeholder", name, (), {}) if is_passed(value) else value
            for name, value in self._arguments.items()
        }
        signature = inspect.signature(self._forward)
        positional_only = [
            values.pop(name)
            for name, parameter in signature.parameters.items()
            if parameter.kind is inspect.Parameter.POSITIONAL_ONLY and name in values
        ]

        def call(root: nn.Module) -> Any:
            return self._forward(root, *positional_only, **values)

        return call, [self.root]

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any) -> Any:
        if kind == "call_function" and is_opaque(target) and takes_weights(args, kwargs):
            raise UntraceableError(f"it hands weights to the function `{target.__name__}`, which has no graph")
        return super().create_proxy(kind, target, args, kwargs, *rest, **named)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter) and not self._is_owned(a):
            raise UntraceableError("its forward makes a tensor that a graph would freeze")
        if isinstance(a, dict) and is_dataclass(a):
            # The tracer would take it for a plain dict, which has neither attributes nor positions.
            entries = {entry.name: self.create_arg(getattr(a, entry.name)) for entry in fields(a)}
            return self.create_node("call_function", type(a), (), entries)
        return super().create_arg(a)

    def _is_owned(self, tensor: Tensor) -> bool:
        return tensor in self.tensor_attrs or any(tensor is buffer for buffer in self.root.buffers())


class _ShapedTracer(ShapedTracing, _ShallowTracer):
    """Traces one forward for the shapes of its arguments."""

    def __init__(self, forward: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
        super().__init__(forward, arguments)
        self.described = {name: value for name, value in arguments.items() if is_passed(value)}
        self._mode = new_mode()


class _RecordingTracer(_ShapedTracer):
    """Traces one forward for the shapes of its arguments; tensors that it makes of numbers are made in its graph."""

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        with RecordedFactories(self):
            return super().trace(root, concrete_args)


def _constant_or_passed(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | str) else _PASSED
