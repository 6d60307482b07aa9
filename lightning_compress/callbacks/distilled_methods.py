"""The methods of a user's module that distillation joins: what stands in for them during a fit."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from typing_extensions import override

if TYPE_CHECKING:
    from lightning_compress.callbacks.distillation import KnowledgeDistillation


class Wrapper(ABC):
    """Stands in for a bound method of the user's; copies and pickles hold the user's method instead.

    Lightning reads the signature of ``training_step`` through ``__wrapped__``.
    """

    method: str

    def __init__(self, owner: KnowledgeDistillation, pl_module: pl.LightningModule) -> None:
        self.owner: KnowledgeDistillation | None = owner
        self.pl_module = pl_module
        self.original: Callable[..., Any] = getattr(pl_module, self.method)
        self.replaced = pl_module.__dict__.get(self.method)  # None: the class's method
        functools.update_wrapper(self, self.original, updated=())
        # Lightning unwraps once only: a decorated step must look as it looked without us.
        self.__wrapped__ = getattr(self.original, "__wrapped__", self.original)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _itself, (self.original,)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the user's method, with the owner's part where there is an owner."""
        if self.owner is None:
            return self.original(*args, **kwargs)
        return self.call_with(self.owner, *args, **kwargs)

    @abstractmethod
    def call_with(self, owner: KnowledgeDistillation, *args: Any, **kwargs: Any) -> Any:
        """Call the user's method with the owner's term."""


class _DistilledStep(Wrapper):
    method = "training_step"

    @override
    def call_with(self, owner: KnowledgeDistillation, *args: Any, **kwargs: Any) -> Any:
        return owner.training_step(self.pl_module, self.original, args, kwargs)


class _DistilledOptimizers(Wrapper):
    method = "configure_optimizers"

    @override
    def call_with(self, owner: KnowledgeDistillation, *args: Any, **kwargs: Any) -> Any:
        return owner.configure_optimizers(self.original)


class _DistilledBackward(Wrapper):
    method = "manual_backward"

    @override
    def call_with(self, owner: KnowledgeDistillation, *args: Any, **kwargs: Any) -> Any:
        return owner.manual_backward(self.pl_module, self.original, *args, **kwargs)


WRAPPERS = (_DistilledStep, _DistilledBackward, _DistilledOptimizers)


def _itself(method: Callable[..., Any]) -> Callable[..., Any]:
    return method


def uncover_own_methods(pl_module: pl.LightningModule) -> None:
    """Take off a copy of a module, made during a fit, the methods of its class that stand where our wrappers stood.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> model = BoringModel()
        >>> model.training_step = model.training_step
        >>> uncover_own_methods(model)
        >>> "training_step" in vars(model)
        False
    """
    for kind in WRAPPERS:
        found = vars(pl_module).get(kind.method)
        if found is not None and found == getattr(type(pl_module), kind.method).__get__(pl_module):
            delattr(pl_module, kind.method)


def take_off_silent_wrappers(pl_module: pl.LightningModule, method: str) -> None:
    """Uncover the method beneath wrappers without an owner; one that others have wrapped stays, and passes through."""
    while isinstance(top := pl_module.__dict__.get(method), Wrapper) and top.owner is None:
        if top.replaced is None:
            delattr(pl_module, method)
        else:
            setattr(pl_module, method, top.replaced)
