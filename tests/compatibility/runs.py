"""Runs with every callback, and what must hold after one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import onnxruntime
import torch
from torch import Tensor, nn

from lightning_compress import MagnitudePruning, OnnxExport, QuantizationAwareTraining, strip
from lightning_compress.copying import copy_of
from lightning_compress.selection import plain_weights
from tests.training import all_callbacks, quiet_trainer
from tests.user_modules import Images, LayersOnSelf, loader

LIGHTNING_NOISE = (
    "ignore:The '.*dataloader' does not have many workers",
    "ignore:The number of training batches",
    "ignore:.*in eval mode",
    "ignore:Be aware that when using `ckpt_path`, callbacks used to create",
)
"""What Lightning says about tiny data and networks."""

SPARSITY = 0.8


@dataclass
class Run:
    """A fit that has ended."""

    module: L.LightningModule
    trainer: L.Trainer
    folder: Path

    @property
    def pruning(self) -> MagnitudePruning:
        return next(callback for callback in callbacks_of(self.trainer) if isinstance(callback, MagnitudePruning))

    @property
    def quantization(self) -> QuantizationAwareTraining:
        return next(
            callback for callback in callbacks_of(self.trainer) if isinstance(callback, QuantizationAwareTraining)
        )

    @property
    def export(self) -> OnnxExport:
        return next(callback for callback in callbacks_of(self.trainer) if isinstance(callback, OnnxExport))


def callbacks_of(trainer: L.Trainer) -> list[L.Callback]:
    found: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return found


def fit(
    folder: Path,
    module: L.LightningModule | None = None,
    *,
    first: tuple[L.Callback, ...] = (),
    last: tuple[L.Callback, ...] = (),
    data: tuple[Any, Any] | L.LightningDataModule | None = None,
    ckpt_path: Path | None = None,
    **settings: Any,
) -> Run:
    """Fit with every callback; others before or after them."""
    torch.manual_seed(0)
    module = LayersOnSelf() if module is None else module
    trainer = quiet_trainer(folder, [*first, *all_callbacks(folder), *last], **settings)
    if isinstance(data, L.LightningDataModule):
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    else:
        train, validation = data or (loader(), loader(16, seed=1))
        trainer.fit(module, train, validation, ckpt_path=ckpt_path)
    return Run(getattr(module, "_orig_mod", module), trainer, folder)


def assert_compressed(run: Run) -> None:
    """The full sparsity to one weight, everything quantized, and a file that computes what the network computes."""
    weights = plain_weights(run.module)
    n_zeros = sum(int((weight == 0).sum()) for weight in weights.values())
    assert n_zeros == round(SPARSITY * sum(weight.numel() for weight in weights.values()))
    assert run.pruning.complete
    assert run.quantization.complete
    assert_ships(run.module, run.folder / "model.onnx")


def assert_ships(module: nn.Module, path: Path) -> None:
    """The file follows the rounded network, from which the float one is further away."""
    images = Images(64, seed=2).images
    module = copy_of(module).eval().float()
    with torch.no_grad():
        expected = module(images)
        rounded_off = strip(module)(images)
    found = outputs_of(path, images)
    assert (found - expected).abs().mean() < 0.05 * (rounded_off - expected).abs().mean()


def outputs_of(path: Path, images: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])
