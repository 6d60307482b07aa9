"""What distillation costs: a step against the student's step and the teacher's forward, and with a filled cache.

In one fit, steps with distillation and without take turns. After each step without, the teacher's forward alone is
timed on the same images. With a filled cache, a step is compared with the plain one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset
from torchvision import models

from benchmarks.records import Row, markdown_table, print_machine
from benchmarks.run_cost import Classifier
from lightning_compress import (
    AttentionTransfer,
    FeatureDistillation,
    IndexedDataset,
    KnowledgeDistillation,
    LogitDistillation,
    SimilarityPreserving,
)
from lightning_compress.distillation import DistillationLoss

LOSSES: dict[str, list[DistillationLoss]] = {
    "logits": [LogitDistillation()],
    "logits, hints, attention, similarity": [
        LogitDistillation(),
        FeatureDistillation(layers={"network.layer3": "layer3"}),
        AttentionTransfer(layers={"network.layer4": "layer4"}),
        SimilarityPreserving(layers={"network.avgpool": "avgpool"}),
    ],
}


def main() -> None:
    """Measure and print the table."""
    options = _parse()
    torch.set_num_threads(options.threads)
    print_machine()
    rows: list[Row] = []
    for name, losses in LOSSES.items():
        for has_cache in (False, True):
            torch.manual_seed(0)
            rows.append(_measure(name, losses, has_cache, options))
            print(rows[-1], flush=True)
    print(f"\n{options.student} from {options.teacher}, {options.pixels} pixels, batch {options.batch_size}")
    print(f"\n{markdown_table(rows)}")


class Turns(KnowledgeDistillation):
    """Distils in every second step."""

    is_on = True

    def training_step(
        self, pl_module: L.LightningModule, user_step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self.is_on:
            return super().training_step(pl_module, user_step, args, kwargs)
        return user_step(*args, **kwargs)


class Clock(L.Callback):
    """Times whole steps, and the teacher's forward after those without distillation."""

    def __init__(self, distillation: Turns, n_filling: int) -> None:
        self.distillation = distillation
        self.n_filling = n_filling
        self.steps: dict[bool, list[float]] = {True: [], False: []}
        self.teacher: list[float] = []
        self.started = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        # While the cache is filled, every step distils.
        self.distillation.is_on = trainer.global_step < self.n_filling or trainer.global_step % 2 == 0
        self.started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        seconds = time.perf_counter() - self.started
        if trainer.global_step <= self.n_filling + 2:
            return
        self.steps[self.distillation.is_on].append(seconds)
        if not self.distillation.is_on:
            started = time.perf_counter()
            self.distillation._teacher.answer((batch[0],), {}, lambda logits: logits)
            self.teacher.append(time.perf_counter() - started)


def _measure(name: str, losses: list[DistillationLoss], has_cache: bool, options: argparse.Namespace) -> Row:
    n_batches = 4
    images = torch.randn(n_batches * options.batch_size, 3, options.pixels, options.pixels)
    labels = torch.zeros(len(images), dtype=torch.long)
    data: Any = TensorDataset(images, labels)
    with TemporaryDirectory() as folder:
        settings: dict[str, Any] = {"cache": Path(folder) / "cache"} if has_cache else {}
        teacher = models.get_model(options.teacher)
        distillation = Turns(teacher, losses=losses, **settings)
        n_filling = n_batches if has_cache else 0
        clock = Clock(distillation, n_filling)
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=n_filling + 2 + 2 * options.rounds,
            callbacks=[clock, distillation],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        loader: Any = DataLoader(IndexedDataset(data) if has_cache else data, batch_size=options.batch_size)
        trainer.fit(Classifier(options.student), loader)
    on, off = clock.steps[True], clock.steps[False]
    expected = [0.0] if has_cache else clock.teacher
    return {
        "losses": name,
        "teacher": "filled cache" if has_cache else "runs",
        "plain step, ms": round(1e3 * statistics.median(off), 1),
        "teacher, ms": round(1e3 * statistics.median(clock.teacher), 1),
        "distilled step, ms": round(1e3 * statistics.median(on), 1),
        "distilled / expected: medians": round(
            statistics.median(on) / (statistics.median(off) + statistics.median(expected)), 3
        ),
        "minima": round(min(on) / (min(off) + min(expected)), 3),
    }


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="resnet18")
    parser.add_argument("--teacher", default="resnet50")
    parser.add_argument("--pixels", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
