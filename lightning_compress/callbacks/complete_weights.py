"""Which weights count as compressed: the checkpoints that had reached the full compression."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from lightning_compress.callbacks.checkpoint import COMPRESSION_KEY
from lightning_compress.callbacks.pruning import MagnitudePruning
from lightning_compress.callbacks.quantization import QuantizationAwareTraining
from lightning_compress.report.atomic import written_whole


def is_complete(trainer: pl.Trainer) -> bool:
    """Tell whether every pruning and quantization callback of ``trainer`` has reached its full compression."""
    return all(callback.complete for callback in _compressors(trainer))


def best_complete_checkpoint(trainer: pl.Trainer) -> Path | None:
    """Return the best checkpoint of the Trainer's `ModelCheckpoint` whose weights had reached the full compression."""
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint) or callback.monitor is None:
            continue
        ranked = sorted(callback.best_k_models.items(), key=lambda item: float(item[1]), reverse=callback.mode == "max")
        for name, _ in ranked:
            checkpoint = torch.load(name, map_location="cpu", weights_only=False)
            states = checkpoint.get(COMPRESSION_KEY, {})
            pruned = states.get("pruning", {}).get("complete", True)
            quantized = states.get("quantization", {}).get("is_quantizing", True)
            if pruned and quantized:
                return Path(name)
    return None


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


def forget_incomplete_checkpoints(trainer: pl.Trainer) -> None:
    """Let the ranking of checkpoints begin anew: what came before the full compression must not win."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None and callback.best_k_models:
            rank_zero_info("The full compression is reached: checkpoints from before it no longer count as best.")
            callback.best_k_models.clear()
            callback.best_model_path = ""
            callback.best_model_score = None
            callback.kth_best_model_path = ""


def _compressors(trainer: pl.Trainer) -> list[MagnitudePruning | QuantizationAwareTraining]:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [item for item in callbacks if isinstance(item, MagnitudePruning | QuantizationAwareTraining)]


def has_begun(trainer: pl.Trainer) -> bool:
    """Tell whether pruning or quantization has changed a weight yet."""
    return any(
        callback.has_begun if isinstance(callback, MagnitudePruning) else callback.complete
        for callback in _compressors(trainer)
    )
