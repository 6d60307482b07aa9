"""The best weights under the full compression, and checkpoints of the last ones."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from lightning_compress.callbacks.compressor import is_complete
from lightning_compress.copying import copy_of
from lightning_compress.unfinished import written_whole

Weights = Literal["last", "best"]
"""Which weights of a run are exported."""


def best_complete_checkpoint(trainer: pl.Trainer) -> Path | None:
    """Return the best checkpoint of the Trainer's `ModelCheckpoint` whose weights had reached the full compression."""
    if not is_complete(trainer):
        return None
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint) or callback.monitor is None:
            continue
        # What had not reached it has the worst score there is: see `Rankings`.
        scores = {name: float(score) for name, score in callback.best_k_models.items() if score.isfinite()}
        if scores:
            return Path((max if callback.mode == "max" else min)(scores, key=lambda name: scores[name]))
    return None


def chosen_weights(
    trainer: pl.Trainer, pl_module: pl.LightningModule, weights: Weights, owner: str
) -> pl.LightningModule:
    """Return the module with the weights that are to be exported: itself, or a copy with those of a checkpoint.

    Args:
        trainer: The Trainer of the fit that ends.
        pl_module: The module.
        weights: ``"last"``, or ``"best"``: see `best_complete_checkpoint`; where there is none, a warning tells so.
        owner: Which callback asks, for the warning.
    """
    if weights == "last":
        return pl_module
    found = best_complete_checkpoint(trainer)
    if found is None and not is_complete(trainer):
        return pl_module  # as a warning has told
    if found is None:
        rank_zero_warn(
            "No checkpoint of the Trainer's `ModelCheckpoint` had reached the full compression, so the last weights "
            f'are exported. For `{owner}(weights="best")` let the Trainer keep checkpoints by a `monitor` after '
            "pruning and quantization have finished their schedules."
        )
        return pl_module
    chosen = copy_of(pl_module)
    checkpoint = torch.load(found, map_location="cpu", weights_only=False)
    chosen.on_load_checkpoint(checkpoint)
    chosen.load_state_dict(checkpoint["state_dict"])
    return chosen


def save_weights(pl_module: pl.LightningModule, trainer: pl.Trainer, path: Path) -> None:
    """Write a checkpoint that `load_from_checkpoint` reads, on this rank alone; whole or not at all."""
    checkpoint: dict[str, Any] = {
        "state_dict": pl_module.state_dict(),
        "epoch": trainer.current_epoch,
        "global_step": trainer.global_step,
        "pytorch-lightning_version": version("lightning"),
    }
    if pl_module.hparams:
        checkpoint[pl_module.CHECKPOINT_HYPER_PARAMS_KEY] = dict(pl_module.hparams)
    pl_module.on_save_checkpoint(checkpoint)
    with written_whole(path) as temporary:
        torch.save(checkpoint, temporary)
