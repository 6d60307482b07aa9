"""Attention transfer: a student that looks where its teacher looks."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from lightning_compress.distillation.features import same_size
from lightning_compress.distillation.loss import FeatureLoss, check_same_shape, precise


@dataclass(frozen=True, kw_only=True)
class AttentionTransfer(FeatureLoss):
    """Activation-based attention transfer (Zagoruyko & Komodakis 2017, arXiv:1612.03928, equation 2).

    Args:
        layers: Name of the student's module to that of the teacher's, see `FeatureLoss`; their channels may differ.
        weight: Factor in front of the term, at least 0. The mean over the positions is taken, not their sum.

    Raises:
        ValueError: If there are no layers, or ``weight`` is out of range.

    Example:
        >>> import torch
        >>> loss = AttentionTransfer(layers=["layer3"])
        >>> loss(torch.tensor([[[[3.0, 0.0]]]]), torch.tensor([[[[0.0, 5.0]]]]))  # (1, 0) against (0, 1)
        tensor(1.)
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.pairs:
            raise ValueError('`AttentionTransfer` needs `layers`, such as {"layer3": "layer4"}.')

    @override
    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the mean squared difference of the two maps."""
        mine, theirs = (attention_map(feature) for feature in same_size(student, teacher))
        check_same_shape(mine, theirs, "attention maps")
        return F.mse_loss(mine, theirs)


def attention_map(feature: Tensor) -> Tensor:
    """Return where a feature is large: the sum of squares over its channels, as a vector of length 1.

    Args:
        feature: Shape ``(N, C, *spatial)``.

    Returns:
        Shape ``(N, positions)``.

    Raises:
        ValueError: If there are no positions.

    Example:
        >>> import torch
        >>> attention_map(torch.tensor([[[3.0 ** 0.5, 2.0], [0.0, 0.0]]]))
        tensor([[0.6000, 0.8000]])
    """
    if feature.dim() < 3:
        raise ValueError(
            f"Attention maps need features of the shape (N, C, *spatial), got {tuple(feature.shape)}. Name a layer "
            "before the pooling."
        )
    return F.normalize(precise(feature).square().sum(1).flatten(1), dim=1)
