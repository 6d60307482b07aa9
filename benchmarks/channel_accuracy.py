"""Accuracy at half the multiply-accumulates after one epoch of fine-tuning a ResNet-8 on Fashion-MNIST.

The protocol of `benchmarks.pruning_accuracy`: one float checkpoint of 4 epochs for each seed, then one epoch from it,
all 60,000 images, the weights of the last step scored on all 10,000 test images. `ChannelPruning` with and without
distillation from that very checkpoint stands beside Torch-Pruning as its README uses it (group magnitude importance;
at once before the epoch, or in five steps, each followed by a fifth of the epoch). Then the same total budget from
scratch: `ChannelPruning` in one fit of all 5 epochs stands beside a narrower dense network, both with and without
distillation from the float checkpoint. All have the multiply-accumulates of `--macs`, as near as their widths allow.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import nn

from benchmarks.pruning_accuracy import DENSE, FINE_TUNE, checkpoint, dense, scores
from benchmarks.records import Records, markdown_table, print_machine
from benchmarks.training import train
from examples.fashion_mnist import load_images
from examples.image_data import ImageSet
from examples.networks import student
from lightning_compress import ChannelPruning, KnowledgeDistillation, shrink
from lightning_compress.pruning.channels.importance import Importance
from lightning_compress.report import model_statistics

IMAGE = (torch.zeros(1, 1, 28, 28),)
N_STEPS = 5
"""Steps of Torch-Pruning's iterative use."""

WHOLE = replace(DENSE, epochs=DENSE.epochs + FINE_TUNE.epochs)
"""The checkpoint's epochs and those of fine-tuning as one training."""


def main() -> None:
    """Measure what is missing and print the table."""
    options = _parse()
    print_machine()
    images = load_images(options.data)
    records = Records("channel_accuracy")
    rows: list[dict[str, Any]] = []
    for seed in options.seeds:
        key = {"images": images.name, "seed": seed, "macs_asked": options.macs}
        checkpoints = {name: value for name, value in key.items() if name != "macs_asked"}
        Records("pruning_accuracy").get(partial(dense, images, seed), job="float, 4 epochs", **checkpoints)
        jobs: dict[str, Callable[[], dict[str, Any]]] = {"float, one more epoch": partial(_float, images, seed)}
        for scope in ("layer", "global"):
            for weight in (0.0, 0.7):
                name = f"ChannelPruning, {scope}" + (", distilled" if weight else "")
                jobs[name] = partial(_ours, images, seed, options, "l2", scope, weight)
        for importance in options.importances:
            name = f"ChannelPruning, layer, distilled, {importance}"
            jobs[name] = partial(_ours, images, seed, options, importance, "layer", 0.7)
        jobs["Torch-Pruning, at once"] = partial(_theirs, images, seed, options.macs, 1)
        jobs[f"Torch-Pruning, {N_STEPS} steps"] = partial(_theirs, images, seed, options.macs, N_STEPS)
        for weight in (0.0, 0.7):
            end = ", distilled" if weight else ""
            jobs[f"ChannelPruning, {WHOLE.epochs} epochs from scratch{end}"] = partial(
                _in_one_fit, images, seed, options, weight
            )
            jobs[f"narrow and dense, {WHOLE.epochs} epochs from scratch{end}"] = partial(
                _narrow, images, seed, options.macs, weight
            )
        wanted = {name: measure for name, measure in jobs.items() if options.jobs is None or name in options.jobs}
        rows += [records.get(measure, job=name, **key) for name, measure in wanted.items()]
    table = [
        {
            "job": job,
            "seeds, %": " / ".join(f"{row['accuracy']:.2f}" for row in found),
            "mean, %": f"{sum(row['accuracy'] for row in found) / len(found):.2f}",
            "MACs": f"{100 * sum(row['macs'] for row in found) / len(found):.1f} %",
            "parameters": f"{sum(row['parameters'] for row in found) / len(found):,.0f}",
        }
        for job in dict.fromkeys(row["job"] for row in rows)
        if (found := [row for row in rows if row["job"] == job])
    ]
    print(f"\n{images.name}, seeds {options.seeds}\n\n{markdown_table(table)}")


def _counted(network: nn.Module) -> dict[str, Any]:
    found = model_statistics(network, IMAGE)
    return {"macs": found.macs / model_statistics(student(8), IMAGE).macs, "parameters": found.parameters}


