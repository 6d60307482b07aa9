"""Deep Compression of the paper's networks on Fashion-MNIST: size, accuracy and the bound, and the speed of the coders.

`examples.deep_compression` for every network and seed, all 60,000 training images, scored on all 10,000 test images by
a fresh network with the weights of the file. With `--speed` weights of 25 million parameters, pruned to a tenth and
sharing 16 values, are written and read on one thread.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.records import OUT, Records, markdown_table, print_machine
from examples.deep_compression import RECIPES, compress
from examples.fashion_mnist import load_images
from examples.image_data import ImageSet
from lightning_compress import load_compressed, save_compressed
from lightning_compress.storage import Coder

CODERS: dict[str, tuple[Coder, ...]] = {"Huffman": ("fixed", "huffman"), "ANS": ("fixed", "huffman", "ans")}


def main() -> None:
    """Measure what is missing and print the tables."""
    options = _parse()
    print_machine()
    if options.speed:
        _speed()
        return
    images = load_images(options.data)
    records = Records("deep_compression")
    table = []
    for network in options.networks:
        key = {"network": network, "images": images.name, "epochs": options.epochs}
        rows = [
            records.get(partial(_measure, network, images, options.epochs, seed), seed=seed, **key)
            for seed in options.seeds
        ]
        table.append(
            {
                "network": network,
                "dense, %": " / ".join(f"{row['dense']:.2f}" for row in rows),
                "from the file, %": " / ".join(f"{row['compressed']:.2f}" for row in rows),
                "difference": f"{mean(row['compressed'] - row['dense'] for row in rows):+.2f}",
                **{
                    f"{coder}: times smaller": " / ".join(f"{row['dense_bytes'] / row[coder]:.1f}" for row in rows)
                    for coder in CODERS
                },
                **{
                    f"{coder}: above the bound, %": f"{mean(100 * (row[coder] / row['bound'] - 1) for row in rows):.2f}"
                    for coder in CODERS
                },
            }
        )
    print(f"\n{images.name}, {options.epochs} epochs, seeds {options.seeds}\n\n{markdown_table(table)}")


def _measure(network: str, images: ImageSet, epochs: int, seed: int) -> dict[str, Any]:
    path = OUT / f"deep_compression_{network}_{seed}.lcz"
    found = compress(network, images, path, epochs, seed)
    weights = load_compressed(path)
    sizes = {coder: save_compressed(weights, path, coders=coders).file_bytes for coder, coders in CODERS.items()}
    print(found.size.to_text())
    return {
        "dense": found.dense,
        "compressed": found.compressed,
        "dense_bytes": found.size.dense_bytes,
        "bound": found.size.bound_bytes,
        **sizes,
    }


def _speed() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(16, generator=generator)
    weights = {}
    for number in range(25):
        shape = (1000, 1000)
        kept = torch.rand(shape, generator=generator) < 0.1
        weights[f"layer{number}"] = values[torch.randint(16, shape, generator=generator)] * kept
    table = []
    with tempfile.TemporaryDirectory() as folder:
        for name, coders in CODERS.items():
            path, started = Path(folder) / "weights.lcz", time.perf_counter()
            size = save_compressed(weights, path, coders=coders)
            written, started = time.perf_counter() - started, time.perf_counter()
            load_compressed(path)
            read = time.perf_counter() - started
            table.append(
                {
                    "coder": name,
                    "written and checked, s": f"{written:.2f}",
                    "read, s": f"{read:.2f}",
                    "times smaller": f"{size.ratio:.1f}",
                    "above the bound, %": f"{100 * (size.file_bytes / size.bound_bytes - 1):.2f}",
                }
            )
    print(f"\n25 million parameters in 25 tensors, one thread\n\n{markdown_table(table)}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--speed", action="store_true", help="write and read 25 million parameters, and nothing else")
    parser.add_argument("--data", help='folder with the files of Fashion-MNIST, or "digits" to try the script out')
    return parser.parse_args()


if __name__ == "__main__":
    main()
