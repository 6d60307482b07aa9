"""Fashion-MNIST, all 60,000 + 10,000 images: a ResNet-20 in float against one fit with all four callbacks.

The float network and the compressed one see the same images in the same order for the same number of epochs and are
scored after the last step; one teacher serves all seeds. The compressed network's figure is that of its int8 file in
ONNX Runtime. Run it in pieces with ``--parts`` and ``--seeds``: what is in ``benchmarks/out`` is not measured again.
"""

from __future__ import annotations

import argparse
from functools import partial
from statistics import mean
from typing import Any

import torch

from benchmarks.records import OUT, Records, markdown_table, print_machine
from benchmarks.training import Budget, train
from examples.evaluation import percent_equal, predict, predict_onnx
from examples.fashion_mnist import load_images
from examples.image_data import ImageData, ImageSet
from examples.networks import ResNet, student, teacher
from lightning_compress import KnowledgeDistillation, MagnitudePruning, OnnxExport, QuantizationAwareTraining
from lightning_compress.selection import weight_layers


def main() -> None:
    """Measure what is missing and print the table."""
    options = _parse()
    print_machine()
    images = load_images(options.data)
    records = Records("fashion_mnist")
    budget = Budget(options.epochs, learning_rate=0.2, weight_decay=5e-4)
    teacher_budget = Budget(options.teacher_epochs, learning_rate=0.1, weight_decay=5e-4)
    key = {"images": images.name, "epochs": options.epochs}
    if "teacher" in options.parts:
        records.get(
            partial(_teacher, images, teacher_budget), part="teacher", images=images.name, epochs=teacher_budget.epochs
        )
    for seed in options.seeds:
        if "baseline" in options.parts:
            records.get(partial(_baseline, images, budget, seed), part="baseline", seed=seed, **key)
        if "compressed" in options.parts:
            compressed = partial(_compressed, images, budget, teacher_budget, seed)
            records.get(compressed, part="compressed", seed=seed, teacher_epochs=teacher_budget.epochs, **key)
    _print_table(records, images.name, options.epochs, teacher_budget.epochs)


def _teacher(images: ImageSet, budget: Budget) -> dict[str, Any]:
    torch.manual_seed(0)
    network = teacher()
    _, seconds = train("teacher", network, images, budget, seed=0)
    torch.save(network.state_dict(), _teacher_path(images, budget))
    return {"parameters": _n_parameters(network), "accuracy": _accuracy(network, images), "seconds": seconds}


def _baseline(images: ImageSet, budget: Budget, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    network = student(20)
    _, seconds = train(f"float, seed {seed}", network, images, budget, seed=seed)
    return {"parameters": _n_parameters(network), "accuracy": _accuracy(network, images), "seconds": seconds}


def _compressed(images: ImageSet, budget: Budget, teacher_budget: Budget, seed: int) -> dict[str, Any]:
    big = teacher()
    big.load_state_dict(torch.load(_teacher_path(images, teacher_budget), weights_only=True))
    torch.manual_seed(seed)
    path = OUT / f"fashion_mnist_{budget.epochs}_epochs_seed_{seed}.onnx"
    callbacks = [
        KnowledgeDistillation(big.to(memory_format=torch.channels_last), temperature=4.0, weight=0.7),
        MagnitudePruning(sparsity=0.8, start=0.0, end=0.6),
        QuantizationAwareTraining(weight_bits=8, activation_bits=8, start=0.6),
        OnnxExport(path),
    ]
    network = student(20)
    classifier, seconds = train(f"compressed, seed {seed}", network, images, budget, seed=seed, callbacks=callbacks)
    data = ImageData(images)
    in_torch = predict(classifier, data.test_dataloader())
    in_runtime = predict_onnx(path, data.test_dataloader())
    weights = [layer.get_parameter("weight") for layer in weight_layers(network).values()]
    n_zeros = sum(int((weight == 0).sum()) for weight in weights)
    return {
        "accuracy_torch": percent_equal(in_torch, images.test_labels),
        "accuracy": percent_equal(in_runtime, images.test_labels),
        "agreement": percent_equal(in_torch, in_runtime),
        "sparsity": n_zeros / sum(weight.numel() for weight in weights),
        "file_bytes": path.stat().st_size,
        "seconds": seconds,
    }


def _print_table(records: Records, images: str, epochs: int, teacher_epochs: int) -> None:
    big = records.find(part="teacher", images=images, epochs=teacher_epochs)
    if big:
        print(f"\nTeacher: {big['parameters']:,} parameters, {teacher_epochs} epochs, {big['accuracy']} %.")
    rows: list[dict[str, Any]] = []
    for seed in sorted({row["seed"] for row in records.rows if row["part"] == "compressed"}):
        plain = records.find(part="baseline", seed=seed, images=images, epochs=epochs)
        small = records.find(part="compressed", seed=seed, images=images, epochs=epochs, teacher_epochs=teacher_epochs)
        if plain and small:
            rows.append(
                {
                    "seed": seed,
                    "float, %": plain["accuracy"],
                    "int8 file in ONNX Runtime, %": small["accuracy"],
                    "difference, points": round(small["accuracy"] - plain["accuracy"], 2),
                    "in torch, %": small["accuracy_torch"],
                    "agreement torch / ONNX Runtime, %": small["agreement"],
                    "sparsity, %": round(100 * small["sparsity"], 2),
                    "training, s (float / compressed)": f"{plain['seconds']:.0f} / {small['seconds']:.0f}",
                }
            )
    if not rows:
        print("The table needs a baseline and a compressed run of the same seed.")
        return
    numbers = [name for name in rows[0] if name not in ("seed", "training, s (float / compressed)")]
    last = {"seed": "mean", **{name: round(mean(row[name] for row in rows), 2) for name in numbers}}
    print(f"\n{images}, {epochs} epochs\n\n{markdown_table([*rows, {**dict.fromkeys(rows[0], ''), **last}])}")


def _accuracy(network: ResNet, images: ImageSet) -> float:
    return percent_equal(predict(network, ImageData(images).test_dataloader()), images.test_labels)


def _n_parameters(network: ResNet) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _teacher_path(images: ImageSet, budget: Budget) -> Any:
    return OUT / f"{images.name.replace(' ', '_')}_teacher_{budget.epochs}_epochs.pt"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["teacher", "baseline", "compressed"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=6, help="of the student, in float and compressed alike")
    parser.add_argument("--teacher-epochs", type=int, default=6)
    parser.add_argument("--data", help='folder with the files of Fashion-MNIST, or "digits" to try the script out')
    return parser.parse_args()


if __name__ == "__main__":
    main()
