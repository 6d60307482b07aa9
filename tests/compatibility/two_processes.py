"""A run in one process or two, by `python -m tests.compatibility.two_processes '{...}'`; each leaves its results.

The settings are JSON: ``folder``, ``module``, ``launcher`` (``"popen"``, ``"spawn"``, ``"sharded"``, or none for one
process), ``n_images``, ``is_padded``, ``bits``, ``channels`` (an importance), ``ckpt_path``.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler
from torchmetrics.classification import MulticlassAccuracy

from lightning_compress import (
    ChannelPruning,
    KnowledgeDistillation,
    MagnitudePruning,
    OnnxExport,
    QuantizationAwareTraining,
)
from lightning_compress.quantization import quantization_of
from tests.training import quiet_trainer
from tests.user_modules import Images, LayersOnSelf, ManualOptimization, NetWithKeywords

GLOBAL_BATCH = 8


class WithoutNorm(LayersOnSelf):
    """Has no batch norm, whose statistics are those of a process's own part of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.Identity(), nn.Identity()  # type: ignore[assignment]


class WithDropout(LayersOnSelf):
    """Draws other random numbers in each process."""

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(F.dropout(image, 0.2, self.training))


class ShapesByRank(LayersOnSelf):
    """Sees images of another size in each process, and decides by it."""

    def forward(self, image: Tensor) -> Tensor:
        if image.shape[-1] > 6:
            image = image[..., 1:-1, 1:-1]
        return super().forward(image)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        images = batch["image"][..., 1:, 1:] if self.global_rank else batch["image"]
        return F.cross_entropy(self(images), batch["label"])


class WithMetric(LayersOnSelf):
    """Logs a metric whose state the processes exchange."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(4)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.accuracy(self(batch["image"]), batch["label"])
        self.log("val_acc", self.accuracy)


class Drifts(LayersOnSelf):
    """Ends with another bias in the second process."""

    def on_train_batch_end(self, *args: Any) -> None:
        with torch.no_grad():
            self.fc.bias.add_(0.001 * self.global_rank)


class Configured(LayersOnSelf):
    """Has the hook that strategies which split weights ask for."""

    def configure_model(self) -> None:
        """Leave the layers as they are."""


MODULES = {
    kind.__name__: kind
    for kind in (
        LayersOnSelf,
        NetWithKeywords,
        ManualOptimization,
        WithoutNorm,
        WithDropout,
        ShapesByRank,
        WithMetric,
        Drifts,
        Configured,
    )
}


class Data(L.LightningDataModule):
    """Batches that together are those of one process, in its order."""

    def __init__(self, n_images: int, is_padded: bool) -> None:
        super().__init__()
        self.is_padded = is_padded
        self.train, self.held_out = Images(n_images), Images(16, seed=1)

    def batches(self, images: Images) -> DataLoader[dict[str, Tensor]]:
        trainer = self.trainer
        assert trainer is not None
        if not self.is_padded:
            every_other = range(trainer.global_rank, len(images), trainer.world_size)
            batches = BatchSampler(every_other, GLOBAL_BATCH // trainer.world_size, drop_last=False)
            return DataLoader(images, batch_sampler=batches)
        sampler: DistributedSampler[Any] = DistributedSampler(
            images, trainer.world_size, trainer.global_rank, shuffle=False
        )
        return DataLoader(images, batch_size=GLOBAL_BATCH // trainer.world_size, sampler=sampler)

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self.batches(self.train)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self.batches(self.held_out)

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self.batches(self.held_out)


class Dump(L.Callback):
    """Writes what every process ended with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        pruning = next(callback for callback in callbacks if isinstance(callback, MagnitudePruning | ChannelPruning))
        quantization = quantization_of(pl_module)
        wrapped = trainer.strategy.model
        assert quantization is not None
        assert wrapped is not None
        dump = {
            "state_dict": pl_module.state_dict(),
            "quantization": quantization.state_dict(),
            "pruning": pruning._state.save(),
            "steps": trainer.global_step,
            "parameters": sum(parameter.numel() for parameter in wrapped.parameters()),
            "optimizer": trainer.optimizers[0].state_dict(),
        }
        torch.save(dump, self.folder / f"rank{trainer.global_rank}.pt")


class Ended(L.Callback):
    """Tells after the fit whether the process exported."""

    def __init__(self, folder: Path, export: OnnxExport) -> None:
        self.folder, self.export = folder, export

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        (self.folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(self.export.result is not None))


def strategy(launcher: str) -> Strategy:
    """Return a strategy for two processes; ``"sharded"`` splits the weights."""
    if launcher == "sharded":
        return ModelParallelStrategy(2, 1, process_group_backend="gloo")
    return DDPStrategy(process_group_backend="gloo", start_method=launcher)  # type: ignore[arg-type]


def main(options: dict[str, Any]) -> None:
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", message="Processes that are spawned")
    warnings.filterwarnings("default", message="The weights of rank")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    folder = Path(options["folder"])
    launcher, bits = options.get("launcher"), options.get("bits", 8)
    torch.manual_seed(0)
    module = MODULES[options["module"]]()
    export = OnnxExport(folder / "model.onnx", metric="val_acc", latency=False)
    pruning: L.Callback = MagnitudePruning(0.8, start=0.0, end=0.5)
    if options.get("channels"):
        pruning = ChannelPruning(0.5, end=0.4, importance=options["channels"], round_to=2)
    distribution: dict[str, Any] = {"devices": 1}
    if launcher:
        distribution = {"devices": 2, "strategy": strategy(launcher)}
    trainer = quiet_trainer(
        folder,
        [
            KnowledgeDistillation(LayersOnSelf(12)),
            pruning,
            QuantizationAwareTraining(weight_bits=bits, activation_bits=bits, start=0.5, freeze=0.75, observe_every=2),
            export,
            Dump(folder),
            Ended(folder, export),
            ModelCheckpoint(folder / "kept", "{step}", save_top_k=-1),
        ],
        enable_checkpointing=True,
        use_distributed_sampler=False,
        **distribution,
    )
    data = Data(options.get("n_images", 64), options.get("is_padded", True))
    trainer.fit(module, data, ckpt_path=options.get("ckpt_path"))
    metrics = trainer.test(module, data, verbose=False)
    if trainer.is_global_zero:
        (folder / "metrics.json").write_text(json.dumps(metrics))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
