"""The forward tap: which call in a user's step is the network's forward, found without any convention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_compress.distillation import FeatureEar, Features, FeatureTap
from lightning_compress.errors import CompressionError
from lightning_compress.selection import weight_layers


@dataclass(frozen=True)
class ForwardCall:
    """One call of the network.

    Args:
        name: Name of the called submodule as of ``named_modules()``; empty for the LightningModule itself.
        args: Positional arguments it got.
        kwargs: Keyword arguments it got.
        output: What it returned.
        features: What its modules returned that were asked for, by name.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    features: Features = field(default_factory=dict)


class ForwardTap:
    """Hears the outermost calls of a module and of its children, and tells which of them are the network's forward.

    A call of the LightningModule itself is it. Where a step makes none, the one called direct child that holds every
    convolution and linear layer (every parameter, where there are no such layers) is it. With ``module`` it is that
    submodule. Between :meth:`start` and :meth:`reset` calls are kept with their tensors; otherwise nothing is.

    Copies and pickles of the module carry hooks that hear nothing.

    Args:
        pl_module: The user's LightningModule.
        module: Name of the submodule whose calls to hear, as of ``named_modules()``; None to find it.
        features: Names of modules of ``pl_module`` whose outputs to keep with every call, see `FeatureTap`.

    Raises:
        ValueError: If ``pl_module`` has no submodule of that name.

    Example:
        >>> import torch
        >>> model = nn.ModuleDict({"net": nn.Linear(2, 1)})
        >>> tap = ForwardTap(model)
        >>> with tap.recording():
        ...     output = model["net"](torch.zeros(3, 2))
        ...     [(call.name, call.args[0].shape) for call in tap.calls()]
        [('net', torch.Size([3, 2]))]
        >>> tap.remove()
    """

    def __init__(self, pl_module: nn.Module, module: str | None = None, features: Sequence[str] = ()) -> None:
        self._owner = type(pl_module).__name__
        self._module = module
        self._children = dict(_called_children("", pl_module))
        self._whole = {name for name, child in self._children.items() if _holds_the_network(child, pl_module)}
        self._features = FeatureTap(pl_module, features) if features else None
        self._log = _CallLog(features=self._features)
        heard = {"": pl_module, **self._children} if module is None else {module: _submodule(pl_module, module)}
        self._handles: list[RemovableHandle] = []
        for name, submodule in heard.items():
            if isinstance(submodule, torch.jit.ScriptModule):
                continue  # takes no hooks
            ear = _Ear(self._log, name)
            self._handles.append(submodule.register_forward_pre_hook(ear.enter, with_kwargs=True))
            self._handles.append(submodule.register_forward_hook(ear.leave, with_kwargs=True))

    def start(self) -> None:
        """Forget what was heard and keep calls from now on."""
        self._log.clear()
        self._log.recording = True

    def reset(self) -> None:
        """Forget what was heard and keep nothing from now on."""
        self._log.clear()
        self._log.recording = False

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep the calls made inside the block, for as long as the block lasts."""
        self.start()
        try:
            yield
        finally:
            self.reset()

    def remove(self) -> None:
        """Take every hook away; the tap is of no use afterwards."""
        self.reset()
        if self._features is not None:
            self._features.remove()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def roots(self) -> list[str]:
        """What the network may turn out to be: the module itself and the children that hold all layers, by name."""
        return ["", *sorted(self._whole)] if self._module is None else [self._module]

    def calls(self) -> list[ForwardCall]:
        """Return the network's calls since :meth:`start`, oldest first; at least one.

        Raises:
            CompressionError: If the network was not called, or it cannot be told which call is the network's.
        """
        calls = self.calls_so_far()
        if not calls:
            raise self._unknown(self._called())
        return calls

    def calls_so_far(self) -> list[ForwardCall]:
        """Return the network's calls since :meth:`start`, oldest first; none as long as it is unknown."""
        called = self._called()
        if self._module is not None or "" in called:
            networks = [name for name in called if name == (self._module or "")]
        else:
            networks = [name for name in called if name in self._whole]
        return [call for call in self._log.calls if networks == [call.name]]

    def _called(self) -> list[str]:
        return list(dict.fromkeys(call.name for call in self._log.calls))

    def _unknown(self, called: list[str]) -> CompressionError:
        if self._module is not None:
            return CompressionError(
                f"The step never called `{self._module}` of `{self._owner}`, which `module=` points at: "
                f"name the submodule that the step calls."
            )
        if not called:
            return CompressionError(
                f"The step called neither `{self._owner}` itself nor one of its children "
                f"({_listing(list(self._children))}), so the network's forward is unknown: "
                f'call `self(...)`, or name the submodule that the step calls with `module="..."`.'
            )
        return CompressionError(
            f"The step called {_listing(called)} of `{self._owner}`, not exactly one of which is the whole network: "
            f'call `self(...)`, or name the network with `module="{called[0]}"`.'
        )


