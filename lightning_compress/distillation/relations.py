"""Relations between samples: a student for which the samples of a batch lie as they lie for its teacher."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from lightning_compress.distillation.loss import FeatureLoss, check_number, rows_of


@dataclass(frozen=True, kw_only=True)
class SimilarityPreserving(FeatureLoss):
    """Similarity-preserving distillation (Tung & Mori 2019, arXiv:1907.09682, equation 4).

    Args:
        layers: Name of the student's module to that of the teacher's, see `FeatureLoss`; without it, the outputs of the
            networks are compared. Shapes may differ.
        weight: Factor in front of the term, at least 0.

    Example:
        >>> features = torch.eye(2)
        >>> SimilarityPreserving()(torch.ones(2, 3), features)  # rows of (0.71, 0.71) against (1, 0) and (0, 1)
        tensor(0.2929)
    """

    @override
    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the mean squared difference of the similarities of all pairs of samples."""
        return F.mse_loss(similarities(student), similarities(teacher))


def similarities(features: Tensor) -> Tensor:
    """Return how alike the samples of a batch are: the products of their features, each row of length 1.

    Args:
        features: Shape ``(N, ...)``, at least two samples.

    Returns:
        Shape ``(N, N)``.

    Raises:
        ValueError: If there is one sample alone.

    Example:
        >>> similarities(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        tensor([[1., 0.],
                [0., 1.]])
    """
    rows = rows_of(features, "Similarities")
    return F.normalize(rows @ rows.T, dim=1)


@dataclass(frozen=True, kw_only=True)
class RelationalDistillation(FeatureLoss):
    """Relational distillation (Park et al. 2019, arXiv:1904.05068, equations 6 and 9).

    Args:
        layers: Name of the student's module to that of the teacher's, see `FeatureLoss`; without it, the outputs of the
            networks are compared. Shapes may differ.
        distance: Weight of the distances of all pairs of samples, at least 0.
        angle: Weight of the angles of all triples of samples, at least 0.
        weight: Factor in front of the term, at least 0.

    Raises:
        ValueError: If a weight is out of range.

    Example:
        >>> loss = RelationalDistillation()
        >>> teacher = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> abs(round(float(loss(3 * teacher, teacher)), 5))  # the size of the whole does not matter
        0.0
    """

    distance: float = 1.0
    angle: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("distance", self.distance, least=0.0)
        check_number("angle", self.angle, least=0.0)

    @override
    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return both parts, weighted."""
        student, teacher = rows_of(student, "Relations"), rows_of(teacher, "Relations")
        total = student.new_zeros(())
        if self.distance:
            total = total + self.distance * F.huber_loss(distances(student), distances(teacher))
        if self.angle:
            total = total + self.angle * F.huber_loss(angles(student), angles(teacher))
        return total


def distances(rows: Tensor) -> Tensor:
    """Return the distances of all pairs of rows, over their mean (without the zeros of a row to itself).

    Args:
        rows: Shape ``(N, features)``.

    Returns:
        Shape ``(N, N)``.

    Example:
        >>> distances(torch.tensor([[0.0], [1.0], [3.0]]))
        tensor([[0.0000, 0.5000, 1.5000],
                [0.5000, 0.0000, 1.0000],
                [1.5000, 1.0000, 0.0000]])
    """
    products = rows @ rows.T
    squares = products.diagonal()
    squared = (squares.unsqueeze(0) + squares.unsqueeze(1) - 2 * products).clamp_min(0)
    is_other = ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    # The root has no finite slope at zero, where a row lies on another or on itself.
    found = torch.where(is_other & (squared > 0), squared, 1.0).sqrt() * (is_other & (squared > 0))
    mean = found.sum() / is_other.sum()
    return found / mean.clamp_min(1e-12)


def angles(rows: Tensor) -> Tensor:
    """Return the cosines of the angles of all triples of rows.

    Args:
        rows: Shape ``(N, features)``.

    Returns:
        Shape ``(N, N, N)``: entry ``(j, i, k)`` is that of the angle at ``j`` between ``i`` and ``k``.

    Example:
        >>> angles(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))[0, 1, 2]
        tensor(0.)
    """
    directions = F.normalize(rows.unsqueeze(0) - rows.unsqueeze(1), dim=2)  # at j, towards i
    return directions @ directions.transpose(1, 2)
