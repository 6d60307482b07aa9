"""What each layer of a fine-tuned MobileNetV2 costs when it alone loses channels or bits, as a table and a picture.

The network that `benchmarks.mobilenet_channels` begins from, with its own validation images, which are among the
training images: nothing is trained here, and nothing is chosen on the test images.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks.mobilenet_channels import base, checkpoint
from benchmarks.records import Records, print_machine
from examples.classifier import ImageClassifier
from examples.fine_tune_mobilenet import mobilenet_v2
from examples.image_data import ImageData
from examples.photos import load_photos
from lightning_compress import sensitivity


def main() -> None:
    """Scan, print the table and draw the picture."""
    options = _parse()
    print_machine()
    images = load_photos(options.data, pixels=options.pixels)
    key = {"images": images.name, "pixels": options.pixels, "epochs": options.base_epochs}
    Records("layer_sensitivity").get(partial(base, images, options, options.seed), seed=options.seed, **key)
    network = mobilenet_v2(images.n_classes, options.weights)
    network.load_state_dict(torch.load(checkpoint(options.seed), weights_only=True))
    module = ImageClassifier(network, n_classes=images.n_classes)
    data = ImageData(images, batch_size=80, hold_out=False)
    started = time.perf_counter()
    report = sensitivity(module, data, options.metric, higher_is_better="loss" not in options.metric)
    print(f"\n{len(report.rows)} trials in {time.perf_counter() - started:.0f} s\n\n{report.to_text()}\n")
    print(f"budget for channels: {report.channel_budget(options.max_drop)}")
    print(f"bits of weights: {report.weight_bits(options.max_drop)}")
    report.plot(options.picture)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="an .npz file, or a folder of photos")
    parser.add_argument("--weights", type=Path, help="file with the ImageNet weights; torchvision's own by default")
    parser.add_argument("--pixels", type=int, default=96)
    parser.add_argument("--base-epochs", type=int, default=3)
    parser.add_argument("--metric", default="val_accuracy", help="that the validation step logs")
    parser.add_argument("--max-drop", type=float, default=0.02, help="what one layer alone may cost in the metric")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("docs/sensitivity.png"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
