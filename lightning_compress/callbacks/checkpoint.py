"""How the state of our callbacks travels in a checkpoint: by the LightningModule's own two checkpoint hooks.

Lightning calls the module's ``on_save_checkpoint`` for weights-only checkpoints too, where it skips the callbacks',
and the module's ``on_load_checkpoint`` before the weights are loaded and the optimizers are built.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import lightning.pytorch as pl

from lightning_compress.callbacks.architecture import check_architecture

COMPRESSION_KEY = "lightning_compress"
"""The one top-level key of a checkpoint under which all our state lies."""

Save = Callable[[], dict[str, Any]]
Load = Callable[[dict[str, Any]], None]
Hook = Callable[[dict[str, Any]], None]
T = TypeVar("T")


def attach_state(pl_module: pl.LightningModule, key: str, save: Save, load: Load) -> None:
    """Make a state travel in every checkpoint of ``pl_module``, in ``checkpoint["lightning_compress"][key]``.

    The instance's ``on_save_checkpoint`` and ``on_load_checkpoint`` are wrapped, once for all states; the user's own
    hooks are called first, and a state attached again under its key replaces the one before.

    A checkpoint without the key was written by a run that had no such state: ``load({})`` is called then, and must
    leave what a fresh module has. A module that was trained before would go on with the masks of that run else.

    A deep copy or a pickle of the module carries a copy of the object whose methods ``save`` and ``load`` are, so
    that object should be a plain holder of the state rather than a callback, and neither may be a lambda or closure.

    Args:
        pl_module: The user's module.
        key: Name of the state, such as ``"pruning"``.
        save: Returns the state as a dict of tensors and plain Python types; a bound method.
        load: Takes over what ``save`` returned, and begins anew where that is an empty dict; a bound method of the
            same object.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> class Counter:
        ...     count = 3
        ...     def save(self): return {"count": self.count}
        ...     def load(self, saved): self.count = saved.get("count", 0)
        >>> model, counter, checkpoint = BoringModel(), Counter(), {}
        >>> attach_state(model, "counter", counter.save, counter.load)
        >>> model.on_save_checkpoint(checkpoint)
        >>> checkpoint
        {'lightning_compress': {'counter': {'count': 3}}}
        >>> model.on_load_checkpoint({"state_dict": {}})
        >>> counter.count
        0
    """
    carrier = _carrier(pl_module)
    if carrier is None:
        carrier = StateCarrier(pl_module)
        pl_module.on_save_checkpoint = carrier.on_save_checkpoint  # type: ignore[method-assign]
        pl_module.on_load_checkpoint = carrier.on_load_checkpoint  # type: ignore[method-assign]
    carrier.states[key] = (save, load)


def attached_state(pl_module: pl.LightningModule, key: str, kind: type[T]) -> T | None:
    """Return the object whose bound methods are attached under ``key``.

    Args:
        pl_module: The user's module.
        key: Name of the state.
        kind: The class that the object must have.

    Returns:
        The object, or None where nothing of that kind is attached.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> attached_state(BoringModel(), "pruning", dict) is None
        True
    """
    carrier = _carrier(pl_module)
    if carrier is None or key not in carrier.states:
        return None
    holder = getattr(carrier.states[key][0], "__self__", None)
    return holder if isinstance(holder, kind) else None


def detach_states(pl_module: pl.LightningModule) -> None:
    """Remove all attached states and give the module its own checkpoint hooks back.

    Args:
        pl_module: A module, with or without attached states.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> model = BoringModel()
        >>> attach_state(model, "empty", dict, print)
        >>> detach_states(model)
        >>> "on_save_checkpoint" in vars(model)
        False
    """
    carrier = _carrier(pl_module)
    if carrier is None:
        return
    for name, own in (("on_save_checkpoint", carrier.own_save), ("on_load_checkpoint", carrier.own_load)):
        delattr(pl_module, name)
        if own is not None:
            setattr(pl_module, name, own)


class StateCarrier:
    """The two checkpoint hooks of one module instance, with the states they carry.

    A class with bound methods and no closure, so that the module can still be deep-copied and pickled; the copy's
    hooks belong to the copy.

    Args:
        pl_module: The module whose hooks are to be wrapped.

    Attributes:
        states: The save and load function of each state by key.
        own_save: The ``on_save_checkpoint`` set on this very instance before, if there was one.
        own_load: The ``on_load_checkpoint`` set on this very instance before, if there was one.
    """

    def __init__(self, pl_module: pl.LightningModule) -> None:
        self.pl_module = pl_module
        self.states: dict[str, tuple[Save, Load]] = {}
        self.own_save: Hook | None = vars(pl_module).get("on_save_checkpoint")
        self.own_load: Hook | None = vars(pl_module).get("on_load_checkpoint")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Call the user's hook, then write all states into ``checkpoint``."""
        if self.own_save is not None:
            self.own_save(checkpoint)
        else:
            type(self.pl_module).on_save_checkpoint(self.pl_module, checkpoint)
        section = checkpoint.setdefault(COMPRESSION_KEY, {})
        for key, (save, _) in self.states.items():
            section[key] = save()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Call the user's hook, then hand each state what ``checkpoint`` holds for it: nothing, where it has no key."""
        if self.own_load is not None:
            self.own_load(checkpoint)
        else:
            type(self.pl_module).on_load_checkpoint(self.pl_module, checkpoint)
        if COMPRESSION_KEY in checkpoint and "state_dict" in checkpoint:
            check_architecture(self.pl_module, checkpoint["state_dict"])
        section = checkpoint.get(COMPRESSION_KEY, {})
        for key, (_, load) in self.states.items():
            load(section.get(key, {}))


def _carrier(pl_module: pl.LightningModule) -> StateCarrier | None:
    owner = getattr(vars(pl_module).get("on_save_checkpoint"), "__self__", None)
    return owner if isinstance(owner, StateCarrier) else None
