"""Colour photos by class, from one npz file or from a folder of folders, resized and normalised as for ImageNet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from examples.image_data import ImageSet

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def load_photos(source: str | Path, *, pixels: int = 96, test_share: float = 0.2) -> ImageSet:
    """Read photos and bring them to ``pixels`` x ``pixels``.

    The training images come in an order shuffled once and for all: files and folders are usually sorted by class.

    Args:
        source: An ``.npz`` file with ``xtr`` (n, height, width, 3) uint8, ``ytr`` (n,), ``xte`` and ``yte``; a folder
            with exactly one such file; or a folder with one sub-folder of image files for each class.
        pixels: Edge length of the result.
        test_share: Share of the photos of a folder of folders that is kept for the final figure, in (0, 1).

    Returns:
        The photos.

    Raises:
        FileNotFoundError: If ``source`` holds neither.
    """
    path = Path(source)
    archives = [path] if path.suffix == ".npz" else sorted(path.glob("*.npz"))
    if len(archives) == 1 and archives[0].is_file():
        train_images, train_labels, test_images, test_labels = _read_npz(archives[0], pixels)
    elif path.is_dir() and any(child.is_dir() and not child.name.startswith(".") for child in path.iterdir()):
        images, labels = _read_folders(path, pixels)
        images, labels = _shuffled(images, labels)
        n_test = max(1, round(test_share * len(images)))
        train_images, train_labels = images[n_test:], labels[n_test:]
        test_images, test_labels = images[:n_test], labels[:n_test]
    else:
        raise FileNotFoundError(
            f"`{path}` is neither an .npz file of photos, nor a folder with one, nor a folder with a sub-folder of "
            "image files for each class. Pass one of these as `--data`."
        )
    train_images, train_labels = _shuffled(train_images, train_labels)
    return ImageSet(
        name=f"photos of {path.stem}",
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )


def _read_npz(path: Path, pixels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with np.load(path) as arrays:
        return (
            _resized(torch.from_numpy(arrays["xtr"]).movedim(-1, 1), pixels),
            torch.from_numpy(arrays["ytr"]).long(),
            _resized(torch.from_numpy(arrays["xte"]).movedim(-1, 1), pixels),
            torch.from_numpy(arrays["yte"]).long(),
        )


def _read_folders(path: Path, pixels: int) -> tuple[Tensor, Tensor]:
    from torchvision.datasets import ImageFolder  # here, because an .npz file does not need it

    folder = ImageFolder(str(path))
    images = [torch.from_numpy(np.array(photo)).movedim(-1, 0)[None] for photo, _ in folder]
    return torch.cat([_resized(image, pixels) for image in images]), torch.tensor(folder.targets)


def _resized(images: Tensor, pixels: int) -> Tensor:
    resized = F.interpolate(images.float(), size=(pixels, pixels), mode="bicubic", antialias=True, align_corners=False)
    return resized.round().clamp(0, 255).to(torch.uint8)


def _shuffled(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], labels[order]
