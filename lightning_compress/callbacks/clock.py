"""The one clock of all schedules: optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_compress.callbacks.averages import statistics_epochs
from lightning_compress.errors import CompressionError
from lightning_compress.schedules import resolve_step


def completed_steps(trainer: pl.Trainer) -> int:
    """Return the number of steps taken since the run began, counted on over a resume.

    A step is an optimizer step; batches whose gradients are only accumulated do not count. Under manual optimization,
    where Lightning counts every optimizer's step on its own, a step is a training batch.

    The number holds in every hook: in ``on_train_batch_end`` it contains the batch that has just ended, in
    ``on_train_batch_start`` and during ``training_step`` it does not contain the batch that begins.

    Args:
        trainer: A trainer that is connected to its module, so not before ``setup``.

    Returns:
        The number of completed steps, from 0. It is that of the checkpoint from ``on_train_start`` on.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
        >>> trainer.strategy.connect(BoringModel())
        >>> completed_steps(trainer)
        0
    """
    if trainer.lightning_module.automatic_optimization:
        return trainer.global_step
    # `ready`, which `total_batch_idx` is made of, already contains a batch that has only begun.
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.processed)  # type: ignore[attr-defined]


def total_steps(trainer: pl.Trainer) -> int | None:
    """Return the number of steps of the whole run in the unit of :func:`completed_steps`.

    Read it from ``on_train_start`` on. It needs the training data loader, and a loader that is created before the
    trainer has restored its loops would lose the position that a checkpoint holds of it.

    Under manual optimization with ``max_steps``, which limits the steps of all optimizers together, every optimizer
    is taken to step once a batch.

    Args:
        trainer: A trainer during a fit.

    Returns:
        The number of steps of the run, those before a resume included, or None where the run has no known end:
        neither ``max_steps`` nor a finite ``max_epochs`` over a loader of known length.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> trainer = pl.Trainer(max_steps=20, logger=False, enable_checkpointing=False, accelerator="cpu")
        >>> trainer.strategy.connect(BoringModel())
        >>> trainer.fit_loop.max_epochs = -1
        >>> total_steps(trainer)
        20
    """
    estimated = _estimated_steps(trainer)
    if estimated < 0 or math.isinf(estimated):
        return None
    if trainer.lightning_module.automatic_optimization or trainer.max_steps == -1:
        return int(estimated)
    step_limit = math.ceil(trainer.max_steps / max(1, len(trainer.optimizers)))
    if trainer.max_epochs is None or trainer.max_epochs == -1 or math.isinf(trainer.num_training_batches):
        return step_limit
    return min(int(trainer.num_training_batches) * max(trainer.max_epochs, 1), step_limit)


PACE_BATCHES = 16
"""Training batches after the start of a fit within which `Pace` is checked."""


class Pace:
    """Whether a run under manual optimization takes the steps that `total_steps` made of its ``max_steps``."""

    def __init__(self) -> None:
        self._first_batch = self._first_step = 0

    def begin(self, trainer: pl.Trainer) -> None:
        """Begin to count, in ``on_train_start``."""
        self._first_batch, self._first_step = completed_steps(trainer), trainer.global_step

    def check(self, trainer: pl.Trainer, owner: str, moments: Mapping[str, float]) -> None:
        """Check the steps that were taken so far; later than the first batches, nothing is checked.

        Args:
            trainer: A Trainer in ``on_train_batch_end``.
            owner: Whose moments they are, for the message.
            moments: Shares of the run (float) or training batches (int), by the names of their arguments.

        Raises:
            CompressionError: If there is a share, ``max_steps`` ends the run, and an optimizer did not step once a
                batch.
        """
        batches, steps = completed_steps(trainer) - self._first_batch, trainer.global_step - self._first_step
        shares = [f"{name}={moment}" for name, moment in moments.items() if isinstance(moment, float) and moment]
        if trainer.lightning_module.automatic_optimization or not shares or not 0 < batches <= PACE_BATCHES:
            return
        expected = batches * max(1, len(trainer.optimizers))
        if steps != expected and _is_ended_by_steps(trainer, {steps / batches, expected / batches}):
            raise CompressionError(
                f"`{owner}` has shares of the run ({', '.join(shares)}), whose length was taken from "
                f"`max_steps={trainer.max_steps}` with one step of each optimizer in a training batch. After "
                f"{batches} of them the optimizers have made {steps} steps instead of {expected}. Pass the moments as "
                "ints (training batches), or end the run by `max_epochs` instead of `max_steps`."
            )


def _is_ended_by_steps(trainer: pl.Trainer, steps_per_batch: Collection[float]) -> bool:
    """Tell whether ``max_steps`` come before the last epoch's end at one of these paces."""
    if trainer.max_steps == -1:
        return False
    if trainer.max_epochs is None or trainer.max_epochs == -1:
        return True
    n_batches = trainer.num_training_batches * max(trainer.max_epochs, 1)
    return any(trainer.max_steps < pace * n_batches for pace in steps_per_batch)


