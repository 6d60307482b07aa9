"""Hints: features inside the student that become the teacher's, through a learned adaptor where widths differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_compress.distillation.loss import FeatureLoss
from lightning_compress.distillation.regression import Metric, check_metric, distance

Adaptor = Literal["auto", "always", "never"]

Channels = Literal["auto", "first", "last"]


@dataclass(frozen=True, kw_only=True)
class FeatureDistillation(FeatureLoss):
    """FitNets (Romero et al. 2015, arXiv:1412.6550, equation 3): the distance of features, per entry.

    Where the student has another number of channels, its features go through a learned linear map first: a 1x1
    convolution over images and signals, a linear layer over vectors and sequences. It learns with the student's first
    optimizer, and is in neither the state dict nor the exported file. Where images differ in height or width, the
    larger one is averaged down.

    Args:
        layers: Name of the student's module to that of the teacher's, see `FeatureLoss`.
        metric: ``"mse"`` or ``"cosine"``.
        channels: Where the channels are: ``"first"``, behind the batch; ``"last"``, as in sequences ``(N, L, C)``; or
            ``"auto"``, which is last where it is there alone that the two features differ.
        adaptor: ``"auto"`` where channels differ, ``"always"``, or ``"never"``.
        weight: Factor in front of the term, at least 0.

    Raises:
        ValueError: If there are no layers, or an argument is out of range.

    Example:
        >>> import torch
        >>> hint = FeatureDistillation(layers={"layer3": "layer4"})
        >>> hint(torch.zeros(1, 2, 4, 4), torch.ones(1, 2, 2, 2))
        tensor(1.)
    """

    metric: Metric = "mse"
    adaptor: Adaptor = "auto"
    channels: Channels = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_metric(self.metric)
        if self.adaptor not in get_args(Adaptor):
            raise ValueError(f"`adaptor` must be one of {', '.join(get_args(Adaptor))}, got {self.adaptor!r}.")
        if self.channels not in get_args(Channels):
            raise ValueError(f"`channels` must be one of {', '.join(get_args(Channels))}, got {self.channels!r}.")
        if not self.pairs:
            raise ValueError('`FeatureDistillation` needs `layers`, such as {"layer3": "layer4"}.')

    @override
    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the distance of two features of as many channels."""
        dim = self._dim(student.shape, teacher.shape)
        return distance(*same_size(student, teacher, dim), self.metric, dim)

    @override
    def adaptors(self, student: Sequence[int], teacher: Sequence[int]) -> tuple[nn.Module, nn.Module]:
        dim = self._dim(student, teacher)
        if self.metric == "cosine" and self.channels == "auto" and dim > 1:
            raise ValueError(
                f"Features of the shapes {tuple(student)} and {tuple(teacher)} have their channels last, and behind "
                'the adaptor that cannot be told any more. Say so for the cosine: `channels="last"`.'
            )
        if self.adaptor == "never" or (self.adaptor == "auto" and student[dim] == teacher[dim]):
            return nn.Identity(), nn.Identity()
        return channel_map(student, teacher, dim), nn.Identity()

    def _dim(self, student: Sequence[int], teacher: Sequence[int]) -> int:
        found = channel_dim(student, teacher)
        return {"auto": found, "first": 1, "last": len(student) - 1}[self.channels]


def channel_dim(student: Sequence[int], teacher: Sequence[int]) -> int:
    """Return the dimension of the channels: the last where it is there that two features differ, else the first.

    Args:
        student: Shape of the student's feature, a batch.
        teacher: Shape of the teacher's.

    Raises:
        ValueError: If they have not as many dimensions, or no channels.

    Example:
        >>> channel_dim((8, 16, 4, 4), (8, 32, 2, 2)), channel_dim((8, 10, 64), (8, 10, 96))
        (1, 2)
    """
    if len(student) != len(teacher) or len(student) < 2:
        raise ValueError(
            f"Features of the shapes {tuple(student)} and {tuple(teacher)} cannot be compared: both need a batch, "
            "channels, and the same number of dimensions. Name other layers."
        )
    is_last = len(student) > 2 and student[-1] != teacher[-1] and student[1:-1] == teacher[1:-1]
    return len(student) - 1 if is_last else 1


def channel_map(student: Sequence[int], teacher: Sequence[int], dim: int) -> nn.Module:
    """Return a linear map from the channels of one feature to those of the other.

    Args:
        student: Shape that it maps, a batch.
        teacher: Shape whose number of channels it maps to.
        dim: Dimension of the channels.

    Example:
        >>> channel_map((8, 16, 4, 4), (8, 32, 2, 2), 1)
        Conv2d(16, 32, kernel_size=(1, 1), stride=(1, 1), bias=False)
    """
    convolutions = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
    if dim == 1 and len(student) in convolutions:
        return convolutions[len(student)](student[1], teacher[1], 1, bias=False)
    return nn.Linear(student[dim], teacher[dim], bias=False)


def same_size(student: Tensor, teacher: Tensor, dim: int = 1) -> tuple[Tensor, Tensor]:
    """Return two features with the larger one averaged down to the height and width of the smaller.

    Args:
        student: Shape ``(N, C, *spatial)``; other dimensions stay as they are.
        teacher: Shape ``(N, C', *spatial')``.
        dim: Dimension of the channels.

    Example:
        >>> import torch
        >>> [tuple(feature.shape) for feature in same_size(torch.ones(1, 2, 8, 8), torch.ones(1, 3, 4, 4))]
        [(1, 2, 4, 4), (1, 3, 4, 4)]
    """
    pools: dict[int, Callable[[Tensor, list[int]], Tensor]] = {
        3: F.adaptive_avg_pool1d,
        4: F.adaptive_avg_pool2d,  # type: ignore[dict-item]
        5: F.adaptive_avg_pool3d,  # type: ignore[dict-item]
    }
    if (
        dim != 1
        or student.dim() != teacher.dim()
        or student.dim() not in pools
        or student.shape[2:] == teacher.shape[2:]
    ):
        return student, teacher
    size = [min(pair) for pair in zip(student.shape[2:], teacher.shape[2:], strict=True)]
    pool = pools[student.dim()]
    return pool(student, size), pool(teacher, size)
