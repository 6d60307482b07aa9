from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.photos import IMAGENET_MEAN, load_photos


def write_npz(path: Path) -> None:
    """Write 10 black photos of class 0 and 10 white ones of class 1, sorted by class, and two for the test."""
    colours = np.repeat(np.array([0, 255], np.uint8), 10)
    photos = np.broadcast_to(colours[:, None, None, None], (20, 8, 8, 3))
    labels = np.repeat(np.array([0, 1], np.uint8), 10)
    np.savez(path, xtr=photos, ytr=labels, xte=photos[9:11], yte=labels[9:11])


@pytest.mark.parametrize("source", ["photos.npz", "."])
def test_photos_of_an_npz_file_are_resized_and_keep_their_classes(tmp_path: Path, source: str) -> None:
    write_npz(tmp_path / "photos.npz")
    photos = load_photos(tmp_path / source, pixels=12)
    assert photos.train_images.shape == (20, 3, 12, 12)
    assert (photos.train_images[:, 0, 0, 0] == 255 * photos.train_labels).all()
    assert photos.test_labels.tolist() == [0, 1]
    assert (photos.n_channels, photos.n_classes, photos.mean) == (3, 2, IMAGENET_MEAN)


def test_photos_sorted_by_class_come_mixed_and_always_in_the_same_order(tmp_path: Path) -> None:
    write_npz(tmp_path / "photos.npz")
    first, second = (load_photos(tmp_path, pixels=8).train_labels.tolist() for _ in range(2))
    assert first == second
    assert first != sorted(first)


def test_photos_of_folders_have_one_class_for_each_folder(tmp_path: Path) -> None:
    for name, grey in (("cats", 10), ("dogs", 200)):
        (tmp_path / name).mkdir()
        for size in range(8, 13):
            Image.new("RGB", (size, 9), (grey, grey, grey)).save(tmp_path / name / f"{size}.png")
    photos = load_photos(tmp_path, pixels=16)
    assert (len(photos.train_images), len(photos.test_images)) == (8, 2)
    assert (photos.train_images[:, 0, 3, 3] == 10 + 190 * photos.train_labels).all()
    assert (photos.test_images[:, 2, 3, 3] == 10 + 190 * photos.test_labels).all()


def test_a_folder_without_photos_is_refused(tmp_path: Path) -> None:
    message = (
        f"`{tmp_path}` is neither an .npz file of photos, nor a folder with one, nor a folder with a sub-folder of "
        "image files for each class. Pass one of these as `--data`."
    )
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(message)}$"):
        load_photos(tmp_path)
