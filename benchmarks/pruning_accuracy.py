"""Accuracy at 80, 90 and 95 % sparsity after one epoch of fine-tuning a ResNet-8 on Fashion-MNIST.

The budget that other pruning libraries are measured with: one float checkpoint of 4 epochs (batch 125, all 60,000
images, mirrored and shifted by up to 2 pixels, SGD with Nesterov momentum, one cycle up to 0.2, weight decay 5e-4),
then, for each row, one epoch (one cycle up to 0.02, weight decay 1e-4) from that checkpoint. The weights of the last
step are scored on all 10,000 test images.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn

from benchmarks.records import OUT, Records, markdown_table, print_machine
from benchmarks.training import Budget, train
from examples.evaluation import percent_equal, predict
from examples.fashion_mnist import load_images
from examples.image_data import ImageData, ImageSet
from examples.networks import ResNet, student
from lightning_compress import KnowledgeDistillation, MagnitudePruning
from lightning_compress.selection import weight_layers

DENSE = Budget(epochs=4, learning_rate=0.2, weight_decay=5e-4)
FINE_TUNE = Budget(epochs=1, learning_rate=0.02, weight_decay=1e-4)


def main() -> None:
    """Measure what is missing and print the table."""
    options = _parse()
    print_machine()
    images = load_images(options.data)
    records = Records("pruning_accuracy")
    rows: list[dict[str, Any]] = []
    for seed in options.seeds:
        key = {"images": images.name, "seed": seed}
        rows.append(records.get(partial(dense, images, seed), job="float, 4 epochs", **key))
        rows.append(records.get(partial(fine_tuned, images, seed, ()), job="float, one more epoch", **key))
        for sparsity, scope in product(options.sparsities, options.scopes):
            pruning = MagnitudePruning(sparsity=sparsity, start=0.0, end=options.end, scope=scope)
            job = f"{100 * sparsity:g} % zeros, scope {scope}, end {options.end:g}"
            rows.append(records.get(partial(fine_tuned, images, seed, (pruning,)), job=job, **key))
            distillation = KnowledgeDistillation(checkpoint(images, seed), temperature=4.0, weight=0.7)
            pruning = MagnitudePruning(sparsity=sparsity, start=0.0, end=options.end, scope=scope)
            both = partial(fine_tuned, images, seed, (distillation, pruning))
            rows.append(records.get(both, job=f"{job} + distillation from the float checkpoint", **key))
    columns = ("job", "seed", "accuracy", "sparsity", "seconds")
    print(f"\n{images.name}\n\n{markdown_table([{column: row[column] for column in columns} for row in rows])}")


def dense(images: ImageSet, seed: int) -> dict[str, Any]:
    """Train the float checkpoint that everything begins from."""
    torch.manual_seed(seed)
    network = student(8)
    _, seconds = train("float", network, images, DENSE, seed=seed)
    torch.save(network.state_dict(), checkpoint_path(images, seed))
    return scores(network, images, seconds)


def fine_tuned(images: ImageSet, seed: int, callbacks: Sequence[L.Callback]) -> dict[str, Any]:
    """Go on from the checkpoint for one epoch, with callbacks."""
    network = checkpoint(images, seed)
    # Another seed than the checkpoint's: its first epoch must not be seen a second time.
    _, seconds = train("fine-tuning", network, images, FINE_TUNE, seed=seed + 77, callbacks=callbacks)
    return scores(network, images, seconds)


def scores(network: nn.Module, images: ImageSet, seconds: float) -> dict[str, Any]:
    """Return what a network reaches on the test images, and how many of its weights are zeros."""
    weights = [layer.get_parameter("weight") for layer in weight_layers(network).values()]
    n_zeros = sum(int((weight == 0).sum()) for weight in weights)
    classes = predict(network, ImageData(images).test_dataloader())
    return {
        "accuracy": percent_equal(classes, images.test_labels),
        "sparsity": round(n_zeros / sum(weight.numel() for weight in weights), 4),
        "seconds": seconds,
    }


def checkpoint(images: ImageSet, seed: int) -> ResNet:
    """Return the network with the weights of the float checkpoint."""
    network = student(8)
    network.load_state_dict(torch.load(checkpoint_path(images, seed), weights_only=True))
    return network


def checkpoint_path(images: ImageSet, seed: int) -> Path:
    """Return where the float checkpoint lies."""
    return OUT / f"{images.name.replace(' ', '_')}_resnet8_seed_{seed}.pt"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.8, 0.9, 0.95])
    parser.add_argument("--scopes", nargs="+", choices=("global", "layer", "lamp"), default=["global", "lamp"])
    parser.add_argument("--end", type=float, default=0.5, help="share of the epoch at which the sparsity is reached")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--data", help='folder with the files of Fashion-MNIST, or "digits" to try the script out')
    return parser.parse_args()


if __name__ == "__main__":
    main()
