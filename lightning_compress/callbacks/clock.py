"""The one clock of all schedules: optimizer steps."""

from __future__ import annotations

import math

import lightning.pytorch as pl

from lightning_compress.callbacks.averages import statistics_epochs


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


def _estimated_steps(trainer: pl.Trainer) -> float:
    extra, max_epochs = statistics_epochs(trainer), trainer.fit_loop.max_epochs
    if not extra or max_epochs is None:
        return trainer.estimated_stepping_batches
    trainer.fit_loop.max_epochs = max_epochs - extra
    try:
        return trainer.estimated_stepping_batches
    finally:
        trainer.fit_loop.max_epochs = max_epochs
