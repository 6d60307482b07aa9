"""Logit distillation: losses that pull a student's class scores towards its teacher's."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class LogitDistillation:
    """Hinton's distillation term as it is added to the task loss (arXiv:1503.02531).

    Args:
        temperature: Softness of both distributions, above 0; 1 leaves the logits as they are.
        weight: Factor in front of the term, at least 0.

    Raises:
        ValueError: If ``temperature`` is not positive and finite, or ``weight`` is negative or not finite.

    Example:
        >>> distillation = LogitDistillation(temperature=1.0, weight=0.5)
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 3.0]]).log()
        >>> distillation(student, teacher) == 0.5 * hinton_loss(student, teacher, temperature=1.0)
        tensor(True)
    """

    temperature: float
    weight: float

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"`temperature` must be a positive finite number, got {self.temperature}.")
        if not (self.weight >= 0 and math.isfinite(self.weight)):
            raise ValueError(f"`weight` must be a finite number of at least 0, got {self.weight}.")

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Return ``weight`` times :func:`hinton_loss`."""
        return self.weight * hinton_loss(student_logits, teacher_logits, self.temperature)


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
    _check_shapes(student_logits, teacher_logits)
    # Half precision has too few digits for the difference of two nearly equal log-probabilities.
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    student = F.log_softmax(student_logits.to(dtype) / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits.to(dtype) / temperature, dim=1)
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1)
    return divergence.mean() * temperature**2


def _check_shapes(student_logits: Tensor, teacher_logits: Tensor) -> None:
    student_shape, teacher_shape = tuple(student_logits.shape), tuple(teacher_logits.shape)
    if student_shape != teacher_shape:
        raise ValueError(
            f"The student's and the teacher's logits must have the same shape, got {student_shape} and "
            f"{teacher_shape}: give both networks the same classes, or select other outputs."
        )
    if len(student_shape) < 2 or student_shape[1] < 2:
        raise ValueError(
            f"Logits must have the shape (N, C) or (N, C, *spatial) with at least two classes C, got {student_shape}."
        )
