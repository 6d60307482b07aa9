"""Tracing with shapes: the graph of a forward whose control flow hangs on the sizes of what it is given.

Every value is followed for two batch sizes at once, on tensors without data. A size that is the same for both is a
plain number; one that differs comes from the batch and stays symbolic.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

BATCH_SIZES = (2, 3)
"""The batch sizes for which a forward is followed."""

_MARK = "<value>:"
_UNKNOWN = object()


def shaped_key(key: tuple[tuple[str, Any], ...], arguments: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Return ``key`` with whole numbers and the shape and type of every tensor, the size of the batch left open.

    Args:
        key: How a module is called, see `call_key`.
        arguments: The arguments of the call by name.

    Example:
        >>> arguments = {"x": torch.zeros(8, 3), "sizes": (3, 1)}
        >>> shaped_key((("x", "<value>"), ("sizes", "<value>")), arguments)
        (('x', '<value>:?,3:float32'), ('sizes', (3, 1)))
    """
    sizes = [argument.shape[0] for argument in arguments.values() if isinstance(argument, Tensor) and argument.dim()]
    batch = sizes[0] if sizes else None
    return tuple((name, _described(arguments.get(name), batch) if value == "<value>" else value) for name, value in key)


def _described(argument: Any, batch: Any) -> Any:
    if type(argument) is int:
        return argument
    if isinstance(argument, tuple) and argument and all(type(size) is int for size in argument):
        return tuple(argument)
    if not isinstance(argument, Tensor):
        return "<value>"
    sizes = [str(int(size)) for size in argument.shape[1:]]
    if argument.dim():
        sizes.insert(0, "?" if argument.shape[0] == batch else str(int(argument.shape[0])))
    # One graph for every precision: autocast trains in another than the one that is exported.
    dtype = torch.float32 if argument.is_floating_point() else argument.dtype
    return f"{_MARK}{','.join(sizes)}:{str(dtype).removeprefix('torch.')}"


def is_shaped(key: Sequence[tuple[str, Any]]) -> bool:
    """Tell whether ``key`` holds shapes.

    Example:
        >>> is_shaped((("x", "<value>:?,3:float32"),)), is_shaped((("x", "<value>"),))
        (True, False)
    """
    return any(isinstance(value, str) and value.startswith(_MARK) for _, value in key)


def is_passed(value: Any) -> bool:
    """Tell whether an entry of a key stands for a value that is known only when the module runs."""
    return isinstance(value, str) and value.startswith("<value>")


def is_opaque(target: Any) -> bool:
    """Tell whether a node calls a Python function of somebody else's, registered with `torch.fx.wrap`.

    Example:
        >>> is_opaque(torch.relu), is_opaque(torch.nn.functional.relu), is_opaque(lambda x: x)
        (False, False, True)
    """
    return isinstance(target, FunctionType) and target.__module__.partition(".")[0] not in (
        "torch",
        "lightning_compress",
    )


def takes_weights(args: Any, kwargs: Any) -> bool:
    """Tell whether there are weights among the arguments of a call, and other values."""
    leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, fx.Proxy)]
    return any(leaf.node.op == "get_attr" for leaf in leaves) and any(leaf.node.op != "get_attr" for leaf in leaves)


FACTORIES = frozenset(
    {
        torch.arange,
        torch.as_tensor,
        torch.eye,
        torch.full,
        torch.linspace,
        torch.ones,
        torch.tensor,
        torch.tril_indices,
        torch.triu_indices,
        torch.zeros,
    }
)
"""Functions that make a tensor of numbers: given the same ones, they make the same."""


