"""The methods of a user's module that distillation joins: what stands in for them during a fit."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden
from typing_extensions import override

if TYPE_CHECKING:
    from lightning_compress.callbacks.distillation import KnowledgeDistillation


Host = pl.LightningModule | pl.LightningDataModule


class Wrapper(ABC):
    """Stands in for a bound method of the user's; copies and pickles hold the user's method instead.

    Lightning reads the signature of ``training_step``, and whether a hook is the user's, through ``__wrapped__``.

    Args:
        owner: The callback that joins the method.
        host: Whose method it is.
        pl_module: The module that is trained.
    """

    method: str

    def __init__(self, owner: KnowledgeDistillation, host: Host, pl_module: pl.LightningModule) -> None:
        self.owner: KnowledgeDistillation | None = owner
        self.host = host
        self.pl_module = pl_module
        self.original: Callable[..., Any] = getattr(host, self.method)
        self.replaced = host.__dict__.get(self.method)  # None: the class's method
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


class _UnnumberedBatch(Wrapper):
    method = "on_before_batch_transfer"

    @override
    def call_with(self, owner: KnowledgeDistillation, *args: Any, **kwargs: Any) -> Any:
        return self.original(*owner.without_numbers(args, self.pl_module.trainer.training), **kwargs)


_OF_MODULES = (_DistilledStep, _DistilledBackward, _DistilledOptimizers)


def join_methods(owner: KnowledgeDistillation, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[Wrapper]:
    """Put a wrapper in the place of every method that distillation joins.

    Args:
        owner: The callback.
        trainer: The Trainer of the fit.
        pl_module: The module that is trained.

    Returns:
        The wrappers, to be given to `leave_methods`.
    """
    wrappers: list[Wrapper] = [wrapper(owner, pl_module, pl_module) for wrapper in _OF_MODULES]
    for wrapper in wrappers:
        setattr(wrapper.host, wrapper.method, wrapper)
    return [*wrappers, *join_batches(owner, trainer, pl_module)]


def join_batches(owner: KnowledgeDistillation, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[Wrapper]:
    """Put a wrapper in the place of the first hook that sees a batch, see `join_methods`."""
    data: pl.LightningDataModule | None = getattr(trainer, "datamodule", None)
    # As Lightning chooses whose hook it calls.
    host = data if data is not None and is_overridden(_UnnumberedBatch.method, data) else pl_module
    wrapper = _UnnumberedBatch(owner, host, pl_module)
    setattr(host, wrapper.method, wrapper)
    return [wrapper]


def leave_methods(wrappers: Sequence[Wrapper]) -> None:
    """Give the user's methods back; a wrapper that others have wrapped stays, and passes through."""
    for wrapper in wrappers:
        wrapper.owner = None
        _take_off_silent_wrappers(wrapper.host, wrapper.method)


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
    for kind in (*_OF_MODULES, _UnnumberedBatch):
        found = vars(pl_module).get(kind.method)
        if found is not None and found == getattr(type(pl_module), kind.method).__get__(pl_module):
            delattr(pl_module, kind.method)


def _take_off_silent_wrappers(host: Host, method: str) -> None:
    while isinstance(top := host.__dict__.get(method), Wrapper) and top.owner is None:
        if top.replaced is None:
            delattr(host, method)
        else:
            setattr(host, method, top.replaced)
