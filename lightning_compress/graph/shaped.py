"""Tracing with shapes: the graph of a forward whose control flow hangs on the sizes of what it is given.

Every value is followed for several batch sizes at once, on tensors without data. A size that is the same for all is a
plain number; one that differs comes from the batch and stays symbolic, and so does what is computed from it: a forward
that decides by it has no graph.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

BATCH_SIZES = (2, 67, 1)
"""The batch sizes for which a forward is followed; for the last only as far as it goes."""

N_REQUIRED = 2
"""How many of them it must take."""

_LAYOUT = ("is_contiguous", "stride", "data_ptr", "storage_offset", "untyped_storage")
"""What a tensor tells of its memory, which a graph leaves open."""

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
    dtype, device = str(argument.dtype).removeprefix("torch."), argument.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype += f"@{str(torch.get_autocast_dtype(device)).removeprefix('torch.')}"
    return f"{_MARK}{','.join(sizes)}:{dtype}"


def in_float32(key: tuple[tuple[str, Any], ...]) -> tuple[tuple[str, Any], ...]:
    """Return ``key`` as it is for the same call in float32.

    Example:
        >>> in_float32((("x", "<value>:?,3:float32@bfloat16"), ("ids", "<value>:?:int64")))
        (('x', '<value>:?,3:float32'), ('ids', '<value>:?:int64'))
    """
    return tuple((name, _in_float32(value)) for name, value in key)


def _in_float32(value: Any) -> Any:
    if not isinstance(value, str) or not value.startswith(_MARK):
        return value
    sizes, _, dtype = value.rpartition(":")
    dtype = dtype.partition("@")[0]
    return f"{sizes}:{'float32' if getattr(torch, dtype).is_floating_point else dtype}"


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
        >>> import inspect
        >>> is_opaque(torch.relu), is_opaque(torch.nn.functional.relu), is_opaque(inspect.signature)
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
    """Stands for a value that is known, up to the data of tensors, for several batch sizes.

    Args:
        node: Its node.
        tracer: Its tracer.
        values: The value for each of `BATCH_SIZES`.
        hangs: Whether it is a number that hangs on the batch.
    """

    def __init__(self, node: fx.Node, tracer: Any, values: tuple[Any, ...], hangs: bool = False) -> None:
        super().__init__(node, tracer)
        self.__dict__["_values"] = values
        self.__dict__["_hangs"] = hangs

    def __getattr__(self, name: str) -> Any:
        if name == "shape":
            return self._sizes()
        if name in ("ndim", "dtype", "is_nested"):
            return getattr(self.__dict__["_values"][0], name)
        return super().__getattr__(name)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __len__(self) -> int:
        length = _common_length(self)
        if length is None:
            raise TypeError("The length of a value hangs on the batch.")
        return length

    def dim(self) -> int:
        """Return the number of dimensions."""
        return int(self.__dict__["_values"][0].dim())

    def size(self, dim: int | None = None) -> Any:
        """Return the size of one dimension, or of all."""
        sizes = self._sizes()
        return sizes if dim is None else sizes[dim]

    def _sizes(self) -> tuple[Any, ...]:
        shapes = [tuple(value.shape) for value in _known(self)]
        if shapes.count(shapes[0]) == len(shapes):
            return shapes[0]
        shape = super().__getattr__("shape")
        return tuple(
            int(sizes[0])
            if sizes.count(sizes[0]) == len(sizes)
            else self.tracer.create_proxy("call_function", operator.getitem, (shape, position), {})
            for position, sizes in enumerate(zip(*shapes, strict=True))
        )


def _known(proxy: ShapedProxy) -> list[Any]:
    return [value for value in proxy.__dict__["_values"] if value is not _UNKNOWN]


def _common_length(proxy: ShapedProxy) -> int | None:
    """Return the length of a value, or None if it has none or one that hangs on the batch."""
    lengths = {_length(value) for value in _known(proxy)}
    return lengths.pop() if len(lengths) == 1 else None


def _length(value: Any) -> int | None:
    if isinstance(value, Tensor):
        return int(value.shape[0]) if value.dim() else None
    return len(value) if hasattr(value, "__len__") else None


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
        if kind == "call_method" and target in _LAYOUT:
            raise TypeError(f"`{target}` hangs on how a tensor lies in memory.")
        versions = _versions(args)
        values = self._outcome(kind, target, args, kwargs)
        if hides and versions != _versions(args):  # it is called for what it changes
            return _marked(target(*args, **kwargs))
        plain = super().create_proxy(kind, target, args, kwargs, *rest, **named)  # type: ignore[misc]
        if values is None:
            return plain
        known = [value for value in values if value is not _UNKNOWN]
        if target is getattr or not all(_is_plain(value) for value in known):
            return ShapedProxy(plain.node, self, values)
        if known.count(known[0]) == len(known) and not _any_hangs(args, kwargs):
            return known[0]
        return ShapedProxy(plain.node, self, values, hangs=True)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Decide a branch on whether there is anything in a container."""
        if isinstance(obj, ShapedProxy) and isinstance(obj.__dict__["_values"][0], tuple | list):
            length = _common_length(obj)
            if length is not None:
                return length > 0
        return bool(super().to_bool(obj))  # type: ignore[misc]

    def iter(self, obj: fx.Proxy) -> Any:
        """Unpack a value whose length is known."""
        length = _common_length(obj) if isinstance(obj, ShapedProxy) else None
        if length is None:
            return super().iter(obj)  # type: ignore[misc]
        return iter([self.create_proxy("call_function", operator.getitem, (obj, i), {}) for i in range(length)])

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

    def _outcome(self, kind: str, target: Any, args: Any, kwargs: Any) -> tuple[Any, ...] | None:
        """Return what an operation gives for each batch size, or None where nothing is known of its arguments."""
        was_evaluating, self.is_evaluating = self.is_evaluating, True
        try:
            results = [self._evaluated(kind, target, args, kwargs, which) for which in range(N_REQUIRED)]
            try:
                results.append(self._evaluated(kind, target, args, kwargs, N_REQUIRED))
            except Exception:  # such as a batch norm that refuses to train on one value
                results.append(_UNKNOWN)
        finally:
            self.is_evaluating = was_evaluating
        return None if any(result is _UNKNOWN for result in results[:N_REQUIRED]) else tuple(results)

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
        with _autocast_of(self.described.values(), _device_of(root)), self._mode, torch.no_grad():
            if kind == "call_module":
                return root.get_submodule(target)(*args, **kwargs)
            if kind == "call_method":
                return getattr(args[0], target)(*args[1:], **kwargs)
            return target(*args, **kwargs)


def _autocast_of(described: Iterable[str], device: torch.device) -> torch.autocast:
    """Return the precision in which a call was described, also where another one is switched on just now."""
    names = [dtype.partition("@")[2] for dtype in described if "@" in dtype]
    dtype = getattr(torch, names[0]) if names else None
    kind = device.type if torch.amp.is_autocast_available(device.type) else "cpu"
    return torch.autocast(kind, dtype=dtype, enabled=bool(names), cache_enabled=False)


def _any_hangs(args: Any, kwargs: Any) -> bool:
    leaves = pytree.tree_leaves((args, kwargs))
    return any(isinstance(leaf, ShapedProxy) and leaf.__dict__["_hangs"] for leaf in leaves)


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
    dtype = dtype.partition("@")[0]
    if not dtype:
        return _UNKNOWN
    shape = [batch if size == "?" else int(size) for size in sizes.split(",") if size]
    with mode:
        return torch.empty(shape, dtype=getattr(torch, dtype), device=device)
