"""Accuracy at 8, 4, 3, 2 bits and 1 after one epoch of quantization-aware fine-tuning on Fashion-MNIST.

The budget that other quantization libraries are measured with, batch for batch: a float checkpoint of 4 epochs (batch
125, all 60,000 images, mirrored and shifted by up to 2 pixels, SGD with Nesterov momentum, one cycle up to 0.2, weight
decay 5e-4), then, for each row, one epoch (one cycle up to 0.02, weight decay 1e-4) from that checkpoint. The weights
of the last step are scored on all 10,000 test images, in torch and in the exported file in ONNX Runtime. First
convolution, classifier and the model's input keep 8 bits.

Run it in pieces with ``--depths``, ``--jobs`` and ``--seeds``: what is in ``benchmarks/out`` is not measured again.
``--ranges`` compares ways to find the scales; ``--images`` shortens the epoch for that. With ``--checkpoint`` all seeds
fine-tune one float checkpoint. ``--self-taught`` adds each job with the network as it was before as its teacher, beside
the labels and alone; ``--few N EPOCHS FINE_TUNE_EPOCHS`` does all of it on N images, with so many epochs in float and
after.
``--transforms`` compares ways to write weights: as they are, or in the frequencies of their kernels, with as many bits
for each or with bits where they tell; and the classic linear quantizer of so many levels over [min, max] of a layer.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import lightning as L
import torch
from torch.nn import functional as F

from benchmarks.records import OUT, Records, Row, markdown_table, print_machine
from benchmarks.training import Budget
from examples.classifier import ImageClassifier
from examples.epoch_lines import EpochLines
from examples.evaluation import percent_equal, predict, predict_onnx
from examples.fashion_mnist import load_images
from examples.image_data import Batch, ImageData, ImageSet
from examples.networks import ResNet, student
from lightning_compress import (
    DCT,
    KnowledgeDistillation,
    OnnxExport,
    QuantizationAwareTraining,
    save_compressed,
)
from lightning_compress.quantization import quantization_of
from lightning_compress.quantization.coefficients import CoefficientQuantizer
from lightning_compress.quantization.estimators import RangeMethod

FLOAT = Budget(epochs=4, learning_rate=0.2, weight_decay=5e-4)
FINE_TUNE = Budget(epochs=1, learning_rate=0.02, weight_decay=1e-4)
BATCH_SIZE = 125
JOBS = ("fp32", "W8A8", "W4A8", "W3A8", "W2A8", "W4A4", "W3A3", "W2A4", "W1A8", "W1A1")
TRANSFORMS: dict[str, DCT | None] = {"plain": None, "dct": DCT(), "dct-even": DCT(allocates=False), "levels": None}
RANGES: dict[str, RangeMethod | None] = {
    "default": None,
    "minmax": "minmax",
    "percentile": "percentile",
    "mse": "mse",
    "learned": "learned",
}

TEACHINGS = ("", "taught by itself", "taught by itself alone")


def main() -> None:
    """Measure what is missing and print the tables."""
    options = _parse()
    print_machine()
    images = load_images(options.data)
    records = Records("accuracy_bits")
    few = Few(*options.few) if options.few else None
    for depth in options.depths:
        for seed in options.seeds:
            start = seed if options.checkpoint is None else options.checkpoint
            name = "fp32, 4 epochs" if few is None else f"fp32, {few.float_epochs} epochs, {few.n_images} images"
            records.get(partial(_float, images, depth, start, few), job=name, depth=depth, seed=start)
            teachings = TEACHINGS if options.self_taught else TEACHINGS[:1]
            for job, ranges, transform, teaching in product(
                options.jobs, options.ranges, options.transforms, teachings
            ):
                measure = partial(
                    _fine_tuned,
                    images,
                    depth,
                    start,
                    seed,
                    job,
                    RANGES[ranges],
                    transform,
                    options.images,
                    teaching,
                    few,
                )
                name = job + (f" {ranges}" if RANGES[ranges] else "")
                name += f" {transform}" if transform != "plain" else ""
                name += f", {options.images} images" if options.images else ""
                name += f", {few.n_images} images in all, {few.epochs} epochs" if few else ""
                name += f", {teaching}" if teaching else ""
                records.get(measure, job=name, depth=depth, seed=seed)
    for depth in options.depths:
        print(f"\nResNet-{depth}, {images.name}\n\n{markdown_table(_table(records.rows, depth))}")


@dataclass(frozen=True)
class Few:
    """A budget of few images: a float network that has learned all it can from them, and then the job.

    Args:
        n_images: Images of both.
        float_epochs: Epochs in float.
        epochs: Epochs of the job.
    """

    n_images: int
    float_epochs: int
    epochs: int

    def part(self, images: ImageSet) -> ImageSet:
        """Return the first of the training images."""
        n = self.n_images
        return replace(images, train_images=images.train_images[:n], train_labels=images.train_labels[:n])


class Batches:
    """The training batches of the shared budget: one stream of random numbers gives the order and the augmentation.

    Args:
        images: The images.
        seed: Seed of the stream.
    """

    def __init__(self, images: ImageSet, seed: int) -> None:
        self.images = ((images.train_images.float() / 255) - images.mean[0]) / images.std[0]
        self.labels = images.train_labels
        self.background = -images.mean[0] / images.std[0]
        self.generator = torch.Generator().manual_seed(1000 + seed)

    def __len__(self) -> int:
        return len(self.images) // BATCH_SIZE

    def __iter__(self) -> Iterator[Batch]:
        order = torch.randperm(len(self.images), generator=self.generator)
        for indices in order[: len(self) * BATCH_SIZE].view(-1, BATCH_SIZE):
            yield self._augmented(self.images[indices]), self.labels[indices]

    def _augmented(self, images: torch.Tensor) -> torch.Tensor:
        n, size = len(images), images.shape[-1]
        down, right = torch.randint(0, 5, (2, n), generator=self.generator)
        mirrored = torch.rand(n, generator=self.generator) < 0.5
        columns = torch.arange(size)
        columns = torch.where(mirrored[:, None], columns.flip(0), columns) + right[:, None]
        rows = torch.arange(size) + down[:, None]
        padded = F.pad(images, (2, 2, 2, 2), value=self.background)
        return padded[torch.arange(n)[:, None, None], 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)


def _train(
    name: str, network: ResNet, images: ImageSet, budget: Budget, seed: int, callbacks: Sequence[L.Callback] = ()
) -> tuple[ImageClassifier, float]:
    torch.manual_seed(seed)
    classifier = ImageClassifier(
        network.to(memory_format=torch.channels_last),
        learning_rate=budget.learning_rate,
        weight_decay=budget.weight_decay,
    )
    trainer = L.Trainer(
        max_epochs=budget.epochs,
        accelerator="cpu",
        callbacks=[EpochLines(name), *callbacks],
        # Validation images are among the training images here: they serve the export's proof, not a choice.
        check_val_every_n_epoch=budget.epochs,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=OUT,
    )
    started = time.perf_counter()
    trainer.fit(classifier, Batches(images, seed), ImageData(images).val_dataloader())
    return classifier, round(time.perf_counter() - started, 1)


def _float(images: ImageSet, depth: int, seed: int, few: Few | None) -> dict[str, Any]:
    torch.manual_seed(seed)
    network = student(depth)
    part = images if few is None else few.part(images)
    budget = FLOAT if few is None else replace(FLOAT, epochs=few.float_epochs)
    _, seconds = _train(f"ResNet-{depth} in float, seed {seed}", network, part, budget, seed)
    torch.save(network.state_dict(), _path(depth, seed, few))
    accuracy = percent_equal(predict(network, ImageData(images).test_dataloader()), images.test_labels)
    return {"accuracy_torch": accuracy, "seconds": seconds}


def _fine_tuned(
    images: ImageSet,
    depth: int,
    checkpoint: int,
    seed: int,
    job: str,
    ranges: RangeMethod | None,
    transform: str,
    n_images: int | None,
    teaching: str,
    few: Few | None,
) -> dict[str, Any]:
    network = student(depth)
    network.load_state_dict(torch.load(_path(depth, checkpoint, few), weights_only=True))
    path = OUT / f"accuracy_bits_resnet{depth}_{job}_{ranges}_{transform}_seed_{seed}.onnx"
    part = replace(images, train_images=images.train_images[:n_images], train_labels=images.train_labels[:n_images])
    part = part if few is None else few.part(images)
    budget = FINE_TUNE if few is None else replace(FINE_TUNE, epochs=few.epochs)
    callbacks: list[L.Callback] = [OnnxExport(path, latency=False)]
    if job != "fp32":
        weight_bits, activation_bits = int(job[1]), int(job[3])
        callbacks.append(
            QuantizationAwareTraining(
                weight_bits=weight_bits,
                activation_bits=activation_bits,
                ranges=ranges,
                weight_transform=TRANSFORMS[transform],
            )
        )
        callbacks += [LinearLevels(weight_bits)] if transform == "levels" else []
    if teaching:
        has_labels = teaching == TEACHINGS[1]
        callbacks.append(KnowledgeDistillation("self", temperature=4.0, weight=0.7, task_loss=has_labels))
    # Another seed than the checkpoint's: its first epoch must not be seen a second time.
    classifier, seconds = _train(f"{job}, seed {seed}", network, part, budget, seed + 77, callbacks)
    # An archive keeps integers or coefficients, and has no form for levels.
    archive = None if transform == "levels" else save_compressed(classifier, path.with_suffix(".lcz"))
    in_torch = predict(classifier, ImageData(images).test_dataloader())
    in_runtime = predict_onnx(path, ImageData(images).test_dataloader())
    return {
        "accuracy_torch": percent_equal(in_torch, images.test_labels),
        "accuracy": percent_equal(in_runtime, images.test_labels),
        "agreement": percent_equal(in_torch, in_runtime),
        "file_bytes": path.stat().st_size,
        "archive_bytes": None if archive is None else archive.file_bytes,
        "checkpoint": checkpoint,
        "seconds": seconds,
    }


class LinearLevels(L.Callback):
    """Puts the classic linear quantizer in the place of that of scales: levels from the least to the largest weight.

    Args:
        bits: Their number is ``2**bits``.
    """

    def __init__(self, bits: int) -> None:
        self.n_steps = 2**bits - 1

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take over the weights that have as many bits."""
        state = quantization_of(pl_module)
        assert state is not None
        for quantizer in state.weights.values():
            if 2**quantizer.bits - 1 == self.n_steps:
                quantizer.coefficients, quantizer.method = _Levels(self.n_steps), "minmax"


