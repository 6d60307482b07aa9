"""Cheaper convolutions in one fit: a low rank, or filters that channels share, and small layers in the file.

A dense residual network is trained on Fashion-MNIST. The same training goes on with one callback and the dense network
as the teacher, and leaves a file whose layers are the small ones. Run it from the project's root with
``python -m examples.factorize --method spatial``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch
from torch import nn

from examples.classifier import ImageClassifier
from examples.epoch_lines import EpochLines
from examples.evaluation import percent_equal, predict, predict_onnx
from examples.fashion_mnist import load_images
from examples.image_data import ImageData
from examples.networks import student
from examples.quiet import quiet_lightning
from lightning_compress import Factorize, FilterSharing, KnowledgeDistillation, OnnxExport, compact
from lightning_compress.report import ModelStatistics, model_statistics

METHODS: dict[str, Callable[[argparse.Namespace], L.Callback]] = {
    "channel": lambda options: Factorize(options.rank, scheme="channel"),
    "spatial": lambda options: Factorize(options.rank, scheme="spatial"),
    "share-inputs": lambda options: FilterSharing(options.size, over="inputs"),
    "share-outputs": lambda options: FilterSharing(options.size, over="outputs"),
}
"""What each method adds to the Trainer."""


@dataclass(frozen=True)
class Size:
    """How much to train.

    Args:
        depth: Layers of the network.
        n_train: Training images.
        dense_epochs: Epochs of the dense network.
        epochs: Epochs of the fit that makes it small.
        batch_size: Images per batch.
    """

    depth: int
    n_train: int
    dense_epochs: int
    epochs: int
    batch_size: int


FULL = Size(depth=20, n_train=60_000, dense_epochs=6, epochs=4, batch_size=125)
QUICK = Size(depth=8, n_train=800, dense_epochs=6, epochs=4, batch_size=32)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train both networks, print what the small one costs and leave model.onnx and record.json behind."""
    options = _parse(arguments)
    quiet_lightning()
    options.out.mkdir(parents=True, exist_ok=True)
    L.seed_everything(options.seed, verbose=False)
    images = load_images(options.data)
    size = QUICK if options.quick else FULL
    data = ImageData(images, batch_size=size.batch_size, n_train=size.n_train, seed=options.seed)

    dense = ImageClassifier(student(size.depth, n_classes=images.n_classes), n_classes=images.n_classes)
    _trainer("dense", size.dense_epochs).fit(dense, datamodule=data)

    fine_tuned = ImageClassifier(deepcopy(dense.network), n_classes=images.n_classes, learning_rate=0.05)
    path = options.out / "model.onnx"
    compression = [
        METHODS[options.method](options),
        KnowledgeDistillation(dense.network, temperature=4.0, weight=0.7),
        OnnxExport(path),
    ]
    _trainer(options.method, size.epochs, compression).fit(fine_tuned, datamodule=data)

    small, record = compact(fine_tuned)
    (options.out / "record.json").write_text(json.dumps(record) + "\n")
    tests, labels = data.test_dataloader(), images.test_labels
    classes = {
        "dense": predict(dense, tests),
        "small module": predict(small, tests),
        "file in ONNX Runtime": predict_onnx(path, tests),
    }
    counts = {"dense": _counted(dense, images.n_channels), "small module": _counted(small, images.n_channels)}
    print(f"\nAccuracy on the {len(labels):,} test images of {images.name}, {options.method}:")
    for name, found in classes.items():
        cost = counts.get(name, counts["small module"])
        print(
            f"  {name}: {percent_equal(found, labels)} % with {cost.macs:,} multiply-accumulates and "
            f"{cost.parameters:,} parameters"
        )
    agreement = percent_equal(classes["small module"], classes["file in ONNX Runtime"])
    print(f"The small module and the file agree on {agreement} % of the images. The file: {path}")


def _counted(model: nn.Module, n_channels: int) -> ModelStatistics:
    return model_statistics(model, (torch.zeros(1, n_channels, 28, 28),))


def _trainer(name: str, epochs: int, callbacks: Sequence[L.Callback] = ()) -> L.Trainer:
    return L.Trainer(
        max_epochs=epochs,
        callbacks=[EpochLines(name), *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=list(METHODS), default="channel")
    parser.add_argument("--rank", type=float, default=0.25, help="share of a layer's channels between its factors")
    parser.add_argument("--size", type=int, default=2, help="channels that share a filter")
    parser.add_argument("--data", help='folder with the files of Fashion-MNIST, or "digits"; looked for by default')
    parser.add_argument("--out", type=Path, default=Path("factorize_output"), help="folder for what comes out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a small network and few images, for the tests")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
