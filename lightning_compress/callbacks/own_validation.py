"""Validations of our own: the user's loaders and steps, in a Trainer that nobody sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl

from lightning_compress.callbacks.file_metric import quiet_lightning
from lightning_compress.processes import alone


def validation_loaders(trainer: pl.Trainer) -> Any:
    """Return the loaders of the fit's validation, made anew where no step has needed them yet; None without any."""
    if trainer.val_dataloaders is not None:
        return trainer.val_dataloaders
    source = trainer.fit_loop.epoch_loop.val_loop._data_source
    return source.dataloader() if source.is_defined() and trainer.enable_validation else None


def validated(trainer: pl.Trainer, module: pl.LightningModule, loaders: Any, metric: str | None) -> float | None:
    """Run the user's validation, on this process alone, and return the metric."""
    with quiet_lightning(), alone():
        found = trainer.validate(module, dataloaders=loaders, verbose=False)
    return next((float(row[metric]) for row in found if metric is not None and metric in row), None)


def own_trainer(trainer: pl.Trainer, callbacks: Sequence[pl.Callback] = ()) -> pl.Trainer:
    """Return a Trainer for a validation of our own, on as many batches as the user's."""
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=trainer.limit_val_batches,
        default_root_dir=trainer.default_root_dir,
    )
