"""One printed line for every epoch: progress that reads well in a terminal and in a log file."""

from __future__ import annotations

import time

import lightning as L
from typing_extensions import override


class EpochLines(L.Callback):
    """Prints name, epoch, seconds, training loss and validation accuracy at the end of every epoch.

    Args:
        name: What is being trained.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self._started = time.perf_counter()

    @override
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the line."""
        seconds = time.perf_counter() - self._started
        metrics = trainer.callback_metrics
        figures = [f"{name} {float(metrics[name]):.4f}" for name in ("train_loss", "val_accuracy") if name in metrics]
        line = ", ".join([f"{seconds:.0f} s", *figures])
        print(f"{self.name}: epoch {trainer.current_epoch + 1}/{trainer.max_epochs}, {line}", flush=True)
