"""Networks of one bit on Fashion-MNIST: a perceptron and a convolutional network as of BinaryNet.

The networks are those of Courbariaux et al. 2016 (arXiv:1602.02830) in small: three hidden layers behind batch norms
and hard tangents, and six convolutions with poolings between. "W1A8" has signs for weights, "W1A1" for the values that
layers read, too; in both, first and last layer as well. Each is trained from scratch by Adam with one cosine decay,
scored on all 10,000 test images in torch and in the exported file in ONNX Runtime.

Run it in pieces with ``--networks``, ``--jobs`` and ``--seeds``: what is in ``benchmarks/out`` is not measured again.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from statistics import mean
from typing import Any

import lightning as L
import torch
from torch import nn

from benchmarks.records import OUT, Records, markdown_table, print_machine
from examples.classifier import ImageClassifier
from examples.epoch_lines import EpochLines
from examples.evaluation import percent_equal, predict, predict_onnx
from examples.fashion_mnist import load_images
from examples.image_data import ImageData, ImageSet
from lightning_compress import OnnxExport, QuantizationAwareTraining, save_compressed

BATCH_SIZE = 125
LEARNING_RATE = 0.003
EPOCHS = {"perceptron": 10, "convolutional": 4}
BITS = {"float": None, "W1A8": (1, 8), "W1A1": (1, 1)}


def perceptron(n_units: int = 512) -> nn.Sequential:
    """Return three hidden layers of ``n_units`` units, for 28 x 28 pixels and 10 classes."""
    layers: list[nn.Module] = [nn.Flatten()]
    for n_inputs in (784, n_units, n_units):
        layers += [nn.Linear(n_inputs, n_units, bias=False), nn.BatchNorm1d(n_units), nn.Hardtanh()]
    return nn.Sequential(*layers, nn.Linear(n_units, 10))


def convolutional(width: int = 16) -> nn.Sequential:
    """Return six convolutions of ``width`` to ``4 * width`` channels and a linear layer, for 28 x 28 pixels."""
    layers: list[nn.Module] = []
    n_inputs = 1
    for n_channels in (width, 2 * width, 4 * width):
        for pool in (nn.Identity(), nn.MaxPool2d(2)):
            layers += [nn.Conv2d(n_inputs, n_channels, 3, padding=1, bias=False), pool]
            layers += [nn.BatchNorm2d(n_channels), nn.Hardtanh()]
            n_inputs = n_channels
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * width * 9, 10))


NETWORKS = {"perceptron": perceptron, "convolutional": convolutional}


class BinaryClassifier(ImageClassifier):
    """A classifier that Adam trains."""

    def configure_optimizers(self) -> Any:
        """Return Adam with a cosine decay to zero, stepped after every batch."""
        optimizer = torch.optim.Adam(self.parameters(), LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    """Measure what is missing and print the table."""
    options = _parse()
    print_machine()
    images = load_images(options.data)
    records = Records("binary_networks")
    rows = [
        records.get(partial(_trained, images, network, job, seed), network=network, job=job, seed=seed)
        for seed in options.seeds
        for network in options.networks
        for job in options.jobs
    ]
    lines = []
    for network in options.networks:
        for job in options.jobs:
            found = [row for row in rows if (row["network"], row["job"]) == (network, job)]
            lines.append(
                {
                    "network": f"{network}, {EPOCHS[network]} epochs",
                    "bits": job,
                    "file in ONNX Runtime, %": " / ".join(f"{row['accuracy']:.2f}" for row in found),
                    "mean, %": f"{mean(row['accuracy'] for row in found):.2f}",
                    "agreement with torch, %": f"{mean(row['agreement'] for row in found):.2f}",
                    "ONNX, kB": f"{mean(row['file_bytes'] for row in found) / 1e3:.1f}",
                    "archive, kB": f"{mean(row['archive_bytes'] for row in found) / 1e3:.1f}",
                    "s": round(mean(row["seconds"] for row in found)),
                }
            )
    print(f"\n{images.name}\n\n{markdown_table(lines)}")


def _trained(images: ImageSet, network: str, job: str, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    classifier = BinaryClassifier(NETWORKS[network](), learning_rate=LEARNING_RATE)
    path = OUT / f"binary_{network}_{job}_seed_{seed}.onnx"
    callbacks: list[L.Callback] = [EpochLines(f"{network}, {job}, seed {seed}"), OnnxExport(path, latency=False)]
    bits = BITS[job]
    if bits is not None:
        weight_bits, activation_bits = bits
        callbacks.append(
            QuantizationAwareTraining(weight_bits=weight_bits, activation_bits=activation_bits, edge_bits=1)
        )
    data = ImageData(images, batch_size=BATCH_SIZE, hold_out=False, seed=seed)
    trainer = L.Trainer(
        max_epochs=EPOCHS[network],
        accelerator="cpu",
        callbacks=callbacks,
        check_val_every_n_epoch=EPOCHS[network],
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=OUT,
    )
    started = time.perf_counter()
    trainer.fit(classifier, datamodule=data)
    seconds = round(time.perf_counter() - started, 1)
    in_torch, in_runtime = predict(classifier, data.test_dataloader()), predict_onnx(path, data.test_dataloader())
    return {
        "accuracy": percent_equal(in_runtime, images.test_labels),
        "accuracy_torch": percent_equal(in_torch, images.test_labels),
        "agreement": percent_equal(in_torch, in_runtime),
        "file_bytes": path.stat().st_size,
        "archive_bytes": save_compressed(classifier, path.with_suffix(".lcz")).file_bytes,
        "seconds": seconds,
    }


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--jobs", nargs="+", choices=BITS, default=list(BITS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--data", help="folder with the files of Fashion-MNIST")
    return parser.parse_args()


if __name__ == "__main__":
    main()