class RecordedFactories(TorchFunctionMode):
    """While it is active, tensors that are made of numbers are recorded in a graph, and not made there and then.

    Args:
        tracer: What records them, with `ShapedTracing` mixed in.
    """

    def __init__(self, tracer: Any) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record ``func`` if it is one of `FACTORIES`."""
        kwargs = kwargs or {}
        is_free = func in FACTORIES and not self.tracer.is_evaluating
        if is_free and not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves((args, kwargs))):
            return self.tracer.create_proxy("call_function", func, args, kwargs)
        return func(*args, **kwargs)


class ShapedProxy(fx.Proxy):
    """Stands for a value whose shapes are known, for two batch sizes."""

    def __init__(self, node: fx.Node, tracer: Any, values: tuple[Any, Any]) -> None:
        super().__init__(node, tracer)
        self.__dict__["_values"] = values

    def __getattr__(self, name: str) -> Any:
        if name == "shape":
            return self._sizes()
        if name in ("ndim", "dtype", "is_nested"):
            return getattr(self.__dict__["_values"][0], name)
        return super().__getattr__(name)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __len__(self) -> int:
        values = self.__dict__["_values"]
        if len(values[0]) != len(values[1]):
            raise TypeError("The length of a value hangs on the batch.")
        return len(values[0])

    def dim(self) -> int:
        """Return the number of dimensions."""
        return int(self.__dict__["_values"][0].dim())

    def size(self, dim: int | None = None) -> Any:
        """Return the size of one dimension, or of all."""
        sizes = self._sizes()
        return sizes if dim is None else sizes[dim]

    def _sizes(self) -> tuple[Any, ...]:
        first, second = (tuple(value.shape) for value in self.__dict__["_values"])
        if first == second:
            return first
        shape = super().__getattr__("shape")
        return tuple(
            int(one)
            if one == other
            else self.tracer.create_proxy("call_function", operator.getitem, (shape, position), {})
            for position, (one, other) in enumerate(zip(first, second, strict=True))
        )


class ShapedTracing:
    """Mixed into a tracer: follows every value on tensors without data.

    Attributes:
        is_evaluating: Whether modules run for the shapes of their results, and nothing is to be recorded.
        described: Shapes and type of the argument for each parameter of the forward, as in a key.
    """

    described: Mapping[str, str]
    _mode: FakeTensorMode
    is_evaluating = False

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any) -> Any:
        """Record an operation; a result that is a plain number for every batch size is given as such."""
        hides = kind == "call_function" and is_opaque(target)
        if hides and takes_weights(args, kwargs):
            return _marked(target(*args, **kwargs))
        versions = _versions(args)
        values = self._outcome(kind, target, args, kwargs)
        if hides and versions != _versions(args):  # it is called for what it changes
            return _marked(target(*args, **kwargs))
        plain = super().create_proxy(kind, target, args, kwargs, *rest, **named)  # type: ignore[misc]
        if values is None:
            return plain
        if target is not getattr and _is_plain(values[0]) and values[0] == values[1]:
            return values[0]
        return ShapedProxy(plain.node, self, values)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Decide a branch where both batch sizes take the same one."""
        values = obj.__dict__.get("_values")
        if values is None or isinstance(values[0], Tensor) or bool(values[0]) != bool(values[1]):
            return bool(super().to_bool(obj))  # type: ignore[misc]
        return bool(values[0])

    def iter(self, obj: fx.Proxy) -> Any:
        """Unpack a value whose length is known."""
        values = obj.__dict__.get("_values")
        if values is None or not hasattr(values[0], "__len__") or len(values[0]) != len(values[1]):
            return super().iter(obj)  # type: ignore[misc]
        return iter([self.create_proxy("call_function", operator.getitem, (obj, i), {}) for i in range(len(values[0]))])

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call a child, for its shapes alone where that is what is asked."""
        if self.is_evaluating:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)  # type: ignore[misc]

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Read an attribute of a module, as it is where shapes are computed."""
        if self.is_evaluating:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)  # type: ignore[misc]

    def _outcome(self, kind: str, target: Any, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Return what an operation gives for either batch size, or None where nothing is known of its arguments."""
        was_evaluating, self.is_evaluating = self.is_evaluating, True
        try:
            results = tuple(self._evaluated(kind, target, args, kwargs, which) for which in range(2))
        finally:
            self.is_evaluating = was_evaluating
        return None if any(result is _UNKNOWN for result in results) else (results[0], results[1])

    def _evaluated(self, kind: str, target: Any, args: Any, kwargs: Any, which: int) -> Any:
        root: nn.Module = self.root  # type: ignore[attr-defined]
        if kind == "placeholder":
            return _example(self.described[target], BATCH_SIZES[which], self._mode, _device_of(root))
        if kind == "get_attr":
            value: Any = root
            for part in target.split("."):
                value = getattr(value, part)
            return self._mode.from_tensor(value) if isinstance(value, Tensor) else value
        leaves, spec = pytree.tree_flatten((args, kwargs))
        found = [_value_of(leaf, which) for leaf in leaves]
        if any(value is _UNKNOWN for value in found):
            return _UNKNOWN
        args, kwargs = pytree.tree_unflatten(found, spec)
        with self._mode, torch.no_grad():
            if kind == "call_module":
                return root.get_submodule(target)(*args, **kwargs)
            if kind == "call_method":
                return getattr(args[0], target)(*args[1:], **kwargs)
            return target(*args, **kwargs)


def new_mode() -> FakeTensorMode:
    """Return a mode in which tensors have shapes and no data; parameters are taken for such."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str | torch.dtype)


class _Results(tuple[Any, ...]):
    """Several results of a function, or none, with the mark that `torch.fx.wrap` wants to make on one."""

    node = SimpleNamespace(meta={})


def _marked(result: Any) -> Any:
    if result is None or isinstance(result, tuple | list):
        return _Results(result or ())
    return result


def _versions(args: Any) -> list[int]:
    values = [leaf.__dict__["_values"][0] for leaf in pytree.tree_leaves(args) if isinstance(leaf, ShapedProxy)]
    return [value._version for value in values if isinstance(value, Tensor)]


def _value_of(leaf: Any, which: int) -> Any:
    if isinstance(leaf, ShapedProxy):
        return leaf.__dict__["_values"][which]
    if isinstance(leaf, fx.proxy.Attribute) and isinstance(leaf.root, ShapedProxy):
        return getattr(leaf.root.__dict__["_values"][which], leaf.attr)
    return _UNKNOWN if isinstance(leaf, fx.Proxy) else leaf


def _device_of(module: nn.Module) -> torch.device:
    tensors = [*module.parameters(), *module.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


def _example(description: str, batch: int, mode: FakeTensorMode, device: torch.device) -> Any:
    sizes, _, dtype = description.removeprefix(_MARK).partition(":")
    if not dtype:
        return _UNKNOWN
    shape = [batch if size == "?" else int(size) for size in sizes.split(",") if size]
    with mode:
        return torch.empty(shape, dtype=getattr(torch, dtype), device=device)
