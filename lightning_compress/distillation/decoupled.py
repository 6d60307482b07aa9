"""Decoupled distillation: what the teacher says of the right class, and of the others, with a weight for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from lightning_compress.distillation.annealing import Annealing
from lightning_compress.distillation.logits import check_logits, standardized
from lightning_compress.distillation.loss import DistillationLoss, check_number, number, precise


@dataclass(frozen=True, kw_only=True)
class DecoupledDistillation(DistillationLoss):
    """DKD (Zhao et al. 2022, arXiv:2203.08679, equation 7); it needs the labels of the batch.

    Args:
        temperature: Softness of the distributions, above 0.
        target: Weight ``alpha`` of the right class against all others, at least 0.
        others: Weight ``beta`` of the other classes among themselves, at least 0.
        standardize: Whether the logits of each sample are brought to mean 0 and deviation 1 first.
        weight: Factor in front of the term, at least 0.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> student, teacher = torch.zeros(1, 3), torch.tensor([[2.0, 1.0, 0.0]])
        >>> DecoupledDistillation(target=1.0, others=0.0, temperature=1.0)(student, teacher, torch.tensor([0]))
        tensor(0.2291)
    """

    temperature: float | Annealing = 4.0
    target: float = 1.0
    others: float = 8.0
    standardize: bool = False

    needs_labels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("temperature", self.temperature, positive=True)
        check_number("target", self.target, least=0.0)
        check_number("others", self.others, least=0.0)

    @property
    @override
    def needs_probabilities_alone(self) -> bool:
        """Whether logits that give the same probabilities are the same to it."""
        return not self.standardize

    @override
    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return both parts, weighted."""
        if labels is None:
            raise ValueError("`DecoupledDistillation` needs the labels: which class is the right one.")
        if self.standardize:
            student, teacher = standardized(student), standardized(teacher)
        target, others = decoupled_losses(student, teacher, labels, number(self.temperature))
        return self.target * target + self.others * others


def decoupled_losses(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the divergences of (right class, all others), and of the other classes among themselves, times ``T^2``.

    Hinton's loss is the first plus the second times the teacher's probability of all others (equation 5 of the paper).

    Args:
        student: Logits, shape ``(N, C)`` or ``(N, C, *spatial)`` with at least two classes.
        teacher: The teacher's, of the same shape.
        labels: The right classes, shape ``(N, *spatial)``.
        temperature: Softness of the distributions, above 0.

    Returns:
        Two scalars of at least 0, averaged over samples and positions.

    Raises:
        ValueError: If the shapes do not fit, or labels are no classes.

    Example:
        >>> student, teacher = torch.zeros(1, 3), torch.tensor([[2.0, 1.0, 0.0]])
        >>> target, others = decoupled_losses(student, teacher, torch.tensor([0]), temperature=1.0)
        >>> round(float(target), 4), round(float(others), 4)
        (0.2291, 0.1109)
    """
    check_logits(student, teacher)
    if labels.shape != student[:, 0].shape or labels.is_floating_point():
        raise ValueError(
            f"The labels must be the number of the right class of every sample and position, shape "
            f"{tuple(student[:, 0].shape)}, got {labels.dtype} of shape {tuple(labels.shape)}."
        )
    if bool(((labels < 0) | (labels >= student.shape[1])).any()):
        raise ValueError(
            f"The labels must be classes from 0 to {student.shape[1] - 1}, got {int(labels.min())} to "
            f"{int(labels.max())}."
        )
    is_target = torch.zeros_like(student, dtype=torch.bool).scatter_(1, labels.unsqueeze(1), True)

    def parts(logits: Tensor) -> tuple[Tensor, Tensor]:
        logits = precise(logits) / temperature
        log_p = F.log_softmax(logits, dim=1)
        target = log_p.masked_fill(~is_target, 0.0).sum(1)
        # The others' share is their own sum: 1 - p of the target loses its digits where p is near 1.
        others = log_p.masked_fill(is_target, -torch.inf).logsumexp(1)
        return torch.stack([target, others], 1), F.log_softmax(logits.masked_fill(is_target, -torch.inf), dim=1)

    student_pair, student_others = parts(student)
    teacher_pair, teacher_others = parts(teacher)
    target = (teacher_pair.exp() * (teacher_pair - student_pair)).sum(1)
    difference = (teacher_others - student_others).masked_fill(is_target, 0.0)
    others = (teacher_others.exp() * difference).sum(1)
    return target.mean() * temperature**2, others.mean() * temperature**2
