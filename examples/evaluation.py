"""Predictions of a trained network and of its exported file, over the same batches."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor, nn

from examples.image_data import Batch


def predict(model: nn.Module, batches: Iterable[Batch]) -> Tensor:
    """Return the class that ``model`` finds most likely for each image, shape (n,); its train mode is kept."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        classes = torch.cat([model(images).argmax(1) for images, _ in batches])
    model.train(was_training)
    return classes


def predict_onnx(path: str | Path, batches: Iterable[Batch]) -> Tensor:
    """Return the class that the file's first output finds most likely for each image in ONNX Runtime, shape (n,)."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    logits = [session.run(None, {name: images.contiguous().numpy()})[0] for images, _ in batches]
    return torch.cat([torch.from_numpy(array).argmax(1) for array in logits])


def percent_equal(classes: Tensor, others: Tensor) -> float:
    """Return how many of two lists of classes are the same, in percent.

    Example:
        >>> percent_equal(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 0]))
        75.0
    """
    return round(100.0 * (classes == others).double().mean().item(), 2)
