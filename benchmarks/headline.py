"""The headline: ResNet-50 distilled, pruned by channels and quantized in one fit, against its dense float self.

torchvision's ResNet-50 (10 classes) on Fashion-MNIST, three equal channels of 64 pixels, the first `--images` training
images. A float network is trained for `--base-epochs`; from these weights every job goes on for `--epochs`: in float,
in int8, and, with the float network that this gave as the teacher, in int8 with a share of the multiply-accumulates.
So all have seen the same number of epochs in the same order. Accuracy is that of the exported file in ONNX Runtime on
all 10,000 test images. Then the same networks are written for 224 pixels and timed, interleaved, in ONNX Runtime and
in OpenVINO, each against the float file in the same runtime.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet50

from benchmarks.records import OUT, Records, markdown_table, print_machine
from examples.classifier import ImageClassifier
from examples.epoch_lines import EpochLines
from examples.evaluation import percent_equal, predict, predict_onnx
from examples.fashion_mnist import load_images
from examples.image_data import ImageData, ImageSet
from lightning_compress import (
    ChannelPruning,
    KnowledgeDistillation,
    OnnxExport,
    QuantizationAwareTraining,
    export_onnx,
    load_compressed_state,
    shrink,
)
from lightning_compress.report import compare_latency, model_statistics

PIXELS, TIMED_PIXELS, BATCH_SIZE = 64, 224, 50
FLOAT, INT8 = "fp32", "int8"


def main() -> None:
    """Train what is missing, measure, print the tables and draw the picture."""
    options = _parse()
    print_machine()
    records = Records("headline")
    images = _enlarged(load_images(options.data), options.images)
    key = {
        "images": f"{images.name}, {len(images.train_images)}",
        "epochs": f"{options.base_epochs} + {options.epochs}",
        "precision": options.precision,
        "seed": options.seed,
    }
    records.get(partial(_train_base, images, options), job="base", **key)
    jobs = [FLOAT, INT8, *(f"int8, {share:g} of the MACs" for share in options.macs)]
    rows = [records.get(partial(_train, job, images, options), job=job, **key) for job in jobs if _wanted(job, options)]
    if options.only:
        return
    files = {job: _timed_file(job, options) for job in jobs}
    sizes = {job: sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*")) for job, path in files.items()}
    times = {
        "ONNX Runtime": _onnxruntime_times(files, options.rounds),
        "OpenVINO": _openvino_times(files, options.rounds),
    }
    table = [
        {
            "network": row["job"],
            "accuracy of the file, %": row["accuracy"],
            "against fp32, points": f"{row['accuracy'] - rows[0]['accuracy']:+.2f}",
            "MACs": f"{100 * row['macs'] / rows[0]['macs']:.0f} %",
            "file, MB": f"{sizes[row['job']] / 1e6:.1f}",
            "smaller": f"{sizes[FLOAT] / sizes[row['job']]:.1f}x",
            **{
                f"{runtime}, batch {batch}, ms (faster)": f"{found[row['job'], batch]:.1f} "
                f"({found[FLOAT, batch] / found[row['job'], batch]:.1f}x)"
                for runtime, found in times.items()
                for batch in (1, 8)
            },
        }
        for row in rows
    ]
    print(f"\n{key}\n\n{markdown_table(table)}")
    points = [(row["job"], times["ONNX Runtime"][row["job"], 1], row["accuracy"]) for row in rows]
    _plot(points, images.name, options.picture)


def _wanted(job: str, options: argparse.Namespace) -> bool:
    return not options.only or job in options.only


def _enlarged(images: ImageSet, n_train: int) -> ImageSet:
    """Return the first images at 64 pixels, in three equal channels."""

    def large(part: torch.Tensor) -> torch.Tensor:
        parts = [
            F.interpolate(some.float(), size=PIXELS, mode="bilinear").round().byte()
            for some in torch.split(part, 5_000)
        ]
        return torch.cat(parts).expand(-1, 3, -1, -1).contiguous()

    return ImageSet(
        images.name,
        large(images.train_images[:n_train]),
        images.train_labels[:n_train],
        large(images.test_images),
        images.test_labels,
        images.mean * 3,
        images.std * 3,
        images.flip,
    )


def _network() -> nn.Module:
    network: nn.Module = resnet50(num_classes=10)
    return network


def _fit(
    name: str,
    module: ImageClassifier,
    images: ImageSet,
    options: argparse.Namespace,
    epochs: int,
    callbacks: Sequence[L.Callback] = (),
) -> float:
    seed = options.seed + (77 if epochs == options.epochs else 0)
    torch.manual_seed(seed)
    data = ImageData(images, batch_size=BATCH_SIZE, hold_out=False, n_val=500, seed=seed)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        precision=options.precision,
        callbacks=[EpochLines(name), *callbacks],
        check_val_every_n_epoch=epochs,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=OUT,
    )
    started = time.perf_counter()
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(_checkpoint(name, options), weights_only=True)
    return round(time.perf_counter() - started, 1)


def _classifier(options: argparse.Namespace, learning_rate: float) -> ImageClassifier:
    network = _network().to(memory_format=torch.channels_last)
    return ImageClassifier(network, learning_rate=learning_rate, weight_decay=5e-4)


def _train_base(images: ImageSet, options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(options.seed)
    module = _classifier(options, options.base_learning_rate)
    seconds = _fit("base", module, images, options, options.base_epochs)
    return {"accuracy": _accuracy(module, images), "seconds": seconds}


def _train(job: str, images: ImageSet, options: argparse.Namespace) -> dict[str, Any]:
    module = _classifier(options, options.learning_rate)
    module.load_state_dict(torch.load(_checkpoint("base", options), weights_only=True)["state_dict"])
    path = OUT / f"headline_{_slug(job)}.onnx"
    callbacks: list[L.Callback] = [OnnxExport(path, latency=False)]
    if job != FLOAT:
        callbacks.append(QuantizationAwareTraining(start=0.5))
        teacher = _network()
        saved = torch.load(_checkpoint(FLOAT, options), weights_only=True)["state_dict"]
        teacher.load_state_dict({name.removeprefix("network."): value for name, value in saved.items()})
        callbacks.append(KnowledgeDistillation(teacher, temperature=4.0, weight=0.7))
    if job not in (FLOAT, INT8):
        share = float(job.split()[1])
        callbacks.append(ChannelPruning(macs=share, end=0.35, scope=options.scope))
    seconds = _fit(job, module, images, options, options.epochs, callbacks)
    batches = ImageData(images, batch_size=BATCH_SIZE).test_dataloader()
    small = module if job in (FLOAT, INT8) else shrink(module).model
    statistics = model_statistics(small, (torch.zeros(1, 3, PIXELS, PIXELS),))
    return {
        "accuracy": percent_equal(predict_onnx(path, batches), images.test_labels),
        "accuracy_torch": _accuracy(module, images),
        "macs": statistics.macs,
        "parameters": statistics.parameters,
        "seconds": seconds,
    }


def _accuracy(module: nn.Module, images: ImageSet) -> float:
    batches = ImageData(images, batch_size=BATCH_SIZE).test_dataloader()
    return percent_equal(predict(module, batches), images.test_labels)


def _timed_file(job: str, options: argparse.Namespace) -> Path:
    """Write the network that a job has trained for images of 224 pixels."""
    path = OUT / f"headline_{_slug(job)}_{TIMED_PIXELS}.onnx"
    module = _classifier(options, options.learning_rate)
    if job == FLOAT:
        module.load_state_dict(torch.load(_checkpoint(job, options), weights_only=True)["state_dict"])
    else:
        load_compressed_state(module, _checkpoint(job, options))
    small: nn.Module = module if job in (FLOAT, INT8) else shrink(module).model
    export_onnx(small, torch.randn(2, 3, TIMED_PIXELS, TIMED_PIXELS), path)
    return path


def _onnxruntime_times(files: Mapping[str, Path], rounds: int) -> dict[tuple[str, int], float]:
    feeds = {"images": np.random.default_rng(0).normal(size=(1, 3, TIMED_PIXELS, TIMED_PIXELS)).astype(np.float32)}
    found = compare_latency(files, feeds, rounds=rounds, budget_s=600.0)
    return {(row.file, row.batch_size): row.median_ms for row in found.rows}


def _openvino_times(files: Mapping[str, Path], rounds: int) -> dict[tuple[str, int], float]:
    """Return the median of each file and batch size in OpenVINO, in milliseconds; files take turns."""
    import openvino

    core = openvino.Core()
    medians: dict[tuple[str, int], float] = {}
    for batch in (1, 8):
        image = np.random.default_rng(0).normal(size=(batch, 3, TIMED_PIXELS, TIMED_PIXELS)).astype(np.float32)
        requests = {}
        for job, path in files.items():
            model = core.read_model(path)
            model.reshape(list(image.shape))
            # Where the processor has bfloat16, OpenVINO would compute the float file in it.
            hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
            requests[job] = core.compile_model(model, "CPU", hints).create_infer_request()
        seconds: dict[str, list[float]] = {job: [] for job in files}
        for _ in range(rounds + 3):
            for job, request in requests.items():
                started = time.perf_counter()
                request.infer([image])
                seconds[job].append(time.perf_counter() - started)
        medians |= {(job, batch): 1e3 * float(np.median(times[3:])) for job, times in seconds.items()}
    return medians


def _plot(points: Sequence[tuple[str, float, float]], images: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, (job, milliseconds, accuracy) in enumerate(sorted(points, key=lambda point: point[1])):
        is_pruned = job not in (FLOAT, INT8)
        axes.plot(milliseconds, accuracy, "o" if is_pruned else "s", color="C1" if is_pruned else "C0", markersize=8)
        place = (7, 5 if number % 2 else -13)  # neighbours would write over one another
        label = job.replace(" of the MACs", " MACs")
        axes.annotate(label, (milliseconds, accuracy), xytext=place, textcoords="offset points", fontsize=9)
    axes.set(
        xlabel="ONNX Runtime, one image of 224 pixels, ms",
        ylabel="test accuracy of the file, %",
        title=f"ResNet-50 on {images}: the same epochs, one fit each",
        xlim=(0, 1.25 * max(milliseconds for _, milliseconds, _ in points)),
    )
    lowest = min(accuracy for *_, accuracy in points)
    axes.set_ylim(lowest - 1.5, max(accuracy for *_, accuracy in points) + 1.5)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def _checkpoint(job: str, options: argparse.Namespace) -> Path:
    return OUT / f"headline_{_slug(job)}_{options.images}_{options.base_epochs}_{options.epochs}_{options.seed}.ckpt"


def _slug(job: str) -> str:
    return job.replace(" ", "_").replace(",", "")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000, help="training images")
    parser.add_argument("--base-epochs", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--macs", nargs="+", type=float, default=[0.5, 0.35, 0.25])
    parser.add_argument("--scope", default="layer", choices=("global", "layer"))
    parser.add_argument("--base-learning-rate", type=float, default=0.05)
    parser.add_argument("--learning-rate", type=float, default=0.02)
    parser.add_argument("--precision", default="bf16-mixed", help="of all trainings alike")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", help="train these jobs and measure nothing else")
    parser.add_argument("--picture", type=Path, default=Path("docs/headline.png"))
    parser.add_argument("--data", help='folder with the files of Fashion-MNIST, or "digits" to try the script out')
    return parser.parse_args()


if __name__ == "__main__":
    main()
