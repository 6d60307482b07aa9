"""The training that the Fashion-MNIST benchmarks share."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import lightning as L
import torch
from torch import nn

from benchmarks.records import OUT
from examples.classifier import ImageClassifier
from examples.epoch_lines import EpochLines
from examples.image_data import ImageData, ImageSet


@dataclass(frozen=True)
class Budget:
    """How long and how hard to train.

    Args:
        epochs: Epochs over all training images.
        learning_rate: Highest learning rate of the cycle.
        weight_decay: Weight decay.
    """

    epochs: int
    learning_rate: float
    weight_decay: float


def train(
    name: str,
    network: nn.Module,
    images: ImageSet,
    budget: Budget,
    *,
    seed: int,
    callbacks: Sequence[L.Callback] = (),
) -> tuple[ImageClassifier, float]:
    """Train on every training image and select nothing: the weights of the last step are what counts.

    Args:
        name: What to print in front of every epoch.
        network: Maps images to logits.
        images: The images.
        budget: How long and how hard to train.
        seed: Seed of order, augmentation and everything random in the training.
        callbacks: What to add to the training.

    Returns:
        The trained classifier and the seconds it took.
    """
    torch.manual_seed(seed)
    data = ImageData(images, hold_out=False, seed=seed)
    classifier = ImageClassifier(
        network.to(memory_format=torch.channels_last),
        n_classes=images.n_classes,
        learning_rate=budget.learning_rate,
        weight_decay=budget.weight_decay,
    )
    trainer = L.Trainer(
        max_epochs=budget.epochs,
        accelerator="cpu",
        callbacks=[EpochLines(name), *callbacks],
        # Validation images are among the training images here: they serve the export's proof, not a choice.
        check_val_every_n_epoch=budget.epochs,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=OUT,
    )
    started = time.perf_counter()
    trainer.fit(classifier, datamodule=data)
    return classifier, round(time.perf_counter() - started, 1)
