"""Fashion-MNIST, wherever it can be had: a folder, Debian's package, a download; else scikit-learn's digits."""

from __future__ import annotations

import gzip
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from examples.image_data import ImageSet

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package `dataset-fashion-mnist` puts its files."""

DOWNLOAD_FOLDER = Path("~/.cache/lightning_compress").expanduser()
"""Where torchvision's download goes."""

CONNECTION_TIMEOUT_S = 5.0


def load_images(data: str | Path | None = None) -> ImageSet:
    """Return Fashion-MNIST (60,000 + 10,000 grey images of 28x28, 10 classes; Xiao et al. 2017, arXiv:1708.07747).

    Args:
        data: Folder with the four ``idx`` files, packed (``.gz``) or not; ``"digits"`` for scikit-learn's digits;
            ``None`` looks in Debian's package folder, then tries torchvision's download, then takes the digits and
            prints a line that says so.

    Returns:
        The images.

    Raises:
        FileNotFoundError: If ``data`` is a folder without the four files.
    """
    if data == "digits":
        return load_digits()
    if data is not None:
        return read_fashion_mnist(Path(data))
    for folder in (DEBIAN_FOLDER, DOWNLOAD_FOLDER / "FashionMNIST" / "raw"):
        if _find(folder, "t10k-labels-idx1-ubyte"):
            return read_fashion_mnist(folder)
    folder_or_none = _download(DOWNLOAD_FOLDER)
    if folder_or_none:
        return read_fashion_mnist(folder_or_none)
    print(
        "Fashion-MNIST is neither in Debian's package folder nor to be downloaded: taking scikit-learn's 1,797 digits. "
        "(`apt-get install dataset-fashion-mnist`, or `--data FOLDER`, for the real thing.)"
    )
    return load_digits()


def read_fashion_mnist(folder: Path) -> ImageSet:
    """Read the four ``idx`` files of Fashion-MNIST.

    Args:
        folder: Where they are.

    Returns:
        The images.

    Raises:
        FileNotFoundError: If one of the files is not there.
    """
    return ImageSet(
        name="Fashion-MNIST",
        train_images=_read_idx(folder, "train-images-idx3-ubyte", header_bytes=16).view(-1, 1, 28, 28),
        train_labels=_read_idx(folder, "train-labels-idx1-ubyte", header_bytes=8).long(),
        test_images=_read_idx(folder, "t10k-images-idx3-ubyte", header_bytes=16).view(-1, 1, 28, 28),
        test_labels=_read_idx(folder, "t10k-labels-idx1-ubyte", header_bytes=8).long(),
        mean=(0.2860,),
        std=(0.3530,),
    )


def load_digits() -> ImageSet:
    """Return scikit-learn's handwritten digits (inside its wheel), enlarged from 8x8 to 28x28 pixels.

    Returns:
        1,437 images for training and the last 360, by other writers, for the final figure.

    Example:
        >>> digits = load_digits()
        >>> digits.train_images.shape, len(digits.test_labels), digits.n_classes
        (torch.Size([1437, 1, 28, 28]), 360, 10)
    """
    from sklearn import datasets  # here, because Fashion-MNIST does not need it

    small, labels = datasets.load_digits(return_X_y=True)
    grey = torch.from_numpy(small).float().view(-1, 1, 8, 8) * (255 / 16)
    images = F.interpolate(grey, size=(28, 28), mode="bilinear").round().to(torch.uint8)
    classes = torch.from_numpy(labels).long()
    n_test = 360
    return ImageSet(
        name="scikit-learn's digits",
        train_images=images[:-n_test],
        train_labels=classes[:-n_test],
        test_images=images[-n_test:],
        test_labels=classes[-n_test:],
        mean=(0.3054,),
        std=(0.3238,),
        flip=False,
    )


def _read_idx(folder: Path, stem: str, *, header_bytes: int) -> Tensor:
    path = _find(folder, stem)
    if path is None:
        raise FileNotFoundError(
            f"`{folder}` holds no `{stem}.gz`. Pass a folder with the four files of Fashion-MNIST as `--data`."
        )
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header_bytes).copy())


def _find(folder: Path, stem: str) -> Path | None:
    return next((path for path in (folder / f"{stem}.gz", folder / stem) if path.is_file()), None)


def _download(folder: Path) -> Path | None:
    from torchvision.datasets import FashionMNIST  # here, because importing it takes seconds

    try:
        with _connection_timeout(CONNECTION_TIMEOUT_S):
            return Path(FashionMNIST(str(folder), download=True).raw_folder)
    except (OSError, RuntimeError):  # no network, no such host, a broken file: torchvision wraps some of them
        return None


@contextmanager
def _connection_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
