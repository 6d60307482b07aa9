"""Logit distillation: losses that pull a student's class scores towards its teacher's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from lightning_compress.distillation.annealing import Annealing
from lightning_compress.distillation.loss import (
    DistillationLoss,
    check_number,
    check_same_shape,
    number,
    precise,
)


@dataclass(frozen=True, kw_only=True)
class LogitDistillation(DistillationLoss):
    """Hinton's distillation (arXiv:1503.02531), for each sample or for each position.

    Args:
        temperature: Softness of both distributions, above 0; 1 leaves the logits as they are.
        multilabel: Whether every class is a question of its own, answered by a sigmoid: see `multilabel_loss`.
        standardize: Whether the logits of each sample are brought to mean 0 and deviation 1 first: see `standardized`.
        weight: Factor in front of the term, at least 0.

    Raises:
        ValueError: If ``temperature`` is not positive and finite, or ``weight`` is negative or not finite.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 3.0]]).log()
        >>> LogitDistillation(temperature=1.0)(student, teacher) == hinton_loss(student, teacher, temperature=1.0)
        tensor(True)
    """

    temperature: float | Annealing = 4.0
    multilabel: bool = False
    standardize: bool = False
    weight: float | Annealing = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("temperature", self.temperature, positive=True)
        if self.multilabel and self.standardize:
            raise ValueError("`standardize` compares classes with one another, which `multilabel` keeps apart.")

    @property
    @override
    def needs_probabilities_alone(self) -> bool:
        """Whether logits that give the same probabilities are the same to it."""
        return not self.multilabel and not self.standardize

    @override
    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the divergence of the student's distributions from the teacher's."""
        temperature = number(self.temperature)
        if self.multilabel:
            return multilabel_loss(student, teacher, temperature)
        if self.standardize:
            student, teacher = standardized(student), standardized(teacher)
        return hinton_loss(student, teacher, temperature)


def hinton_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Divergence of the student's softened class distribution from its teacher's (Hinton et al. 2015).

    Source: Hinton, Vinyals & Dean, "Distilling the knowledge in a neural network", section 2, arXiv:1503.02531.

    ``T^2 * KL(softmax(teacher / T) || softmax(student / T))``, summed over classes and averaged over samples and
    positions. The factor ``T^2`` keeps the gradient's size independent of the temperature ``T``. Computed in at least
    float32, whatever the precision of the logits.

    Args:
        student_logits: Unnormalised class scores, shape ``(N, C)`` or ``(N, C, *spatial)`` with ``C`` classes.
        teacher_logits: The teacher's scores, of the same shape.
        temperature: Softness of both distributions, above 0.

    Returns:
        The loss in nats, a scalar of at least 0.

    Raises:
        ValueError: If the shapes differ, or hold no dimension of at least two classes.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 3.0]]).log()
        >>> hinton_loss(student, teacher, temperature=1.0)  # ln 2 - entropy of (1/4, 3/4)
        tensor(0.1308)
    """
    check_logits(student_logits, teacher_logits)
    student = F.log_softmax(precise(student_logits) / temperature, dim=1)
    teacher = F.log_softmax(precise(teacher_logits) / temperature, dim=1)
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1)
    return divergence.mean() * temperature**2


def multilabel_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Divergence of the student's yes-or-no answers from its teacher's, one for each class (Yang et al. 2023).

    Source: "Multi-label knowledge distillation", equation 4, arXiv:2308.06453, with the temperature of Hinton's loss.

    ``T^2 * KL(p || q)`` of the two-valued distributions ``p = sigmoid(teacher / T)`` and ``q = sigmoid(student / T)``,
    summed over classes and averaged over samples and positions.

    Args:
        student_logits: Scores, shape ``(N, C)`` or ``(N, C, *spatial)``.
        teacher_logits: The teacher's scores, of the same shape.
        temperature: Softness of both distributions, above 0.

    Returns:
        The loss in nats, a scalar of at least 0.

    Example:
        >>> multilabel_loss(torch.zeros(1, 1), torch.tensor([[3.0]]).log(), temperature=1.0)  # 3/4 against 1/2
        tensor(0.1308)
    """
    check_logits(student_logits, teacher_logits, least=1)
    student, teacher = precise(student_logits) / temperature, precise(teacher_logits) / temperature
    yes = torch.sigmoid(teacher) * (F.logsigmoid(teacher) - F.logsigmoid(student))
    no = torch.sigmoid(-teacher) * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    return (yes + no).sum(dim=1).mean() * temperature**2


def standardized(logits: Tensor) -> Tensor:
    """Return logits with mean 0 and deviation 1 over the classes of each sample (Sun et al. 2024).

    Source: "Logit standardization in knowledge distillation", algorithm 1, arXiv:2403.01256: a student need not reach
    the size of its teacher's logits, only their relations.

    Args:
        logits: Shape ``(N, C)`` or ``(N, C, *spatial)``.

    Example:
        >>> standardized(torch.tensor([[0.0, 4.0]]))
        tensor([[-1.,  1.]])
    """
    logits = precise(logits)
    centred = logits - logits.mean(dim=1, keepdim=True)
    return centred / centred.square().mean(dim=1, keepdim=True).sqrt().clamp_min(1e-7)


def check_logits(student: Tensor, teacher: Tensor, least: int = 2) -> None:
    """Check that two tensors are scores of the same classes.

    Args:
        student: The student's logits.
        teacher: The teacher's.
        least: Least number of classes.

    Raises:
        ValueError: If the shapes differ, or hold no dimension of classes.

    Example:
        >>> check_logits(torch.ones(1, 2), torch.ones(1, 2))
    """
    check_same_shape(student, teacher, "logits")
    if student.dim() < 2 or student.shape[1] < least:
        number_of = "one class" if least == 1 else "two classes"
        raise ValueError(
            f"Logits must have the shape (N, C) or (N, C, *spatial) with at least {number_of} C, got "
            f"{tuple(student.shape)}."
        )