class _Levels(CoefficientQuantizer):
    """Levels of the weights themselves, behind the same 8-bit integers as coefficients."""

    def __init__(self, n_steps: int) -> None:
        super().__init__(8)
        self.n_steps = n_steps

    def applies_to(self, shape: Sequence[int]) -> bool:
        return True

    def step(self, weight: torch.Tensor, *, covers: bool) -> torch.Tensor:
        low, high = torch.aminmax(weight.detach())
        return ((high - low) / self.n_steps).expand(len(weight))

    def rounded(self, weight: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        low, one = weight.detach().min(), step[0]
        levels = ((weight.detach() - low) / one).round() * one + low
        return levels + (weight - weight.detach())


def _kilobytes(rows: Sequence[Row]) -> str:
    sizes = [row["archive_bytes"] for row in rows if row.get("archive_bytes") is not None]
    return f"{mean(sizes) / 1e3:.1f}" if sizes else ""


def _table(rows: Sequence[Row], depth: int) -> list[dict[str, Any]]:
    lines = []
    jobs = dict.fromkeys([*JOBS, *sorted(row["job"] for row in rows if "accuracy" in row)])
    for job in jobs:
        found = [row for row in rows if row["depth"] == depth and row["job"] == job]
        if found:
            lines.append(
                {
                    "bits": job,
                    "seeds": ", ".join(str(row["seed"]) for row in found),
                    "in torch, %": " / ".join(f"{row['accuracy_torch']:.2f}" for row in found),
                    "file in ONNX Runtime, %": " / ".join(f"{row['accuracy']:.2f}" for row in found),
                    "mean of the files, %": f"{mean(row['accuracy'] for row in found):.2f}",
                    "archive, kB": _kilobytes(found),
                    "agreement, %": f"{mean(row['agreement'] for row in found):.2f}",
                    "seconds": f"{mean(row['seconds'] for row in found):.0f}",
                }
            )
    return lines


def _path(depth: int, seed: int, few: Few | None) -> Path:
    which = "" if few is None else f"_{few.n_images}_images_{few.float_epochs}_epochs"
    return OUT / f"accuracy_bits_resnet{depth}_seed_{seed}{which}.pt"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", nargs="+", type=int, default=[8, 20], help="of the ResNets")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=JOBS)
    parser.add_argument("--ranges", nargs="+", choices=RANGES, default=["default"])
    parser.add_argument("--transforms", nargs="+", choices=TRANSFORMS, default=["plain"], help="of the weights")
    parser.add_argument("--self-taught", action="store_true", help="each also distilled from the float checkpoint")
    parser.add_argument("--images", type=int, help="fine-tune on so many images only")
    parser.add_argument("--few", nargs=3, type=int, metavar=("N", "EPOCHS", "FINE_TUNE_EPOCHS"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--checkpoint", type=int, help="seed of one float checkpoint for all; by default each its own")
    parser.add_argument("--data", help="folder with the files of Fashion-MNIST")
    return parser.parse_args()


if __name__ == "__main__":
    main()
