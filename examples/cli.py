"""Compression from a YAML file, by LightningCLI: callbacks are named and configured as everything else is.

From the project's root::

    python examples/cli.py fit -c examples/recipes/all.yaml
    python examples/cli.py fit -c examples/recipes/prune.yaml --trainer.max_epochs 2
    python examples/cli.py fit -c examples/recipes/quantize.yaml --print_config=comments

The last prints every argument of every callback with what it means. Needs ``pip install "lightning_compress[cli]"``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.cli import LightningCLI

sys.path.insert(0, str(Path(__file__).parents[1]))  # a program in a folder finds only its neighbours

from examples.classifier import ImageClassifier
from examples.epoch_lines import EpochLines
from examples.fashion_mnist import load_images
from examples.image_data import ImageData
from examples.networks import ResNet, teacher
from examples.quiet import quiet_lightning


class SmallImages(ImageData):
    """Fashion-MNIST, or scikit-learn's digits where it is not to be had.

    Args:
        source: Folder with the files of Fashion-MNIST, or ``"digits"``; looked for by default.
        batch_size: Images per batch.
        n_train: Training images; all by default.
        seed: Seed of the order and the augmentation.
    """

    def __init__(
        self, source: str | None = None, batch_size: int = 125, n_train: int | None = None, seed: int = 0
    ) -> None:
        super().__init__(load_images(source), batch_size=batch_size, n_train=n_train, seed=seed)


def trained_teacher(
    checkpoint: str, data: SmallImages, width: int = 32, max_epochs: int = 4, learning_rate: float = 0.1
) -> ResNet:
    """Return a teacher for these images, and train it first where ``checkpoint`` is missing.

    Args:
        checkpoint: File with its weights, read or written.
        data: What to train it on.
        width: Channels of its first stage.
        max_epochs: Epochs over the images.
        learning_rate: Highest learning rate.

    Returns:
        The network with trained weights.
    """
    network = teacher(width)
    if Path(checkpoint).exists():
        network.load_state_dict(torch.load(checkpoint, weights_only=True))
        return network
    trainer = L.Trainer(
        max_epochs=max_epochs,
        callbacks=[EpochLines("teacher")],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(ImageClassifier(network, learning_rate=learning_rate), datamodule=data)
    Path(checkpoint).parent.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), checkpoint)
    return network


def main() -> None:
    """Run what the command line and the YAML file say."""
    quiet_lightning()
    LightningCLI(ImageClassifier, SmallImages, seed_everything_default=0, save_config_kwargs={"overwrite": True})


if __name__ == "__main__":
    main()
