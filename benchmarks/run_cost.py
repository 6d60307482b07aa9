"""What a compressed run costs beside its rounding: checkpoints, and the masks of `MagnitudePruning`.

* Size and saving time of a whole checkpoint, of weights and momentum, with masks and ranges and without.
* A training step with masks in force against the plain step, in one fit: the callback works in every second step only.
* Whole updates of the masks against a training step: the callback's own, with all it does in one (masks, weights,
  momentum, count), over the rise of its schedule, in every scope.
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
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision import models

from benchmarks.records import Row, markdown_table, print_machine
from examples.quiet import quiet_lightning
from lightning_compress import MagnitudePruning, QuantizationAwareTraining
from lightning_compress.pruning.magnitude import Scope
from lightning_compress.selection import plain_weights

SCOPES: tuple[Scope, ...] = ("global", "layer", "lamp")


_now: Callable[[], float] = time.perf_counter


def main() -> None:
    global _now
    options = _parse()
    if options.processor_time:
        _now = time.process_time
    torch.set_num_threads(options.threads)
    quiet_lightning()
    print_machine()
    rows, updates = [], []
    for name in options.networks:
        torch.manual_seed(0)
        rows.append({"network": name, **_checkpoint_row(name, options), **_step_row(name, options)})
        print(rows[-1], flush=True)
        updates += [_update_row(name, scope, options) for scope in SCOPES]
    print(f"\n{markdown_table(rows)}\n\n{markdown_table(updates)}")


class Classifier(L.LightningModule):
    """Trains one of torchvision's networks."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.network: nn.Module = models.get_model(name)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)  # type: ignore[no-any-return]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)


class EverySecond(MagnitudePruning):
    """Works in every second step; nothing else changes."""

    is_on = True

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        if self.is_on:
            super().on_train_batch_end(*args, **kwargs)


class Clock(L.Callback):
    """Times whole steps, from one batch's start to the next one's."""

    def __init__(self, pruning: EverySecond) -> None:
        self.pruning = pruning
        self.seconds: dict[bool, list[float]] = {True: [], False: []}
        self.before = 0.0

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        now = _now()
        self.seconds[self.pruning.is_on].append(now - self.before)
        self.before, self.pruning.is_on = now, not self.pruning.is_on


class TimedUpdates(MagnitudePruning):
    """Notes how long each whole update takes, and how long the steps without one."""

    seconds: list[float]

    def _update(self, *args: Any, **kwargs: Any) -> None:
        started = _now()
        super()._update(*args, **kwargs)
        self.seconds.append(_now() - started)


class StepClock(L.Callback):
    """Times forward, backward and optimizer step, which end before the callbacks' turn."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.started = 0.0

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        self.started = _now()

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(_now() - self.started)


def _step_row(name: str, options: argparse.Namespace) -> Row:
    """Time steps with the callback and without, in turns."""
    module = Classifier(name)
    n_steps = 2 * options.rounds + 4
    pruning = EverySecond(0.8, start=0, end=0)  # the only update is before the first step
    clock = Clock(pruning)
    _trainer([pruning, clock], max_steps=n_steps).fit(module, _batches(options))
    on, off = (clock.seconds[is_on][2:] for is_on in (True, False))
    return {
        "step, ms": round(1e3 * statistics.median(off), 1),
        "step under masks / plain: minima": round(min(on) / min(off), 3),
        "medians": round(statistics.median(on) / statistics.median(off), 3),
    }


def _update_row(name: str, scope: Scope, options: argparse.Namespace) -> Row:
    """Time the updates of a rise to 80 % zeros, one after every step."""
    pruning, clock = TimedUpdates(0.8, start=0, end=options.updates, scope=scope, update_every=1), StepClock()
    pruning.seconds = []
    # The clock's turn must come before the callback's.
    _trainer([clock, pruning], max_steps=options.updates).fit(Classifier(name), _batches(options))
    step = statistics.median(clock.seconds[1:])
    updates = pruning.seconds[1:]  # the first, before any step, drops nothing
    return {
        "network": name,
        "scope": scope,
        "step, ms": round(1e3 * step, 1),
        "update, ms: median": round(1e3 * statistics.median(updates), 1),
        "at 80 % zeros": round(1e3 * updates[-1], 1),
        "median update / step": round(statistics.median(updates) / step, 2),
        "largest": round(max(updates) / step, 2),
        "last, at 80 % zeros": round(updates[-1] / step, 2),
        "minima": round(min(updates) / min(clock.seconds[1:]), 2),
    }


def _batches(options: argparse.Namespace) -> DataLoader[tuple[Tensor, ...]]:
    images = torch.randn(options.batch_size, 3, options.pixels, options.pixels)
    labels = torch.zeros(options.batch_size, dtype=torch.long)
    return DataLoader(TensorDataset(images.repeat(2, 1, 1, 1), labels.repeat(2)), batch_size=options.batch_size)


def _checkpoint_row(name: str, options: argparse.Namespace) -> Row:
    """Save whole checkpoints after a step, with the callbacks and without."""
    images = torch.randn(2, 3, options.pixels, options.pixels)
    loader = DataLoader(TensorDataset(images, torch.zeros(2, dtype=torch.long)), batch_size=2)
    sizes, times = [], []
    masks = 0
    weights = 1
    for callbacks in ([], [MagnitudePruning(0.8, start=0, end=0), QuantizationAwareTraining(start=0)]):
        module = Classifier(name)
        trainer = _trainer(list(callbacks), max_steps=2, max_epochs=2)
        trainer.fit(module, loader)
        with TemporaryDirectory() as folder:
            path = Path(folder) / "whole.ckpt"
            seconds = []
            for _ in range(7):
                started = time.perf_counter()
                trainer.save_checkpoint(path)
                seconds.append(time.perf_counter() - started)
            sizes.append(path.stat().st_size)
            times.append(statistics.median(seconds))
            saved = torch.load(path, weights_only=True).get("lightning_compress", {}).get("pruning")
        if saved:
            masks = sum(mask.numel() for mask in saved["masks"].values())
            weights = sum(4 * weight.numel() for weight in plain_weights(module).values())
    return {
        "parameters, M": round(sum(parameter.numel() for parameter in module.parameters()) / 1e6, 1),
        "checkpoint, MB": round(sizes[0] / 1e6, 1),
        "ours / plain, bytes": round(sizes[1] / sizes[0], 4),
        "masks / weights, bytes": f"1 / {weights / masks:.2f}",
        "saving, ms": round(1e3 * times[0]),
        "ours / plain, time": round(times[1] / times[0], 2),
    }


def _trainer(callbacks: list[L.Callback], **settings: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet18", "resnet50"])
    parser.add_argument("--pixels", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=20, help="steps of each kind")
    parser.add_argument("--updates", type=int, default=12, help="updates of the masks over the rise")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="count the processor's time instead of the clock's, for a busy machine; with one thread",
    )
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
