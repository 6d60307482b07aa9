"""Adaptors: modules that only the distillation learns, between the student's features and the teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.distillation.loss import precise


class Adaptors:
    """The adaptors of all losses, by name; they are made when the shapes are known, and are part of no module tree.

    They compute in float32, outside of autocast, whatever the precision of the training.

    Example:
        >>> from lightning_compress.distillation.features import FeatureDistillation
        >>> adaptors = Adaptors()
        >>> hint = FeatureDistillation(layers=["layer"])
        >>> adaptors.make("hint", hint, (2, 3), (2, 5))
        >>> mine, theirs = adaptors.adapted("hint", torch.ones(2, 3), torch.ones(2, 5))
        >>> mine.shape, theirs.shape, [parameter.shape for parameter in adaptors.parameters()]
        (torch.Size([2, 5]), torch.Size([2, 5]), [torch.Size([5, 3])])
    """

    def __init__(self) -> None:
        self._pairs: dict[str, nn.ModuleList] = {}
        self._shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}

    def __contains__(self, name: str) -> bool:
        """Tell whether there are adaptors for the pair of this name."""
        return name in self._pairs

    def adapted(self, name: str, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Return what a loss compares: both features, through the adaptors that `make` has made.

        Args:
            name: Name of the pair.
            student: The student's feature, a batch.
            teacher: The teacher's.
        """
        mine, theirs = self._pairs[name]
        if isinstance(mine, nn.Identity) and isinstance(theirs, nn.Identity):
            return student, teacher
        self._pairs[name].to(student.device)
        with torch.autocast(student.device.type, enabled=False):
            return mine(precise(student)), theirs(precise(teacher))

    def make(self, name: str, loss: Any, student: Sequence[int], teacher: Sequence[int]) -> None:
        """Make the adaptors of a pair of features of these shapes, with the same weights in every process.

        Args:
            name: Name of the pair, the same in every run.
            loss: The `DistillationLoss`.
            student: Shape of the student's feature, a batch.
            teacher: Shape of the teacher's.

        Raises:
            ValueError: If the two cannot be compared.
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(len(self._pairs))  # `torch.manual_seed` would seed the devices too
            adaptors = nn.ModuleList(loss.adaptors(tuple(student), tuple(teacher)))
        self._pairs[name] = adaptors.float()  # under half precision, Lightning lets new modules be of that
        self._shapes[name] = tuple(student), tuple(teacher)

    def parameters(self) -> list[nn.Parameter]:
        """Return what is to be learned."""
        return [parameter for pair in self._pairs.values() for parameter in pair.parameters()]

    def state_dict(self) -> dict[str, Any]:
        """Return shapes and weights, by name, as plain types and CPU tensors."""
        return {
            name: {
                "shapes": [list(shape) for shape in self._shapes[name]],
                "weights": {key: value.detach().cpu().clone() for key, value in pair.state_dict().items()},
            }
            for name, pair in self._pairs.items()
            if next(pair.parameters(), None) is not None
        }

    def load_state_dict(self, state: dict[str, Any], losses: dict[str, Any]) -> None:
        """Make the adaptors again that `state_dict` told of; those of losses that are no more are left out.

        Args:
            state: What `state_dict` returned.
            losses: The losses, by the name of the pair.
        """
        self._pairs, self._shapes = {}, {}
        for name, saved in state.items():
            if name in losses:
                self.make(name, losses[name], *saved["shapes"])
                self._pairs[name].load_state_dict(saved["weights"])