def remove_copied_hooks(module: nn.Module) -> None:
    """Take off ``module`` the deaf hooks that a copy or a pickle made during a fit has brought along.

    Example:
        >>> import copy
        >>> net = nn.Linear(2, 1)
        >>> tap = ForwardTap(net)
        >>> copied = copy.deepcopy(net)
        >>> remove_copied_hooks(copied)
        >>> len(net._forward_hooks), len(copied._forward_hooks)
        (1, 0)
    """
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key, hook in list(hooks.items()):
            ear = getattr(hook, "__self__", None)
            if isinstance(ear, _Ear | FeatureEar) and ear.log.is_copy:
                _forget_hook(module, key)


def _forget_hook(module: nn.Module, key: int) -> None:
    for hooks in (
        module._forward_hooks,
        module._forward_hooks_with_kwargs,
        module._forward_hooks_always_called,
        module._forward_pre_hooks,
        module._forward_pre_hooks_with_kwargs,
    ):
        hooks.pop(key, None)


@dataclass
class _Frame:
    """A call that has not returned yet."""

    module: nn.Module
    forward: Callable[..., Any]

    def is_redirected(self) -> bool:
        """Tell whether this call only carries a whole step, as under DDP.

        Lightning then swaps the LightningModule's ``forward`` for the step, and back as soon as it has been entered.
        """
        return self.module.forward != self.forward


@dataclass
class _CallLog:
    """What the hooks of one tap have heard; a copy is deaf and empty."""

    is_copy: bool = False
    recording: bool = False
    calls: list[ForwardCall] = field(default_factory=list)
    frames: list[_Frame] = field(default_factory=list)
    features: FeatureTap | None = None

    def __reduce__(self) -> tuple[type[_CallLog], tuple[bool]]:
        return _CallLog, (True,)

    def clear(self) -> None:
        self.calls.clear()
        self.frames.clear()
        if self.features is not None:
            self.features.stop()


@dataclass(frozen=True)
class _Ear:
    """The hooks of one module."""

    log: _CallLog
    name: str

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.log.recording:
            return
        frame = _Frame(module, module.forward)
        if self.log.features is not None and not frame.is_redirected() and self._is_outermost():
            self.log.features.clear()
        self.log.frames.append(frame)

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self.log.recording or not self.log.frames:
            return
        frame = self.log.frames.pop()
        if self._is_outermost() and not frame.is_redirected():
            features = {} if self.log.features is None else self.log.features.take()
            self.log.calls.append(ForwardCall(self.name, args, kwargs, output, features))

    def _is_outermost(self) -> bool:
        return all(outer.is_redirected() for outer in self.log.frames)


def _called_children(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the direct children that own parameters; lists and dicts of modules are never called, their entries are."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _called_children(f"{prefix}{name}.", child)
        elif next(child.parameters(), None) is not None:
            yield f"{prefix}{name}", child


def _holds_the_network(child: nn.Module, pl_module: nn.Module) -> bool:
    layers = set(weight_layers(pl_module).values())
    if layers:
        return layers <= set(child.modules())
    return set(pl_module.parameters()) <= set(child.parameters())


def _submodule(pl_module: nn.Module, name: str) -> nn.Module:
    modules: dict[str, nn.Module] = dict(pl_module.named_modules())
    if name not in modules:
        known = [known for known in modules if known]
        near = get_close_matches(name, known, n=3, cutoff=0.5) or known[:8]
        raise ValueError(
            f"`module={name!r}` is not a submodule of `{type(pl_module).__name__}`, "
            f"whose nearest names are {_listing(near)}."
        )
    return modules[name]


def _listing(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"