@dataclass(frozen=True)
class Rise:
    """The steps over which a compression rises, and those at which it takes its next step.

    Args:
        begin_step: Optimizer step at which it begins.
        end_step: Optimizer step at which it is complete.
        interval: Optimizer steps between two of its steps.

    Example:
        >>> [step for step in range(12) if Rise(2, 9, 3).is_due(step)]
        [2, 5, 8, 9]
    """

    begin_step: int
    end_step: int
    interval: int

    def is_due(self, step: int) -> bool:
        """Tell whether the compression takes a step after optimizer step ``step``."""
        begin, end = self.begin_step, self.end_step
        return step == end or (begin <= step < end and (step - begin) % self.interval == 0)


def resolve_rise(trainer: pl.Trainer, start: float, end: float, update_every: int | None, max_updates: int) -> Rise:
    """Return the steps of a rise that begins at ``start`` and is complete at ``end``, from `on_train_start` on.

    Args:
        trainer: A trainer during a fit.
        start: A share of the run (float) or an optimizer step (int).
        end: A share of the run (float) or an optimizer step (int).
        update_every: Optimizer steps between two steps of it; None for at most ``max_updates`` of them.
        max_updates: See ``update_every``.

    Raises:
        ValueError: If the run has no known end and a share is given, or ``start`` comes after ``end``.
    """
    run_steps = total_steps(trainer)
    begin_step, end_step = resolve_step("start", start, run_steps), resolve_step("end", end, run_steps)
    if begin_step > end_step:
        raise ValueError(
            f"`start` must not come after `end`, got start={start} (optimizer step {begin_step}) "
            f"and end={end} (optimizer step {end_step})."
        )
    return Rise(begin_step, end_step, update_every or max(1, -(-(end_step - begin_step) // max_updates)))


def _estimated_steps(trainer: pl.Trainer) -> float:
    max_epochs = trainer.fit_loop.max_epochs
    if max_epochs is None or max_epochs == -1:
        return trainer.estimated_stepping_batches
    trainer.fit_loop.max_epochs = n_epochs = max_epochs - statistics_epochs(trainer)
    try:
        estimated = trainer.estimated_stepping_batches
    finally:
        trainer.fit_loop.max_epochs = max_epochs
    scheduler = _accumulation_scheduler(trainer)
    if scheduler is None or math.isinf(trainer.num_training_batches):
        return estimated
    # Lightning's estimate takes the accumulation in force now for that of every epoch.
    factors = (scheduler.get_accumulate_grad_batches(epoch) for epoch in range(max(n_epochs, 1)))
    n_steps = sum(math.ceil(trainer.num_training_batches / factor) for factor in factors)
    return n_steps if trainer.max_steps == -1 else min(n_steps, trainer.max_steps)


def set_accumulation(trainer: pl.Trainer) -> None:
    """Accumulate as a `GradientAccumulationScheduler` says for this epoch; call it before each training batch.

    Lightning sets it when an epoch begins, and forgets it where a run is resumed inside one.

    Example:
        >>> scheduler = GradientAccumulationScheduler({0: 4})
        >>> trainer = pl.Trainer(callbacks=[scheduler], logger=False, enable_checkpointing=False, accelerator="cpu")
        >>> set_accumulation(trainer)
        >>> trainer.accumulate_grad_batches
        4
    """
    scheduler = _accumulation_scheduler(trainer)
    if scheduler is not None:
        trainer.accumulate_grad_batches = scheduler.get_accumulate_grad_batches(trainer.current_epoch)


def _accumulation_scheduler(trainer: pl.Trainer) -> GradientAccumulationScheduler | None:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    found = [callback for callback in callbacks if isinstance(callback, GradientAccumulationScheduler)]
    return found[-1] if found else None  # of several the last one sets the accumulation
