"""Correlation of predictions: a student that ranks classes and samples as its teacher does."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from lightning_compress.distillation.annealing import Annealing
from lightning_compress.distillation.logits import check_logits
from lightning_compress.distillation.loss import DistillationLoss, check_number, number, precise, rows_of


@dataclass(frozen=True, kw_only=True)
class CorrelationDistillation(DistillationLoss):
    """DIST (Huang et al. 2022, arXiv:2205.10536, equation 10): for teachers that are much stronger than the student.

    Args:
        temperature: Softness of the distributions, above 0.
        between_classes: Weight ``beta`` of the correlation over the classes of each sample, at least 0.
        between_samples: Weight ``gamma`` of the correlation over the samples of each class, at least 0.
        weight: Factor in front of the term, at least 0.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> teacher = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0]])
        >>> abs(round(float(CorrelationDistillation()(teacher, teacher)), 4))
        0.0
    """

    temperature: float | Annealing = 1.0
    between_classes: float = 1.0
    between_samples: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("temperature", self.temperature, positive=True)
        check_number("between_classes", self.between_classes, least=0.0)
        check_number("between_samples", self.between_samples, least=0.0)

    @property
    @override
    def needs_probabilities_alone(self) -> bool:
        """Whether logits that give the same probabilities are the same to it."""
        return True

    @override
    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return both parts, weighted, times ``T^2``."""
        check_logits(student, teacher)
        temperature = number(self.temperature)
        p, q = (_positions_as_samples(precise(logits) / temperature).softmax(dim=1) for logits in (teacher, student))
        rows_of(p, "Correlations")
        classes = (1.0 - correlation(q, p)).mean()
        samples = (1.0 - correlation(q.T, p.T)).mean()
        return temperature**2 * (self.between_classes * classes + self.between_samples * samples)


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """Return Pearson's correlation of the rows of two matrices; 0 where a row has one value alone.

    Args:
        first: Shape ``(rows, values)``.
        second: The same shape.

    Returns:
        Shape ``(rows,)``, in [-1, 1].

    Example:
        >>> correlation(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), torch.tensor([[0.0, 5.0], [3.0, 1.0]])).round()
        tensor([ 1., -1.])
    """
    first, second = first - first.mean(1, keepdim=True), second - second.mean(1, keepdim=True)
    return torch.nn.functional.cosine_similarity(first, second, dim=1)


def _positions_as_samples(logits: Tensor) -> Tensor:
    return logits.flatten(2).movedim(1, 2).flatten(0, 1) if logits.dim() > 2 else logits
