"""Fits and looks that the tests of shared filters and of low rank have in common."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import onnx
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_avg_fn

from lightning_compress.processes import check_alike
from lightning_compress.report import model_statistics
from tests.training import quiet_trainer
from tests.user_modules import Images, LayersOnSelf, loader

IMAGES = Images(16, seed=3).images

AVERAGES: dict[str, Callable[[], L.Callback]] = {
    "WeightAveraging": lambda: WeightAveraging(avg_fn=get_ema_avg_fn(0.9)),  # type: ignore[no-untyped-call]
    "StochasticWeightAveraging": lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=0.5),
}
"""Lightning's callbacks that average weights."""


def fit(folder: Path, *callbacks: L.Callback, module: Any = None, ckpt: Any = None, **settings: Any) -> Any:
    """Fit for 16 steps, or as told."""
    torch.manual_seed(0)
    module = LayersOnSelf() if module is None else module
    trainer = quiet_trainer(folder, callbacks, **settings)
    trainer.fit(module, loader(), loader(16, seed=1), ckpt_path=ckpt)
    return module


class AlikeWeights(L.Callback):
    """Checks that all processes end with the same weights, to the bit."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        check_alike("weights", dict(pl_module.named_parameters()))


def keep_all(folder: Path) -> ModelCheckpoint:
    """Keep a checkpoint of every epoch: ``step=8.ckpt`` and so on."""
    return ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_epochs=1, enable_version_counter=False)


@torch.no_grad()
def outputs(module: nn.Module) -> Tensor:
    """Return what a module computes of the images."""
    found: Tensor = module.eval()(IMAGES)
    return found


def macs(module: nn.Module) -> int:
    """Return the multiply-accumulates of a module for one image."""
    return model_statistics(module, (IMAGES,)).macs


def kernel_shapes(path: Path) -> list[tuple[int, ...]]:
    """Return the shapes of the matrices and kernels of a file, sorted; biases have one value a channel."""
    shapes = [tuple(weight.dims) for weight in onnx.load(path).graph.initializer]
    return sorted(shape for shape in shapes if len(shape) > 1 and max(shape) < math.prod(shape))
