"""A grid of distillation experiments: every loss with every seed, logged, and a table and a picture at the end.

One teacher is trained, then a small student alone and with each loss, all with the same images in the same order. Run
it from the project's root: ``python -m examples.distill --quick``, or with ``--losses``, ``--seeds``, ``--images``.
What was trained before in the same folder is not trained again.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from examples.classifier import ImageClassifier
from examples.epoch_lines import EpochLines
from examples.evaluation import percent_equal, predict
from examples.fashion_mnist import load_images
from examples.image_data import ImageData, ImageSet
from examples.networks import student, teacher
from examples.quiet import quiet_lightning
from lightning_compress import (
    AttentionTransfer,
    ContrastiveDistillation,
    CorrelationDistillation,
    DecoupledDistillation,
    FeatureDistillation,
    KnowledgeDistillation,
    LogitDistillation,
    OutputRegression,
    PseudoLabels,
    RelationalDistillation,
    SimilarityPreserving,
)
from lightning_compress.distillation import DistillationLoss

# The student's last block, and the teacher's: both networks are `examples.networks.ResNet`.
LAST_BLOCK = {"network.blocks.2": "blocks.4"}

ALONE = "alone"

LOSSES: Mapping[str, Sequence[DistillationLoss]] = {
    "logits": [LogitDistillation(temperature=4.0, weight=0.7)],
    "logits, standardized": [LogitDistillation(temperature=2.0, weight=0.7, standardize=True)],
    "decoupled": [DecoupledDistillation(temperature=4.0, target=1.0, others=2.0, weight=0.5)],
    "correlation": [CorrelationDistillation(temperature=4.0, weight=0.2)],
    "regression": [OutputRegression(weight=0.05)],
    "pseudo-labels": [PseudoLabels(threshold=0.5, weight=0.5)],
    "hints": [FeatureDistillation(layers=LAST_BLOCK, weight=0.1)],
    "attention": [AttentionTransfer(layers=LAST_BLOCK, weight=50.0)],
    "similarity": [SimilarityPreserving(layers=LAST_BLOCK, weight=50.0)],
    "relations": [RelationalDistillation(layers={"network.pool": "pool"}, distance=1.0, angle=2.0, weight=1.0)],
    "contrast": [ContrastiveDistillation(layers={"network.pool": "pool"}, weight=0.1)],
    "logits and hints": [
        LogitDistillation(temperature=4.0, weight=0.7),
        FeatureDistillation(layers=LAST_BLOCK, weight=0.1),
    ],
}
"""What is tried, by the name in the table."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, print the table and leave ``results.json`` and ``distillation.png`` behind."""
    options = _parse(arguments)
    quiet_lightning()
    options.out.mkdir(parents=True, exist_ok=True)
    images = load_images(options.data)
    big = _teacher(images, options)
    found = Results(options.out / "results.json")
    for seed in options.seeds:
        for name in (ALONE, *options.losses):
            key = f"{images.name}, {options.images} images, {options.epochs} epochs, {name}, seed {seed}"
            if key not in found.accuracies:
                found.add(key, _student(name, seed, images, big, options))
    names = {
        name: [
            found.accuracies[f"{images.name}, {options.images} images, {options.epochs} epochs, {name}, seed {seed}"]
            for seed in options.seeds
        ]
        for name in (ALONE, *options.losses)
    }
    print(f"\n{images.name}, {options.images} training images, {options.epochs} epochs, seeds {options.seeds}\n")
    print(table(names))
    _plot(names, options.out / "distillation.png")


