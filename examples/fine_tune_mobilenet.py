"""Fine-tuning torchvision's ImageNet MobileNetV2 on photos, in float and with int8 in the loop, and exporting it.

Run it from the project's root with ``python -m examples.fine_tune_mobilenet``; ``--data`` takes any folder with one
sub-folder of image files for each class.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
import torchvision
from torch import nn

from examples.classifier import ImageClassifier
from examples.epoch_lines import EpochLines
from examples.evaluation import percent_equal, predict, predict_onnx
from examples.image_data import ImageData
from examples.photos import load_photos
from examples.quiet import quiet_lightning
from lightning_compress import MagnitudePruning, OnnxExport, QuantizationAwareTraining


def main(arguments: Sequence[str] | None = None) -> None:
    """Fine-tune twice with the same budget, print both accuracies and leave model.onnx behind."""
    options = _parse(arguments)
    quiet_lightning()
    options.out.mkdir(parents=True, exist_ok=True)
    images = load_photos(options.data, pixels=options.pixels)
    data = ImageData(images, batch_size=32, hold_out=False, seed=options.seed)
    labels = images.test_labels
    print(f"{images.name}: {len(images.train_images):,} for training, {len(labels):,} for the final figure.")

    plain = fine_tune("float", data, options.weights, epochs=options.epochs, seed=options.seed)

    path = options.out / "model.onnx"
    export = OnnxExport(path)
    compression: list[L.Callback] = [QuantizationAwareTraining(start=0.4), export]
    if options.sparsity:
        compression.insert(0, MagnitudePruning(sparsity=options.sparsity, end=0.4))
    small = fine_tune("int8", data, options.weights, epochs=options.epochs, seed=options.seed, callbacks=compression)

    print(f"Float: {percent_equal(predict(plain, data.test_dataloader()), labels)} % of the test photos.")
    print(f"Compressed, in torch: {percent_equal(predict(small, data.test_dataloader()), labels)} %.")
    in_runtime = percent_equal(predict_onnx(path, data.test_dataloader()), labels)
    print(f"Compressed, {path} in ONNX Runtime: {in_runtime} %.")


def fine_tune(
    name: str,
    data: ImageData,
    weights: Path | None = None,
    *,
    network: nn.Module | None = None,
    epochs: int = 3,
    seed: int = 0,
    callbacks: Sequence[L.Callback] = (),
) -> ImageClassifier:
    """Fine-tune MobileNetV2 with AdamW and return it.

    Args:
        name: What to print in front of every epoch.
        data: The photos.
        weights: File with torchvision's ImageNet weights; ``None`` lets torchvision find or download them.
        network: What to go on from instead of the ImageNet weights.
        epochs: Epochs to train.
        seed: Seed of the new classifier's weights and of dropout.
        callbacks: What to add to the training.

    Returns:
        The trained classifier.
    """
    L.seed_everything(seed, verbose=False)
    if network is None:
        network = mobilenet_v2(data.images.n_classes, weights)
    classifier = ImageClassifier(
        network.to(memory_format=torch.channels_last),
        n_classes=data.images.n_classes,
        learning_rate=5e-4,
        weight_decay=1e-2,
        optimizer="adamw",
    )
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=[EpochLines(name), *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(classifier, datamodule=data)
    return classifier


def mobilenet_v2(n_classes: int, weights: Path | None = None) -> nn.Module:
    """Return torchvision's ImageNet MobileNetV2 with a new classifier of ``n_classes`` logits.

    Args:
        n_classes: Number of logits.
        weights: File with torchvision's ImageNet weights; ``None`` lets torchvision find or download them.

    Returns:
        The network.
    """
    network = torchvision.models.mobilenet_v2(weights=None if weights else "IMAGENET1K_V1")
    if weights:
        network.load_state_dict(torch.load(weights, weights_only=True))
    network.classifier[1] = nn.Linear(network.last_channel, n_classes)
    return network  # type: ignore[no-any-return]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="an .npz file, or a folder of photos")
    parser.add_argument("--weights", type=Path, help="file with the ImageNet weights; torchvision's own by default")
    parser.add_argument("--out", type=Path, default=Path("mobilenet_output"), help="folder for what comes out")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--pixels", type=int, default=96)
    parser.add_argument("--sparsity", type=float, default=0.0, help="share of weights to prune as well, in [0, 1]")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
