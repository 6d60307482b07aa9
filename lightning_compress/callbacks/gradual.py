"""What callbacks share that compress more and more between two moments, and then hold what they have reached."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import lightning.pytorch as pl
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_compress.callbacks.averages import averaged_modules
from lightning_compress.callbacks.clock import Rise, completed_steps, resolve_rise
from lightning_compress.callbacks.compressor import Compressor
from lightning_compress.callbacks.random_state import RandomState, attach_random_state
from lightning_compress.callbacks.trainers import check_trainer
from lightning_compress.processes import check_alike
from lightning_compress.schedules import CubicSchedule, check_moment, check_order


class GradualCompressor(Compressor):
    """A compressor that goes from ``start`` to ``end`` in steps, and puts the weights back after every optimizer step.

    The optimizer knows nothing of the compression and moves every weight, so what is compressed is projected back onto
    it: after each step, in validation, in averages of the weights, and when the fit ends.

    Args:
        target: Value of the cubic schedule at ``end``; it begins at 0.
        start: When the rise begins: a share of the run (float) or optimizer steps (int).
        end: When the target is reached: a share of the run (float) or optimizer steps (int).
        update_every: Optimizer steps between two updates; None for at most `max_updates` of them over the rise.

    Raises:
        ValueError: If a moment or ``update_every`` is out of range.
        TypeError: If ``start`` or ``end`` is neither a float nor an int.
    """

    max_updates: ClassVar[int]
    """Updates over the whole rise where ``update_every`` is not given."""

    clears_optimizers_each_step: ClassVar[bool]
    """Whether what optimizers remember is projected after every step too, and not only at updates."""

    def __init__(self, target: float, start: int | float, end: int | float, update_every: int | None) -> None:
        super().__init__()
        check_moment("start", start)
        check_moment("end", end)
        check_order("start", start, "end", end)
        if update_every is not None and update_every < 1:
            raise ValueError(f"`update_every` must be at least 1 optimizer step, got {update_every}.")
        self.start = start
        self.end = end
        self.update_every = update_every
        self._target = target
        self._random = RandomState()
        self._rise = Rise(0, 0, 1)
        self._schedule = CubicSchedule(target, 0, 0)
        self._last_step = 0
        self._logged: float | None = None

    @abstractmethod
    def _project(self, module: nn.Module, *optimizers: Optimizer) -> None:
        """Put the compressed weights of a module, and what optimizers remember of them, back in their place."""

    @abstractmethod
    def _update(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        """Compress as much as the schedule wants at ``step``, and `_apply` it."""

    @property
    @abstractmethod
    def _progress(self) -> tuple[str, float]:
        """The name under which the progress is logged, and how far it is."""

    @property
    @abstractmethod
    def _decisions(self) -> tuple[str, Any]:
        """What was decided, which must be alike in all processes, and what a sentence calls it."""

    @property
    def _is_ready(self) -> bool:
        """Whether it is known what can be compressed."""
        return True

    @property
    @override
    def moments(self) -> dict[str, float]:
        """The moments that it was given."""
        return {"start": self.start, "end": self.end}

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        check_trainer(trainer, self)
        super().setup(trainer, pl_module, stage)
        name = type(self).__name__
        if sum(type(callback) is type(self) for callback in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise ValueError(f"The Trainer has more than one `{name}` callback. Keep one of them.")
        if stage == "fit":
            self._random = attach_random_state(pl_module)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._random.restore()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._random.begin(trainer)
        self._rise = resolve_rise(trainer, self.start, self.end, self.update_every, self.max_updates)
        self._schedule = CubicSchedule(self._target, self._rise.begin_step, self._rise.end_step)
        self._last_step = completed_steps(trainer)
        self._logged = None

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._logged = None

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = completed_steps(trainer)
        if step != self._last_step:  # else gradients are accumulated: no optimizer step was taken
            self._last_step = step
            if step >= self._rise.begin_step and self._is_ready:
                self._after_step(trainer, pl_module, step)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _after_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        # Momentum can move a compressed weight away, so it is put back after every step.
        self._apply(trainer, pl_module, *(trainer.optimizers if self.clears_optimizers_each_step else ()))
        if not self.complete and (self._rise.is_due(step) or step >= self._rise.end_step):
            self._update(trainer, pl_module, step)
        # Lightning keeps a logged value for the rest of the epoch.
        name, value = self._progress
        if not trainer.barebones and self._logged != value:
            pl_module.log(name, value)
            self._logged = value

    def _apply(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *optimizers: Optimizer) -> None:
        """Project the module, what ``optimizers`` remember, and averages of the weights."""
        self._project(pl_module, *optimizers)
        for average in averaged_modules(trainer):
            self._project(average)

    @override
    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # The module's `on_validation_start`, which comes before, may have swapped the weights, as a schedule-free
        # optimizer asks for.
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._project(pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._random.is_training = False
        # `WeightAveraging` has just put the average in the weights' place, if it comes before this callback.
        self._project(pl_module)
        check_alike(*self._decisions)
        super().on_train_end(trainer, pl_module)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._random.interrupt()

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # `WeightAveraging` may also come after this callback.
        self._project(pl_module)
