"""Contrastive distillation: a student whose embedding tells which of the teacher's embeddings is of the same sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_compress.distillation.annealing import Annealing
from lightning_compress.distillation.loss import FeatureLoss, check_number, number, rows_of


@dataclass(frozen=True, kw_only=True)
class ContrastiveDistillation(FeatureLoss):
    """CRD (Tian et al. 2020, arXiv:1910.10699) with the other samples of the batch as negatives.

    Both embeddings are pooled over positions, and mapped by a learned linear layer each, as in the paper; the loss is
    the symmetric cross-entropy over the batch (van den Oord et al. 2018, arXiv:1807.03748, equation 4) in the place of
    the paper's memory bank.

    Args:
        layers: Name of the student's module to that of the teacher's, see `FeatureLoss`; without it, the outputs of the
            networks are compared.
        features: Length of the embeddings that are compared, at least 1.
        temperature: What the cosines are divided by, above 0.
        weight: Factor in front of the term, at least 0.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> loss = ContrastiveDistillation(temperature=1.0)
        >>> loss(torch.eye(2), torch.eye(2))  # -log(e / (e + 1))
        tensor(0.3133)
    """

    features: int = 128
    temperature: float | Annealing = 0.07

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("features", self.features, least=1)
        check_number("temperature", self.temperature, positive=True)

    @override
    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the cross-entropy of two batches of embeddings of the same length."""
        return contrastive_loss(student, teacher, number(self.temperature))

    @override
    def adaptors(self, student: Sequence[int], teacher: Sequence[int]) -> tuple[nn.Module, nn.Module]:
        return tuple(  # type: ignore[return-value]
            nn.Sequential(_Pooled(), nn.Linear(shape[1], self.features)) for shape in (student, teacher)
        )


class _Pooled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2) if x.dim() > 2 else x


def contrastive_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return how badly each embedding tells its own partner from the others of the batch, in both directions.

    Args:
        student: Shape ``(N, features)``, at least two samples.
        teacher: The same shape.
        temperature: What the cosines are divided by, above 0.

    Returns:
        The loss in nats, a scalar of at least 0.

    Raises:
        ValueError: If there is one sample alone.

    Example:
        >>> contrastive_loss(torch.eye(2), torch.eye(2).flip(0), temperature=1.0)  # -log(1 / (e + 1))
        tensor(1.3133)
    """
    student, teacher = (F.normalize(rows_of(rows, "Contrasts"), dim=1) for rows in (student, teacher))
    scores = student @ teacher.T / temperature
    same = torch.arange(len(scores), device=scores.device)
    return (F.cross_entropy(scores, same) + F.cross_entropy(scores.T, same)) / 2
