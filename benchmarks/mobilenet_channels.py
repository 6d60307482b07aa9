"""ImageNet's MobileNetV2 on photos: distilled, pruned by channels and quantized in one fit, against its float self.

A float network is fine-tuned from the ImageNet weights for `--base-epochs`. From there every job goes on for
`--epochs`: in float, and, with the network that they all begin from as the teacher, in int8 with a share of the
multiply-accumulates. So all have seen the same number of epochs in the same order. Every layer keeps at least the share
of its channels that a `sensitivity` scan of the network that they begin from gives it, for a drop of at most
`--max-drops` in the accuracy on validation photos, which are among the training photos, or so many times as much that
the share can be reached. Accuracy is that of the exported file in ONNX Runtime on the test photos; the files of the
first seed are timed, interleaved.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import lightning as L
import numpy as np
import torch

from benchmarks.records import OUT, Records, Row, markdown_table, print_machine
from examples.classifier import ImageClassifier
from examples.evaluation import percent_equal, predict, predict_onnx
from examples.fine_tune_mobilenet import fine_tune, mobilenet_v2
from examples.image_data import ImageData, ImageSet
from examples.photos import load_photos
from lightning_compress import (
    ChannelPruning,
    KnowledgeDistillation,
    OnnxExport,
    QuantizationAwareTraining,
    sensitivity,
    shrink,
)
from lightning_compress.errors import CompressionError
from lightning_compress.report import compare_latency, model_statistics

LOOSER = (1.0, 1.5, 2.0, 3.0, 5.0)
"""What the drop that a layer alone may cost is multiplied by, until the share can be reached."""


def main() -> None:
    """Measure what is missing and print the table."""
    options = _parse()
    print_machine()
    images = load_photos(options.data, pixels=options.pixels)
    records = Records("mobilenet_channels")
    key = {"images": images.name, "pixels": options.pixels, "epochs": f"{options.base_epochs} + {options.epochs}"}
    rows: list[Row] = []
    for seed in options.seeds:
        records.get(partial(base, images, options, seed), share="base", seed=seed, **key)
        for share, max_drop in zip((1.0, *options.macs), (None, *options.max_drops), strict=True):
            measure = partial(_reached, images, options, seed, share, max_drop)
            rows.append(records.get(measure, share=share, max_drop=max_drop, seed=seed, **key))
    if options.only_train:
        return
    shares, seed = (1.0, *options.macs), options.seeds[0]
    sizes, times = _sizes_and_times({_name(share): _file(share, seed) for share in shares}, options)
    table = []
    for share in shares:
        found, name = [row for row in rows if row["share"] == share], _name(share)
        accuracy = mean(row["accuracy"] for row in found)
        float_accuracy = mean(row["accuracy"] for row in rows if row["share"] == 1.0)
        table.append(
            {
                "network": name,
                "accuracy of the file, %": " / ".join(f"{row['accuracy']:.2f}" for row in found),
                "mean, %": f"{accuracy:.2f}",
                "against fp32, points": f"{accuracy - float_accuracy:+.2f}",
                "MACs": f"{100 * found[0]['macs'] / rows[0]['macs']:.0f} %",
                "file, MB": f"{sizes[name] / 1e6:.2f} ({sizes[_name(1.0)] / sizes[name]:.1f}x smaller)",
                **{
                    f"batch {batch}, ms": f"{times[name, batch]:.2f} "
                    f"({times[_name(1.0), batch] / times[name, batch]:.1f}x faster)"
                    for batch in (1, 8)
                },
            }
        )
    print(f"\n{key}, seeds {options.seeds}\n\n{markdown_table(table)}")


def base(images: ImageSet, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    data = ImageData(images, batch_size=32, hold_out=False, seed=seed)
    module = fine_tune(f"base, seed {seed}", data, options.weights, epochs=options.base_epochs, seed=seed)
    torch.save(module.network.state_dict(), checkpoint(seed))
    return {"accuracy": percent_equal(predict(module, data.test_dataloader()), images.test_labels)}


def _reached(
    images: ImageSet, options: argparse.Namespace, seed: int, share: float, max_drop: float | None
) -> dict[str, Any]:
    """Measure with the tightest budget with which the share can be reached."""
    for factor in LOOSER:
        try:
            return {**_measure(images, options, seed, share, max_drop and max_drop * factor), "looser": factor}
        except CompressionError as error:
            if "cannot be reached" not in str(error) or factor == LOOSER[-1]:
                raise
    raise AssertionError("the loop has returned or raised")


def _measure(
    images: ImageSet, options: argparse.Namespace, seed: int, share: float, max_drop: float | None
) -> dict[str, Any]:
    """Go on from the base, and score the file."""
    # Another seed than the base's: its epochs must not be seen a second time.
    data = ImageData(images, batch_size=32, hold_out=False, seed=seed + 77)
    network, teacher = (mobilenet_v2(images.n_classes, options.weights) for _ in range(2))
    for one in (network, teacher):
        one.load_state_dict(torch.load(checkpoint(seed), weights_only=True))
    path = _file(share, seed)
    callbacks: list[L.Callback] = [OnnxExport(path, latency=False)]
    if max_drop is not None:
        start = ImageClassifier(network, n_classes=images.n_classes)
        report = sensitivity(start, ImageData(images, batch_size=80, hold_out=False), "val_accuracy", bits=())
        callbacks += [
            KnowledgeDistillation(teacher, temperature=4.0, weight=0.7),
            ChannelPruning(macs=share, end=0.4, scope="layer", budget=report.channel_budget(max_drop)),
            QuantizationAwareTraining(start=0.6),
        ]
    name, started = f"{_name(share)}, seed {seed}", time.perf_counter()
    module = fine_tune(name, data, network=network, epochs=options.epochs, seed=seed + 77, callbacks=callbacks)
    seconds = round(time.perf_counter() - started, 1)
    small = shrink(module).model if share < 1.0 else module
    statistics = model_statistics(small, (torch.zeros(1, 3, options.pixels, options.pixels),))
    return {
        "accuracy": percent_equal(predict_onnx(path, data.test_dataloader()), images.test_labels),
        "accuracy_torch": percent_equal(predict(module, data.test_dataloader()), images.test_labels),
        "macs": statistics.macs,
        "parameters": statistics.parameters,
        "seconds": seconds,
    }


def _sizes_and_times(
    files: dict[str, Path], options: argparse.Namespace
) -> tuple[dict[str, int], dict[tuple[str, int], float]]:
    shape = (1, 3, options.pixels, options.pixels)
    image = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    found = compare_latency(files, {"images": image}, rounds=options.rounds, budget_s=600.0)
    times = {(row.file, row.batch_size): row.median_ms for row in found.rows}
    return {name: path.stat().st_size for name, path in files.items()}, times


def _name(share: float) -> str:
    return "fp32" if share == 1.0 else f"int8, {share:g} of the MACs"


def _file(share: float, seed: int) -> Path:
    return OUT / f"mobilenet_channels_{share:g}_seed_{seed}.onnx"


def checkpoint(seed: int) -> Path:
    return OUT / f"mobilenet_channels_base_seed_{seed}.pt"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="an .npz file, or a folder of photos")
    parser.add_argument("--weights", type=Path, help="file with the ImageNet weights; torchvision's own by default")
    parser.add_argument("--pixels", type=int, default=96)
    parser.add_argument("--macs", nargs="+", type=float, default=[0.7, 0.5], help="shares of the pruned networks")
    parser.add_argument("--max-drops", nargs="+", type=float, default=[0.02, 0.045], help="for each of the shares")
    parser.add_argument("--base-epochs", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--only-train", action="store_true", help="train what is missing and time nothing")
    return parser.parse_args()


if __name__ == "__main__":
    main()
