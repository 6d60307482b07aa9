"""ImageNet's MobileNetV2 fine-tuned on photos: in float, and with int8 in the loop, same budget and seeds.

The int8 network's figure is that of its file in ONNX Runtime, on the test photos.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.records import OUT, Records, markdown_table, print_machine
from examples.evaluation import percent_equal, predict, predict_onnx
from examples.fine_tune_mobilenet import fine_tune
from examples.image_data import ImageData, ImageSet
from examples.photos import load_photos
from lightning_compress import OnnxExport, QuantizationAwareTraining


def main() -> None:
    """Measure what is missing and print the table."""
    options = _parse()
    print_machine()
    images = load_photos(options.data, pixels=options.pixels)
    records = Records("mobilenet_photos")
    key = {"images": images.name, "pixels": options.pixels, "epochs": options.epochs, "start": options.start}
    rows: list[dict[str, Any]] = []
    for seed in options.seeds:
        row = records.get(partial(_measure, images, options, seed), seed=seed, **key)
        rows.append(
            {
                "seed": seed,
                "float, %": row["accuracy_float"],
                "int8 file in ONNX Runtime, %": row["accuracy"],
                "difference, points": round(row["accuracy"] - row["accuracy_float"], 2),
                "int8 in torch, %": row["accuracy_torch"],
                "agreement torch / ONNX Runtime, %": row["agreement"],
            }
        )
    last = {"seed": "mean", **{name: round(mean(row[name] for row in rows), 2) for name in rows[0] if name != "seed"}}
    print(f"\n{images.name}, {options.pixels} pixels, {options.epochs} epochs\n\n{markdown_table([*rows, last])}")


def _measure(images: ImageSet, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    data = ImageData(images, batch_size=32, hold_out=False, seed=seed)
    path = OUT / f"mobilenet_photos_seed_{seed}.onnx"
    started = time.perf_counter()
    plain = fine_tune(f"float, seed {seed}", data, options.weights, epochs=options.epochs, seed=seed)
    callbacks = [QuantizationAwareTraining(start=options.start), OnnxExport(path)]
    small = fine_tune(
        f"int8, seed {seed}", data, options.weights, epochs=options.epochs, seed=seed, callbacks=callbacks
    )
    in_torch = predict(small, data.test_dataloader())
    in_runtime = predict_onnx(path, data.test_dataloader())
    return {
        "accuracy_float": percent_equal(predict(plain, data.test_dataloader()), images.test_labels),
        "accuracy_torch": percent_equal(in_torch, images.test_labels),
        "accuracy": percent_equal(in_runtime, images.test_labels),
        "agreement": percent_equal(in_torch, in_runtime),
        "seconds": round(time.perf_counter() - started, 1),
    }


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="an .npz file, or a folder of photos")
    parser.add_argument("--weights", type=Path, help="file with the ImageNet weights; torchvision's own by default")
    parser.add_argument("--pixels", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--start", type=float, default=0.4, help="share of the run at which int8 begins")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    return parser.parse_args()


if __name__ == "__main__":
    main()
