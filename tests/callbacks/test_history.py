"""The history that `OnnxExport` keeps is what every step logged, though it is read later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_compress import MagnitudePruning, OnnxExport
from tests.training import quiet_trainer
from tests.user_modules import LayersOnSelf, loader

pytestmark = pytest.mark.filterwarnings(
    "ignore:The '.*dataloader' does not have many workers",
    "ignore:You defined a `validation_step` but have no",
)


class ReadAtOnce(L.Callback):
    """Reads the values in the very step that logged them."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.sparsities: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *args: Any) -> None:
        self.losses.append(outputs["loss"].item())
        self.sparsities.append(trainer.callback_metrics["compress/sparsity"].item())


def test_values_read_later_are_those_of_their_step(tmp_path: Path) -> None:
    torch.manual_seed(0)
    export, at_once = OnnxExport(tmp_path / "model.onnx", latency=False), ReadAtOnce()
    callbacks = [MagnitudePruning(0.8, end=1.0, update_every=1), at_once, export]
    quiet_trainer(tmp_path, callbacks, max_epochs=1).fit(LayersOnSelf(), loader())
    assert [value for _, value in export.history.series("train_loss")] == at_once.losses
    assert [value for _, value in export.history.series("sparsity")] == at_once.sparsities
    assert len(set(at_once.losses)) == len(set(at_once.sparsities)) == 8
