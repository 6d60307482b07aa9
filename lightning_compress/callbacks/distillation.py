"""Knowledge distillation during a fit: the teacher's softened answers join the user's own loss."""

from __future__ import annotations

import functools
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from typing_extensions import override

from lightning_compress.callbacks.forward_tap import ForwardCall, ForwardTap
from lightning_compress.callbacks.random_state import RandomState, attach_random_state
from lightning_compress.callbacks.trainers import check_trainer
from lightning_compress.distillation import (
    FrozenTeacher,
    LogitDistillation,
    OutputSelector,
    check_selector,
    load_weights,
    select_logits,
)
from lightning_compress.errors import CompressionError
from lightning_compress.settings import plain


class KnowledgeDistillation(Callback):
    """Train with ``loss + weight * T^2 * KL(teacher || student)`` (Hinton et al. 2015, arXiv:1503.02531).

    ``loss`` is what the LightningModule's ``training_step`` returns, or hands to ``manual_backward``; it stays as the
    user wrote it. The student's logits are what the network's forward returned inside ``training_step``; the teacher
    gets the same arguments. A step that calls the network several times gets the mean over these calls; calls whose
    output needs no gradient do not count.

    The teacher is frozen, in eval mode, and no part of the LightningModule: neither checkpoints nor optimizers, DDP,
    averaged weights or summaries know of it. After the fit it is given back as it came. The term that was added is
    logged as ``compress/distillation_loss``.

    Args:
        teacher: A trained network; any ``nn.Module`` or LightningModule that takes the student's inputs.
        temperature: Softness ``T`` of both distributions, above 0.
        weight: Factor in front of the distillation term, at least 0.
        output: Where the logits, of shape ``(N, C)`` or ``(N, C, *spatial)``, are in what the networks return: a key
            or attribute (str), a position (int), or a function of the output. By default the output itself where it
            is a tensor, else its ``logits``.
        module: Name of the submodule that is the student's network, where it cannot be found: by default the
            LightningModule itself if the step calls it, else the one child that holds all layers.
        teacher_checkpoint: A file with the teacher's weights, of a Trainer or of `torch.save`, to be loaded into
            ``teacher`` first; also where the teacher was a part of the module that was saved.

    Raises:
        CompressionError: If ``teacher_checkpoint`` does not hold the teacher's weights.
        TypeError: If ``teacher`` is not an ``nn.Module`` or ``output`` cannot select.
        ValueError: If ``temperature`` or ``weight`` is out of range.

    Example:
        >>> teacher = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
        >>> callback = KnowledgeDistillation(teacher, temperature=4.0, weight=0.7)
        >>> trainer = pl.Trainer(max_epochs=3, callbacks=[callback], logger=False)  # trainer.fit(model, loader)
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        temperature: float = 4.0,
        weight: float = 0.7,
        output: OutputSelector = None,
        module: str | None = None,
        teacher_checkpoint: str | os.PathLike[str] | None = None,
    ) -> None:
        check_selector(output)
        if teacher_checkpoint is not None:
            load_weights(teacher, teacher_checkpoint)
        self._teacher = FrozenTeacher(teacher)
        self._loss = LogitDistillation(*plain((temperature, weight)))
        self._output = output
        self._module = module
        self._tap: ForwardTap | None = None
        self._n_used_calls = 0
        self._saw_manual_backward = False
        self._was_added = False
        self._wrappers: list[_Wrapper] = []
        self._random = RandomState()

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Freeze the teacher and put the term into the module's step."""
        if stage != "fit":
            return
        check_trainer(trainer, self)
        self._release(pl_module)  # what a fit that was cut off may have left
        self._random = attach_random_state(pl_module)
        self._teacher.check_apart_from(pl_module)
        self._teacher.freeze()
        self._saw_manual_backward = self._was_added = False
        self._wrappers = [_DistilledStep(self, pl_module), _DistilledBackward(self, pl_module)]
        for wrapper in self._wrappers:
            setattr(pl_module, wrapper.method, wrapper)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen to the network, whose layers all exist only now."""
        self._listen_to(pl_module)
        self._random.restore()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let random numbers go on where a checkpoint left them."""
        self._random.begin(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the hooks away, so that an export at the end of the fit sees the user's module."""
        self._random.is_training = False
        self._stop_listening()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give back module and teacher: after an exception Lightning calls no ``teardown``."""
        self._random.interrupt()
        self._release(pl_module)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give back module and teacher."""
        self._release(pl_module)

    def training_step(
        self,
        pl_module: pl.LightningModule,
        user_step: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run the user's step; under automatic optimization, add the term to the loss it returns.

        Args:
            pl_module: The LightningModule that is trained.
            user_step: Its own ``training_step``.
            args: Positional arguments of the step.
            kwargs: Keyword arguments of the step.

        Returns:
            What the user's step returned, with the term added to the loss.

        Raises:
            CompressionError: If the step returned something without a loss, or never called the network.
        """
        # The tuner replaces the callbacks for a while: the first step may come before `on_fit_start`.
        tap = self._listen_to(pl_module)
        self._n_used_calls = 0
        steps_before = pl_module.trainer.global_step
        with tap.recording():
            output = user_step(*args, **kwargs)
            if not pl_module.automatic_optimization:
                self._check_manual_step(pl_module, tap, steps_before)
                return output
            if output is None:  # the user skips this batch
                return None
            loss = _loss_of(output)
            term = self._term(pl_module, tap.calls())
        if term is None:
            raise CompressionError(
                f"No output of the network's forward in `training_step` of `{type(pl_module).__name__}` needs a "
                f"gradient, so there is nothing to distil into: call the network outside of `torch.no_grad()`."
            )
        return {**output, "loss": loss + term} if isinstance(output, Mapping) else loss + term

    def manual_backward(
        self, pl_module: pl.LightningModule, user_backward: Callable[..., None], loss: Tensor, *args: Any, **kwargs: Any
    ) -> None:
        """Add the term of the network's calls since the last backward, under manual optimization.

        Args:
            pl_module: The LightningModule that is trained.
            user_backward: Its own ``manual_backward``.
            loss: The user's loss.
            *args: Further arguments of ``manual_backward``.
            **kwargs: Further arguments of ``manual_backward``.
        """
        self._saw_manual_backward = True
        calls = self._listen_to(pl_module).calls_so_far()
        # A second backward after one forward, as a GAN's, must not count the term twice.
        new_calls, self._n_used_calls = calls[self._n_used_calls :], len(calls)
        term = self._term(pl_module, new_calls)
        user_backward(loss if term is None else loss + term, *args, **kwargs)

    def _term(self, pl_module: pl.LightningModule, calls: list[ForwardCall]) -> Tensor | None:
        """Return the mean term of the calls whose logits need a gradient, or None where there are none."""
        selected = [(call, select_logits(call.output, self._output, "student")) for call in calls]
        learning = [(call, logits) for call, logits in selected if logits.requires_grad]
        if not learning:
            return None
        self._teacher.move_to(pl_module.device, _dtype_of(pl_module))
        terms = [
            self._loss(logits, self._teacher.answer(call.args, call.kwargs, self._teacher_logits))
            for call, logits in learning
        ]
        term = torch.stack(terms).mean()
        batch_size = sum(logits.shape[0] for _, logits in learning)
        pl_module.log("compress/distillation_loss", term.detach(), on_step=True, on_epoch=False, batch_size=batch_size)
        self._was_added = True
        return term

    def _teacher_logits(self, output: Any) -> Tensor:
        return select_logits(output, self._output, "teacher")

    def _check_manual_step(self, pl_module: pl.LightningModule, tap: ForwardTap, steps_before: int) -> None:
        """Check that an optimizer that has stepped had a gradient of the term, at least once in the fit."""
        if self._was_added or pl_module.trainer.global_step == steps_before:
            return
        if not self._saw_manual_backward:
            raise CompressionError(
                f"`training_step` of `{type(pl_module).__name__}` took an optimizer step without "
                f"`self.manual_backward(loss)`, where the distillation term is added: call it instead of "
                f"`loss.backward()`."
            )
        tap.calls()  # raises where the network is unknown

    def _listen_to(self, pl_module: pl.LightningModule) -> ForwardTap:
        if self._tap is None:
            self._tap = ForwardTap(pl_module, self._module)
        return self._tap

    def _stop_listening(self) -> None:
        if self._tap is not None:
            self._tap.remove()
            self._tap = None

    def _release(self, pl_module: pl.LightningModule) -> None:
        self._stop_listening()
        for wrapper in self._wrappers:
            wrapper.owner = None
            _take_off_silent_wrappers(pl_module, wrapper.method)
        self._wrappers = []
        self._teacher.release()


class _Wrapper(ABC):
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
        if self.owner is None:
            return self.original(*args, **kwargs)
        return self.call_with(self.owner, *args, **kwargs)

    @abstractmethod
    def call_with(self, owner: KnowledgeDistillation, *args: Any, **kwargs: Any) -> Any:
        """Call the user's method with the owner's term."""


class _DistilledStep(_Wrapper):
    method = "training_step"

    @override
    def call_with(self, owner: KnowledgeDistillation, *args: Any, **kwargs: Any) -> Any:
        return owner.training_step(self.pl_module, self.original, args, kwargs)


class _DistilledBackward(_Wrapper):
    method = "manual_backward"

    @override
    def call_with(self, owner: KnowledgeDistillation, *args: Any, **kwargs: Any) -> Any:
        return owner.manual_backward(self.pl_module, self.original, *args, **kwargs)


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
    for kind in (_DistilledStep, _DistilledBackward):
        found = vars(pl_module).get(kind.method)
        if found is not None and found == getattr(type(pl_module), kind.method).__get__(pl_module):
            delattr(pl_module, kind.method)


def _take_off_silent_wrappers(pl_module: pl.LightningModule, method: str) -> None:
    """Uncover the method beneath wrappers without an owner; one that others have wrapped stays, and passes through."""
    while isinstance(top := pl_module.__dict__.get(method), _Wrapper) and top.owner is None:
        if top.replaced is None:
            delattr(pl_module, method)
        else:
            setattr(pl_module, method, top.replaced)


def _loss_of(output: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if isinstance(loss, Tensor):
        return loss
    if not isinstance(output, Mapping):
        came = f"a {type(output).__name__}"
    elif "loss" in output:
        came = f"a {type(loss).__name__} under the key 'loss'"
    else:
        came = f"a dict with the keys {', '.join(repr(key) for key in output) or 'none'}"
    raise CompressionError(
        f"`training_step` returned {came}, but knowledge distillation adds to a loss: "
        f"return a tensor, a dict with a tensor under the key 'loss', or None to skip the batch."
    )


def _dtype_of(pl_module: pl.LightningModule) -> torch.dtype:
    """Return the floating-point type of the parameters; the module's own ``dtype`` misses casts of its children."""
    dtypes = (parameter.dtype for parameter in pl_module.parameters() if parameter.is_floating_point())
    return next(dtypes, torch.float32)
