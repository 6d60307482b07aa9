"""Regression on outputs: a student whose logits or embeddings are the teacher's themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from lightning_compress.distillation.loss import DistillationLoss, check_same_shape, precise

Metric = Literal["mse", "cosine"]


@dataclass(frozen=True, kw_only=True)
class OutputRegression(DistillationLoss):
    """The distance of what the networks return: logits (Ba & Caruana 2014, arXiv:1312.6184, section 2.2) or embeddings.

    Args:
        metric: ``"mse"`` or ``"cosine"``, see `distance`.
        weight: Factor in front of the term, at least 0.

    Raises:
        ValueError: If ``metric`` is unknown or ``weight`` out of range.

    Example:
        >>> OutputRegression()(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]]))
        tensor(2.)
    """

    metric: Metric = "mse"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_metric(self.metric)

    @override
    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the distance."""
        return distance(student, teacher, self.metric)


def check_metric(metric: str) -> None:
    """Check that a metric is known.

    Raises:
        ValueError: If it is not.

    Example:
        >>> check_metric("mse")
    """
    if metric not in get_args(Metric):
        raise ValueError(f"`metric` must be one of {', '.join(get_args(Metric))}, got {metric!r}.")


def distance(student: Tensor, teacher: Tensor, metric: Metric, dim: int = 1) -> Tensor:
    """Return the mean squared difference, or the mean of 1 minus the cosine.

    Args:
        student: Shape ``(N, C)`` or ``(N, C, *spatial)``.
        teacher: The same shape.
        metric: ``"mse"`` over all entries, or ``"cosine"`` of the vectors along ``dim``.
        dim: Dimension of the channels.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> distance(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]]), "cosine")
        tensor(1.)
    """
    check_same_shape(student, teacher, "outputs")
    student, teacher = precise(student), precise(teacher)
    if metric == "mse":
        return F.mse_loss(student, teacher)
    cosine: Tensor = torch.cosine_similarity(student, teacher, dim=dim)
    return (1.0 - cosine).mean()
