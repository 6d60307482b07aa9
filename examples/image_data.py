"""Image sets that fit into memory, served to Lightning as ready batches without worker processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F

Batch = tuple[Tensor, Tensor]
"""Normalised images (n, channels, height, width) as float32 and their class numbers (n,) as int64."""


@dataclass(frozen=True)
class ImageSet:
    """Labelled images for training and for the final figure.

    Args:
        name: What the images are, for messages.
        train_images: uint8, shape (n, channels, height, width).
        train_labels: int64, shape (n,).
        test_images: uint8, shape (m, channels, height, width).
        test_labels: int64, shape (m,).
        mean: Mean of each channel, on the scale 0..1.
        std: Standard deviation of each channel, on the scale 0..1.
        flip: Whether a mirrored image still belongs to its class (not so for digits).
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool = True

    @property
    def n_channels(self) -> int:
        """1 for grey, 3 for colour."""
        return self.train_images.shape[1]

    @property
    def n_classes(self) -> int:
        """Number of classes; labels run from 0 to one less."""
        return int(self.train_labels.max()) + 1


class ImageData(L.LightningDataModule):
    """Serves an :class:`ImageSet`; the test images are for the final figure only.

    The last ``n_val`` training images are the validation set. They are kept out of the training unless
    ``hold_out=False``, which suits a run that selects nothing on them and wants every training image.

    Args:
        images: The images.
        batch_size: Images per batch; in training a smaller rest is left out.
        n_train: Use only the first ``n_train`` of the images that are left for training; ``None`` for all.
        n_val: Number of validation images, at most a tenth of the training images.
        hold_out: Whether to keep the validation images out of the training.
        seed: Seed of the order and the augmentation.
    """

    def __init__(
        self,
        images: ImageSet,
        *,
        batch_size: int = 125,
        n_train: int | None = None,
        n_val: int = 5_000,
        hold_out: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.images = images
        self.batch_size = batch_size
        self.seed = seed
        n_images = len(images.train_images)
        self._first_val = n_images - min(n_val, n_images // 10)
        self._n_train = min(n_train or n_images, self._first_val if hold_out else n_images)

    def train_dataloader(self) -> TensorBatches:
        """Shuffled, augmented batches of the training images."""
        images, n = self.images, self._n_train
        return TensorBatches(images, images.train_images[:n], images.train_labels[:n], self.batch_size, self.seed)

    def val_dataloader(self) -> TensorBatches:
        """The validation images, in order."""
        images, first = self.images, self._first_val
        return TensorBatches(images, images.train_images[first:], images.train_labels[first:], self.batch_size)

    def test_dataloader(self) -> TensorBatches:
        """The test images, in order."""
        images = self.images
        return TensorBatches(images, images.test_images, images.test_labels, self.batch_size)


class TensorBatches:
    """Ready batches cut from tensors in memory.

    With a seed the batches are shuffled and augmented, both a function of seed and epoch alone. Lightning tells the
    epoch through ``sampler.set_epoch`` and keeps ``state_dict`` in its checkpoints, so a run that was stopped in the
    middle of an epoch goes on with the very batch that would have come next.

    Args:
        image_set: Where mean, standard deviation and the permission to flip are read.
        images: uint8, shape (n, channels, height, width).
        labels: int64, shape (n,).
        batch_size: Images per batch.
        seed: Seed of the order and the augmentation; ``None`` serves all images in order and as they are.
    """

    batch_sampler = None  # Lightning asks every loader that has a sampler for this one too

    def __init__(
        self, image_set: ImageSet, images: Tensor, labels: Tensor, batch_size: int, seed: int | None = None
    ) -> None:
        self.images = images
        self.labels = labels
        self.batch_size = batch_size
        self.seed = seed
        self._mean = 255.0 * torch.tensor(image_set.mean).view(-1, 1, 1)
        self._std = 255.0 * torch.tensor(image_set.std).view(-1, 1, 1)
        self._flip = image_set.flip
        self._epoch = 0
        self._n_served = 0
        self._n_to_skip = 0

    @property
    def sampler(self) -> TensorBatches:
        """The object that Lightning tells the epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the augmentation of the epoch that begins next."""
        self._epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the epoch."""
        return {"n_served": self._n_served}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Begin the next epoch where ``state_dict`` was taken; after a finished epoch that is its first batch."""
        self._n_to_skip = state_dict["n_served"] % len(self)

    def __len__(self) -> int:
        full, rest = divmod(len(self.images), self.batch_size)
        return full if self.seed is not None or rest == 0 else full + 1

    def __iter__(self) -> Iterator[Batch]:
        n_to_skip, self._n_to_skip = self._n_to_skip, 0
        order = torch.arange(len(self.images))
        if self.seed is not None:
            order = torch.randperm(len(self.images), generator=self._generator(batch=-1))
        for batch in range(n_to_skip, len(self)):
            self._n_served = batch + 1
            yield self._batch(order[batch * self.batch_size : (batch + 1) * self.batch_size], batch)

    def _batch(self, indices: Tensor, batch: int) -> Batch:
        images = self.images[indices]
        if self.seed is not None:
            images = shift_and_flip(images, self._generator(batch), flip=self._flip)
        return (images.float() - self._mean) / self._std, self.labels[indices]

    def _generator(self, batch: int) -> torch.Generator:
        # One generator for each batch: what a batch looks like must not depend on the batches served before it.
        assert self.seed is not None
        return torch.Generator().manual_seed((self.seed * 10_007 + self._epoch) * 1_000_003 + batch + 1)


def shift_and_flip(images: Tensor, generator: torch.Generator, *, max_shift: int = 2, flip: bool = True) -> Tensor:
    """Shift each image by up to ``max_shift`` pixels each way and mirror every second one, at random.

    Args:
        images: Shape (n, channels, height, width).
        generator: Source of the random numbers.
        max_shift: Largest shift in pixels, horizontally and vertically; what is uncovered becomes 0.
        flip: Whether to mirror at all.

    Returns:
        Images of the same shape and type.

    Example:
        >>> image = torch.tensor([[[[1, 2, 3]]]])
        >>> [shift_and_flip(image, torch.Generator().manual_seed(s), max_shift=0).flatten().tolist() for s in (1, 2)]
        [[3, 2, 1], [1, 2, 3]]
    """
    n, _, height, width = images.shape
    down, right = torch.randint(0, 2 * max_shift + 1, (2, n, 1), generator=generator)
    mirrored = flip & (torch.rand(n, 1, generator=generator) < 0.5)
    columns = torch.arange(width)
    columns = torch.where(mirrored, columns.flip(0), columns) + right
    rows = torch.arange(height) + down
    padded = F.pad(images, (max_shift, max_shift, max_shift, max_shift))
    sample = torch.arange(n)[:, None, None]
    return padded[sample, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)
