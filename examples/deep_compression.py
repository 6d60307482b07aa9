"""Deep Compression in one fit: prune, share the weights that are left, code them, and read them back.

The pipeline of Han, Mao & Dally 2016 (arXiv:1510.00149) on the paper's networks, on Fashion-MNIST: a dense network is
trained, then the same network from scratch for as many epochs with three callbacks. Run it from the project's root with
``python -m examples.deep_compression --network lenet-5``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning as L
from torch import nn

from examples.classifier import ImageClassifier
from examples.epoch_lines import EpochLines
from examples.evaluation import percent_equal, predict
from examples.fashion_mnist import load_images
from examples.image_data import ImageData, ImageSet
from examples.networks import lenet_5, lenet_300_100
from examples.quiet import quiet_lightning
from lightning_compress import (
    Archive,
    ArchiveSize,
    KnowledgeDistillation,
    MagnitudePruning,
    WeightClustering,
    load_compressed,
)
from lightning_compress.storage import Coder


@dataclass(frozen=True)
class Recipe:
    """How a network is compressed.

    Args:
        make: Makes the network for so many classes and pixels.
        sparsity: Share of the weights that are pruned.
        n_clusters: Values that the weights of a layer share.
        overrides: Other numbers of values, by layer.
        learning_rate: Highest learning rate of the cycle.
    """

    make: Callable[[int, int], nn.Module]
    sparsity: float
    n_clusters: int
    overrides: dict[str, int]
    learning_rate: float


RECIPES = {
    "lenet-300-100": Recipe(lambda n, pixels: lenet_300_100(n, pixels**2), 0.915, 16, {}, 0.05),
    "lenet-5": Recipe(lenet_5, 0.93, 16, {"network.0": 32}, 0.02),
}


@dataclass(frozen=True)
class Outcome:
    """What came out.

    Attributes:
        dense: Accuracy of the dense network on the test images, in percent.
        compressed: Accuracy of a fresh network with the weights of the file.
        size: What the file takes, stage by stage.
    """

    dense: float
    compressed: float
    size: ArchiveSize


def main(arguments: Sequence[str] | None = None) -> None:
    """Train both networks, print the stages and leave ``NETWORK.lcz`` behind."""
    options = _parse(arguments)
    quiet_lightning()
    images = load_images(options.data)
    path = options.out / f"{options.network}.lcz"
    found = compress(options.network, images, path, options.epochs, options.seed, options.coders, options.batch_size)
    print(f"\nDense: {found.dense} % of the test images. Read back from {path}: {found.compressed} %.")


def compress(
    name: str,
    images: ImageSet,
    path: Path,
    epochs: int,
    seed: int = 0,
    coders: Sequence[Coder] = ("fixed", "huffman"),
    batch_size: int = 125,
) -> Outcome:
    """Train a network dense and compressed, with the same epochs, and score what is read back from the file.

    Args:
        name: One of `RECIPES`.
        images: The images.
        path: The file.
        epochs: Epochs of each training.
        seed: Seed of weights, order and augmentation.
        coders: What the file is coded with.
        batch_size: Images per batch.

    Returns:
        Accuracies and sizes.
    """
    recipe, pixels = RECIPES[name], images.train_images.shape[-1]

    def fit(label: str, callbacks: Sequence[L.Callback] = ()) -> ImageClassifier:
        L.seed_everything(seed, verbose=False)
        network = recipe.make(images.n_classes, pixels)
        classifier = ImageClassifier(network, n_classes=images.n_classes, learning_rate=recipe.learning_rate)
        trainer = L.Trainer(
            max_epochs=epochs,
            callbacks=[EpochLines(f"{name}, {label}"), *callbacks],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            check_val_every_n_epoch=epochs,
            num_sanity_val_steps=0,
        )
        trainer.fit(classifier, datamodule=data)
        return classifier

    data = ImageData(images, batch_size=batch_size, hold_out=False, seed=seed)
    dense = fit("dense")
    archive = Archive(path, coders=coders)
    compression = [
        KnowledgeDistillation(dense.network, temperature=4.0, weight=0.7),
        MagnitudePruning(recipe.sparsity, start=0.1, end=0.6),
        WeightClustering(recipe.n_clusters, start=0.7, overrides=recipe.overrides),
        archive,
    ]
    fit("compressed", compression)
    fresh = ImageClassifier(recipe.make(images.n_classes, pixels), n_classes=images.n_classes)
    load_compressed(path, fresh)
    assert archive.size is not None, "the fit has ended"
    scores = [percent_equal(predict(one, data.test_dataloader()), images.test_labels) for one in (dense, fresh)]
    return Outcome(scores[0], scores[1], archive.size)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=list(RECIPES), default="lenet-300-100")
    parser.add_argument("--data", help='folder with the files of Fashion-MNIST, or "digits"; looked for by default')
    parser.add_argument("--out", type=Path, default=Path("deep_compression_output"), help="folder for what comes out")
    parser.add_argument("--epochs", type=int, default=20, help="of each training")
    parser.add_argument("--batch-size", type=int, default=125)
    parser.add_argument("--coders", nargs="+", default=["fixed", "huffman"], help='to try; "ans" needs an extra')
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