def _float(images: ImageSet, seed: int) -> dict[str, Any]:
    network = checkpoint(images, seed)
    _, seconds = train("float", network, images, FINE_TUNE, seed=seed + 77)
    return {**scores(network, images, seconds), **_counted(network)}


def _ours(
    images: ImageSet, seed: int, options: argparse.Namespace, importance: Importance, scope: Any, weight: float
) -> dict[str, Any]:
    network = checkpoint(images, seed)
    pruning = ChannelPruning(
        options.macs, end=options.end, importance=importance, scope=scope, round_to=options.round_to
    )
    callbacks = [pruning, *_distillation(images, seed, weight)]
    classifier, seconds = train("ChannelPruning", network, images, FINE_TUNE, seed=seed + 77, callbacks=callbacks)
    small, _ = shrink(classifier)
    return {**scores(small, images, seconds), **_counted(small)}


def _distillation(images: ImageSet, seed: int, weight: float) -> list[L.Callback]:
    return [KnowledgeDistillation(checkpoint(images, seed), temperature=4.0, weight=weight)] if weight else []


def _in_one_fit(images: ImageSet, seed: int, options: argparse.Namespace, weight: float) -> dict[str, Any]:
    torch.manual_seed(seed)
    network = student(8)
    pruning = ChannelPruning(options.macs, start=0.1, end=options.end, scope="layer", round_to=options.round_to)
    callbacks = [pruning, *_distillation(images, seed, weight)]
    classifier, seconds = train("ChannelPruning", network, images, WHOLE, seed=seed, callbacks=callbacks)
    small, _ = shrink(classifier)
    return {**scores(small, images, seconds), **_counted(small)}


def _theirs(images: ImageSet, seed: int, macs: float, n_steps: int) -> dict[str, Any]:
    network = checkpoint(images, seed)
    ratio = _ratio_for(network, macs)
    pruner, seconds = _pruner(network, ratio, n_steps), 0.0
    part = replace(
        images,
        train_images=images.train_images[: len(images.train_images) // n_steps],
        train_labels=images.train_labels[: len(images.train_labels) // n_steps],
    )
    for step in range(n_steps):
        pruner.step()
        network.train()  # tracing has left it in eval mode, which Lightning keeps
        first = step * len(part.train_images)
        these = replace(
            part,
            train_images=images.train_images[first : first + len(part.train_images)],
            train_labels=images.train_labels[first : first + len(part.train_images)],
        )
        _, passed = train("Torch-Pruning", network, these, FINE_TUNE, seed=seed + 77 + step)
        seconds += passed
    return {**scores(network, images, seconds), **_counted(network)}


def _ratio_for(network: nn.Module, macs: float) -> float:
    """Return the pruning ratio that comes nearest to a share of the multiply-accumulates."""
    found = {}
    for percent in range(20, 50):
        tried = deepcopy(network)
        _pruner(tried, percent / 100, 1).step()
        found[abs(_counted(tried)["macs"] - macs)] = percent / 100
    return found[min(found)]


def _pruner(network: Any, ratio: float, n_steps: int) -> Any:
    import torch_pruning

    return torch_pruning.pruner.BasePruner(
        network,
        *IMAGE,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        iterative_steps=n_steps,
        ignored_layers=[network.head],
    )


def _narrow(images: ImageSet, seed: int, macs: float, weight: float) -> dict[str, Any]:
    torch.manual_seed(seed)
    widths = {abs(_counted(student(8, width=width))["macs"] - macs): width for width in range(6, 17)}
    network = student(8, width=widths[min(widths)])
    callbacks = _distillation(images, seed, weight)
    _, seconds = train("narrow", network, images, WHOLE, seed=seed, callbacks=callbacks)
    return {**scores(network, images, seconds), **_counted(network)}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--macs", type=float, default=0.48, help="share of the multiply-accumulates that remains")
    parser.add_argument("--end", type=float, default=0.3, help="share of the epoch at which it is reached")
    parser.add_argument("--round-to", type=int, default=16)
    parser.add_argument("--importances", nargs="*", default=["taylor", "fpgm", "bn_scale", "random"])
    parser.add_argument("--jobs", nargs="+", help="names of the table's first column; by default all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--data", help='folder with the files of Fashion-MNIST, or "digits" to try the script out')
    return parser.parse_args()


if __name__ == "__main__":
    main()
