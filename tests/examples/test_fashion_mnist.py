from __future__ import annotations

import gzip
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from examples import fashion_mnist
from examples.fashion_mnist import DEBIAN_FOLDER, load_digits, load_images

needs_fashion_mnist = pytest.mark.skipif(
    not DEBIAN_FOLDER.is_dir(), reason="Fashion-MNIST is not installed (`apt-get install dataset-fashion-mnist`)"
)


def write_idx(folder: Path, *, packed: bool) -> None:
    """Write three training and two test images: image i is full of the value i and has the class i."""
    for split, n in (("train", 3), ("t10k", 2)):
        images = np.repeat(np.arange(n, dtype=np.uint8), 28 * 28)
        for stem, content in (
            (f"{split}-images-idx3-ubyte", bytes(16) + images.tobytes()),
            (f"{split}-labels-idx1-ubyte", bytes(8) + bytes(range(n))),
        ):
            name, data = (f"{stem}.gz", gzip.compress(content)) if packed else (stem, content)
            (folder / name).write_bytes(data)


@pytest.mark.parametrize("packed", [True, False])
def test_a_given_folder_is_read(tmp_path: Path, packed: bool) -> None:
    write_idx(tmp_path, packed=packed)
    images = load_images(tmp_path)
    assert images.name == "Fashion-MNIST"
    assert images.train_images.shape == (3, 1, 28, 28)
    assert images.train_images[:, 0, 5, 7].tolist() == images.train_labels.tolist() == [0, 1, 2]
    assert images.test_labels.tolist() == [0, 1]


def test_a_folder_without_the_files_is_refused(tmp_path: Path) -> None:
    message = (
        f"`{tmp_path}` holds no `train-images-idx3-ubyte.gz`. "
        "Pass a folder with the four files of Fashion-MNIST as `--data`."
    )
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(message)}$"):
        load_images(tmp_path)


def test_the_digits_fill_their_range_and_are_never_mirrored() -> None:
    digits = load_digits()
    assert digits.train_images.dtype == torch.uint8
    assert int(digits.train_images.max()) == 255
    assert not digits.flip
    assert digits.test_labels.bincount().tolist() == [35, 36, 35, 37, 37, 37, 37, 36, 33, 37]


def test_the_digits_are_normalised() -> None:
    digits = load_digits()
    scaled = digits.train_images.double() / 255
    assert float(scaled.mean()) == pytest.approx(digits.mean[0], abs=1e-4)
    assert float(scaled.std()) == pytest.approx(digits.std[0], abs=1e-4)


def test_where_nothing_can_be_had_the_digits_are_taken_and_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # An address on which nobody listens stands for a machine without a network.
    monkeypatch.setattr("torchvision.datasets.FashionMNIST.mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "debian")
    monkeypatch.setattr(fashion_mnist, "DOWNLOAD_FOLDER", tmp_path / "download")
    assert load_images().name == "scikit-learn's digits"
    assert capsys.readouterr().out == (
        "Fashion-MNIST is neither in Debian's package folder nor to be downloaded: taking scikit-learn's 1,797 digits. "
        "(`apt-get install dataset-fashion-mnist`, or `--data FOLDER`, for the real thing.)\n"
    )


def test_what_was_downloaded_before_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    write_idx(raw, packed=False)
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "debian")
    monkeypatch.setattr(fashion_mnist, "DOWNLOAD_FOLDER", tmp_path)
    assert len(load_images().train_images) == 3


@needs_fashion_mnist
def test_debians_files_are_the_whole_of_fashion_mnist() -> None:
    images = load_images()
    assert images.train_images.shape == (60_000, 1, 28, 28)
    assert images.train_labels.bincount().tolist() == [6_000] * 10
    assert images.test_labels.bincount().tolist() == [1_000] * 10
    scaled = images.train_images.double() / 255
    assert float(scaled.mean()) == pytest.approx(images.mean[0], abs=1e-4)
    assert float(scaled.std()) == pytest.approx(images.std[0], abs=1e-4)


@needs_fashion_mnist
def test_a_copy_of_debians_folder_reads_the_same(tmp_path: Path) -> None:
    shutil.copytree(DEBIAN_FOLDER, tmp_path / "copy")
    assert torch.equal(load_images(tmp_path / "copy").test_images, load_images().test_images)
