"""Multiply-accumulates against accuracy of a low rank and of shared filters, after fine-tuning a ResNet-8.

The protocol of `benchmarks.pruning_accuracy`: one float checkpoint of 4 epochs on Fashion-MNIST for each seed, then
`--epochs` from it with one callback, all 60,000 images. What `compact` makes of the weights of the last step is
counted, compared with them in float64, and scored on all 10,000 test images. The baseline is the same fine-tuning
without a callback. `--distilled` adds the checkpoint as the teacher of every row.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import mean
from typing import Any

import lightning as L
import torch
from torch import nn

from benchmarks.pruning_accuracy import FINE_TUNE, checkpoint, dense, scores
from benchmarks.records import Records, markdown_table, print_machine
from benchmarks.training import train
from examples.fashion_mnist import load_images
from examples.image_data import ImageSet
from lightning_compress import Factorize, FilterSharing, KnowledgeDistillation, compact
from lightning_compress.callbacks.compacting import check_compacted
from lightning_compress.report import model_statistics

IMAGE = torch.zeros(1, 1, 28, 28)

Make = Callable[[float], L.Callback]
"""Makes the callback, for a share of the fine-tuning at which it has reached its form."""


def jobs() -> dict[str, Make]:
    """Return what is measured beside the baseline, by the names of the table."""
    found: dict[str, Make] = {}
    for scheme in ("channel", "spatial"):
        for rank in (0.5, 0.25):
            found[f"Factorize({rank}, {scheme})"] = partial(_factorize, rank, scheme)
    for groups in ("similar", "consecutive"):
        for size in (2, 4):
            found[f"FilterSharing({size}, inputs, {groups})"] = partial(_share, size, groups)
    return found


def main() -> None:
    """Measure what is missing and print the table."""
    options = _parse()
    print_machine()
    images = load_images(options.data)
    records = Records("decomposition")
    rows: list[dict[str, Any]] = []
    for seed in options.seeds:
        key = {"images": images.name, "seed": seed}
        Records("pruning_accuracy").get(partial(dense, images, seed), job="float, 4 epochs", **key)
        key |= {"epochs": options.epochs, "end": options.end, "distilled": options.distilled}
        rows.append(records.get(partial(_measure, images, seed, options, None), job="dense", **key))
        rows += [
            records.get(partial(_measure, images, seed, options, make), job=job, **key)
            for job, make in jobs().items()
            if options.jobs is None or job in options.jobs
        ]
    print(f"\n{images.name}, {options.epochs} epochs, seeds {options.seeds}\n\n{markdown_table(_table(rows))}")


def _table(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    by_job = {job: [row for row in rows if row["job"] == job] for job in dict.fromkeys(row["job"] for row in rows)}
    baseline = mean(row["accuracy"] for row in by_job["dense"])
    return [
        {
            "job": job,
            "MACs": f"{100 * mean(row['macs'] for row in found):.1f} %",
            "parameters": f"{mean(row['parameters'] for row in found):,.0f}",
            "seeds, %": " / ".join(f"{row['accuracy']:.2f}" for row in found),
            "mean, %": f"{mean(row['accuracy'] for row in found):.2f}",
            "to dense": f"{mean(row['accuracy'] for row in found) - baseline:+.2f}",
            "seconds": f"{mean(row['seconds'] for row in found):.0f}",
        }
        for job, found in by_job.items()
    ]


def _measure(images: ImageSet, seed: int, options: argparse.Namespace, make: Make | None) -> dict[str, Any]:
    network = checkpoint(images, seed)
    whole = model_statistics(network, (IMAGE,)).macs
    callbacks = [make(options.end)] if make else []
    if options.distilled:
        callbacks.append(KnowledgeDistillation(checkpoint(images, seed), temperature=4.0, weight=0.7))
    budget = replace(FINE_TUNE, epochs=options.epochs)
    # Another seed than the checkpoint's: its first epoch must not be seen a second time.
    classifier, seconds = train("fine-tuning", network, images, budget, seed=seed + 77, callbacks=callbacks)
    small: nn.Module = classifier
    difference = 0.0
    if make:
        small, record = compact(classifier)
        difference = check_compacted(classifier, small, record, [((torch.rand(8, 1, 28, 28),), {})])
    counted = model_statistics(small, (IMAGE,))
    return {
        **scores(small, images, seconds),
        "macs": counted.macs / whole,
        "parameters": counted.parameters,
        "difference": difference,
    }


def _factorize(rank: float, scheme: Any, end: float) -> L.Callback:
    return Factorize(rank, scheme=scheme, end=end)


def _share(size: int, groups: Any, end: float) -> L.Callback:
    return FilterSharing(size, over="inputs", groups=groups, end=end)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=1, help="of fine-tuning")
    parser.add_argument("--end", type=float, default=0.5, help="share of them at which the small form is reached")
    parser.add_argument("--distilled", action="store_true", help="learn from the float checkpoint too")
    parser.add_argument("--jobs", nargs="+", help="names of the table's first column; by default all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--data", help='folder with the files of Fashion-MNIST, or "digits" to try the script out')
    return parser.parse_args()


if __name__ == "__main__":
    main()