class Results:
    """Accuracies that survive a stop.

    Args:
        path: A JSON file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.accuracies: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

    def add(self, key: str, accuracy: float) -> None:
        """Write one down."""
        self.accuracies[key] = accuracy
        self.path.write_text(json.dumps(self.accuracies, indent=2) + "\n")


def _teacher(images: ImageSet, options: argparse.Namespace) -> nn.Module:
    """Train the teacher on all images, or load it."""
    network = teacher(options.teacher_width, n_classes=images.n_classes).to(memory_format=torch.channels_last)
    path = options.out / f"teacher_{options.teacher_width}_{options.teacher_epochs}.pt"
    if path.exists():
        network.load_state_dict(torch.load(path, weights_only=True))
        return network
    L.seed_everything(0, verbose=False)
    data = ImageData(images, batch_size=options.batch_size, hold_out=False)
    module = ImageClassifier(network, n_classes=images.n_classes, learning_rate=0.1)
    _trainer("teacher", options.teacher_epochs).fit(module, datamodule=data)
    print(f"teacher: {percent_equal(predict(module, data.test_dataloader()), images.test_labels)} %")
    torch.save(network.state_dict(), path)
    return network


def _student(name: str, seed: int, images: ImageSet, big: nn.Module, options: argparse.Namespace) -> float:
    """Train a student and return its accuracy on the test images, in percent."""
    L.seed_everything(seed, verbose=False)
    network = student(8, n_classes=images.n_classes).to(memory_format=torch.channels_last)
    module = ImageClassifier(network, n_classes=images.n_classes, learning_rate=options.learning_rate)
    data = ImageData(images, batch_size=options.batch_size, n_train=options.images, hold_out=False, seed=seed)
    callbacks = [] if name == ALONE else [KnowledgeDistillation(big, losses=LOSSES[name])]
    logger = CSVLogger(options.out, name=f"{name}, {options.images} images", version=f"seed_{seed}")
    _trainer(f"{name}, seed {seed}", options.epochs, callbacks, logger).fit(module, datamodule=data)
    return percent_equal(predict(module, data.test_dataloader()), images.test_labels)


def _trainer(
    name: str, epochs: int, callbacks: Sequence[L.Callback] = (), logger: CSVLogger | None = None
) -> L.Trainer:
    return L.Trainer(
        max_epochs=epochs,
        callbacks=[EpochLines(name), *callbacks],
        logger=logger or False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        check_val_every_n_epoch=epochs,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
    )


def table(accuracies: Mapping[str, Sequence[float]]) -> str:
    """Return a Markdown table of the accuracies and of the differences to the student alone, seed by seed.

    Args:
        accuracies: Those of every seed, in percent, by name; the first is the student alone.

    Returns:
        The table, with 95 % intervals where there are at least two seeds.

    Example:
        >>> print(table({"alone": [90.0, 91.0], "logits": [91.0, 92.5]}))
        | student | seeds, % | mean, % | against alone, points |
        |---|---|---|---|
        | alone | 90.00 / 91.00 | 90.50 | |
        | logits | 91.00 / 92.50 | 91.75 | +1.25 ± 3.18 |
    """
    alone = next(iter(accuracies.values()))
    lines = ["| student | seeds, % | mean, % | against alone, points |", "|---|---|---|---|"]
    for name, values in accuracies.items():
        gains = [value - base for value, base in zip(values, alone, strict=True)]
        gain = "" if values is alone else f"{mean(gains):+.2f} ± {interval(gains):.2f} "
        seeds = " / ".join(f"{value:.2f}" for value in values)
        lines.append(f"| {name} | {seeds} | {mean(values):.2f} | {gain}|")
    return "\n".join(lines)


def interval(values: Sequence[float]) -> float:
    """Return half of the 95 % interval of the mean, from Student's t; NaN for a single value.

    Args:
        values: Independent measurements.

    Example:
        >>> round(interval([1.0, 2.0, 3.0]), 3)
        2.484
    """
    if len(values) < 2:
        return float("nan")
    from scipy.stats import t  # type: ignore[import-untyped]  # comes with scikit-learn

    quantile = float(t.ppf(0.975, len(values) - 1))
    return quantile * stdev(values) / math.sqrt(len(values))


def _plot(accuracies: Mapping[str, Sequence[float]], path: Path) -> None:
    from matplotlib.figure import Figure

    alone, *others = accuracies
    figure = Figure(figsize=(7, 0.9 + 0.4 * len(others)), layout="constrained")
    axes = figure.subplots()
    for row, name in enumerate(others):
        gains = [value - base for value, base in zip(accuracies[name], accuracies[alone], strict=True)]
        axes.plot(gains, [row] * len(gains), ".", color="C0", alpha=0.5)
        half = interval(gains) if len(gains) > 1 else 0.0
        axes.errorbar(mean(gains), row, xerr=half, fmt="o", color="C0", capsize=4)
    axes.axvline(0.0, color="gray", linewidth=1)
    axes.set_yticks(range(len(others)), others)
    axes.invert_yaxis()
    axes.set_xlabel("test accuracy against the student alone, points\nmean and 95 % interval over seeds")
    figure.savefig(path, dpi=130)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help='folder with the files of Fashion-MNIST, or "digits"; looked for by default')
    parser.add_argument("--out", type=Path, default=Path("distillation_output"), help="folder for what comes out")
    parser.add_argument("--losses", nargs="+", default=list(LOSSES), choices=list(LOSSES), metavar="LOSS")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=5_000, help="images that the student is trained on")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--teacher-epochs", type=int, default=4)
    parser.add_argument("--teacher-width", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=125)
    parser.add_argument("--learning-rate", type=float, default=0.2)
    parser.add_argument("--quick", action="store_true", help="a minute on the digits, to see how it goes")
    options = parser.parse_args(arguments)
    if options.quick:
        options.data = options.data or "digits"
        options.images, options.epochs, options.teacher_epochs, options.teacher_width = 500, 3, 3, 8
        options.batch_size, options.seeds = 32, options.seeds[:2]
    return options


if __name__ == "__main__":
    main()
