"""The demo: a teacher, a student in float, and the same student distilled, pruned and quantized into one ONNX file.

Run it from the project's root with ``python -m examples.quickstart``, or with ``make demo``.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch
from torch import nn

from examples.classifier import ImageClassifier
from examples.epoch_lines import EpochLines
from examples.evaluation import percent_equal, predict, predict_onnx
from examples.fashion_mnist import load_images
from examples.image_data import ImageData, ImageSet
from examples.networks import student, teacher
from examples.quiet import quiet_lightning
from lightning_compress import KnowledgeDistillation, MagnitudePruning, OnnxExport, QuantizationAwareTraining
from lightning_compress.report import Metric


@dataclass(frozen=True)
class Size:
    """How much to train: the demo fits into a few minutes of two processors, its test into seconds.

    Args:
        n_train: Training images.
        teacher_epochs: Epochs of the teacher.
        student_epochs: Epochs of the student, in float and compressed alike.
        teacher_width: Channels of the teacher's first stage.
        batch_size: Images per batch.
    """

    n_train: int
    teacher_epochs: int
    student_epochs: int
    teacher_width: int
    batch_size: int


DEMO = Size(n_train=20_000, teacher_epochs=4, student_epochs=6, teacher_width=32, batch_size=125)
FEW_IMAGES = Size(n_train=20_000, teacher_epochs=15, student_epochs=20, teacher_width=32, batch_size=32)
QUICK = Size(n_train=800, teacher_epochs=4, student_epochs=6, teacher_width=16, batch_size=32)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the three networks, print the report and leave model.onnx, report.json and report.png behind."""
    options = _parse(arguments)
    quiet_lightning()
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()

    L.seed_everything(options.seed, verbose=False)
    images = load_images(options.data)
    size = QUICK if options.quick else DEMO if len(images.train_images) > DEMO.n_train else FEW_IMAGES
    epochs = options.epochs or size.student_epochs
    data = ImageData(images, batch_size=size.batch_size, n_train=size.n_train, seed=options.seed)
    labels = images.test_labels
    n_batches = len(data.train_dataloader())
    print(f"{images.name}: {n_batches * data.batch_size:,} images an epoch, {len(labels):,} for the final figure.")

    big = _classifier(teacher(size.teacher_width, n_classes=images.n_classes), images, learning_rate=0.1)
    _trainer("teacher", size.teacher_epochs).fit(big, datamodule=data)

    plain = _classifier(student(8, n_classes=images.n_classes), images)
    _trainer("student, plain float", epochs).fit(plain, datamodule=data)

    # The compressed student is the same LightningModule in the same Trainer: only the callbacks are new.
    small = _classifier(student(8, n_classes=images.n_classes), images)
    export = OnnxExport(options.out / "model.onnx")
    compression = [
        KnowledgeDistillation(big.network, temperature=4.0, weight=0.7),
        MagnitudePruning(sparsity=0.8, start=0.0, end=0.6),
        QuantizationAwareTraining(weight_bits=8, activation_bits=8, start=0.6),
        export,
    ]
    _trainer("student, compressed", epochs, compression).fit(small, datamodule=data)

    accuracy = Metric(
        name="test accuracy, %",
        before=percent_equal(predict(plain, data.test_dataloader()), labels),
        after=percent_equal(predict(small, data.test_dataloader()), labels),
        onnxruntime=percent_equal(predict_onnx(options.out / "model.onnx", data.test_dataloader()), labels),
    )
    assert export.report is not None, "the fit has ended"
    report = dataclasses.replace(export.report, metrics=(*export.report.metrics, accuracy))
    report.write_json(options.out / "report.json")

    teacher_accuracy = percent_equal(predict(big, data.test_dataloader()), labels)
    print(f"\nAccuracy on the {len(labels):,} test images of {images.name}:")
    print(f"  teacher, {_n_parameters(big):,} parameters: {teacher_accuracy} %")
    print(f"  student, {_n_parameters(small):,} parameters, plain float: {accuracy.before} %")
    print(f"  student, distilled, 80 % zeros, int8, the file in ONNX Runtime: {accuracy.onnxruntime} %")
    print(f"Files: {', '.join(str(path) for path in sorted(options.out.iterdir()))}")
    print(f"{time.perf_counter() - started:.0f} s in all.")


def _classifier(network: nn.Module, images: ImageSet, learning_rate: float = 0.2) -> ImageClassifier:
    # Channels last is much the faster layout for small convolutions on a CPU.
    network = network.to(memory_format=torch.channels_last)
    return ImageClassifier(network, n_classes=images.n_classes, learning_rate=learning_rate)


def _trainer(name: str, epochs: int, callbacks: Sequence[L.Callback] = ()) -> L.Trainer:
    return L.Trainer(
        max_epochs=epochs,
        callbacks=[EpochLines(name), *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _n_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help='folder with the files of Fashion-MNIST, or "digits"; looked for by default')
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="folder for what comes out")
    parser.add_argument("--epochs", type=int, help="epochs of the student, in float and compressed alike")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes, for the tests")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
