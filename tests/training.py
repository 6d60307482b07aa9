"""Short runs for the tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L

from lightning_compress import KnowledgeDistillation, MagnitudePruning, OnnxExport, QuantizationAwareTraining
from tests.user_modules import LayersOnSelf


def quiet_trainer(folder: Path, callbacks: Sequence[L.Callback] = (), **settings: Any) -> L.Trainer:
    """Return a Trainer on the CPU that prints and logs nothing."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
    }
    return L.Trainer(**{**defaults, **settings}, callbacks=list(callbacks))


def all_callbacks(folder: Path, **export: Any) -> list[L.Callback]:
    """Return the four callbacks, as the README lists them."""
    return [
        KnowledgeDistillation(LayersOnSelf(12), temperature=4.0, weight=0.7),
        MagnitudePruning(sparsity=0.8, start=0.0, end=0.5),
        QuantizationAwareTraining(start=0.5, freeze=0.75),
        OnnxExport(folder / "model.onnx", latency=False, **export),
    ]
