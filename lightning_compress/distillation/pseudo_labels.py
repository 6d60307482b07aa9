"""Pseudo-labels: the teacher's own decisions as the student's labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from lightning_compress.distillation.logits import check_logits
from lightning_compress.distillation.loss import DistillationLoss, precise


@dataclass(frozen=True, kw_only=True)
class PseudoLabels(DistillationLoss):
    """Cross-entropy with the class that the teacher holds for the likeliest (Lee 2013, "Pseudo-Label", equation 15).

    Args:
        threshold: Least probability that the teacher must give to its choice for it to count, in [0, 1).
        weight: Factor in front of the term, at least 0.

    Raises:
        ValueError: If ``threshold`` or ``weight`` is out of range.

    Example:
        >>> PseudoLabels()(torch.zeros(1, 2), torch.tensor([[0.0, 9.0]]))
        tensor(0.6931)
    """

    threshold: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.threshold < 1.0:
            raise ValueError(f"`threshold` is a probability in [0, 1), got {self.threshold}.")

    @property
    @override
    def needs_probabilities_alone(self) -> bool:
        """Whether logits that give the same probabilities are the same to it."""
        return True

    @override
    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the mean over samples and positions that count, 0 where none does."""
        check_logits(student, teacher)
        probability, choice = precise(teacher).softmax(1).max(1)
        counts = probability >= self.threshold
        losses = F.cross_entropy(precise(student), choice, reduction="none")
        return torch.where(counts, losses, 0.0).sum() / counts.sum().clamp_min(1)
