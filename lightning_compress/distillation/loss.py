"""What every distillation loss has: what it compares, and a weight that may change over the run."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from lightning_compress.distillation.annealing import Annealing


@dataclass(frozen=True, kw_only=True)
class DistillationLoss(ABC):
    """A term that pulls something of the student towards the same of the teacher.

    Calling it gives the term without its weight.

    Args:
        weight: Factor in front of the term, at least 0; an `Annealing` changes it over the run.

    Attributes:
        needs_labels: Whether it is called with the class of each sample, too.

    Raises:
        ValueError: If a number is out of range.
    """

    weight: float | Annealing = 1.0

    needs_labels: ClassVar[bool] = False

    @property
    def needs_probabilities_alone(self) -> bool:
        """Whether logits that give the same probabilities are the same to it."""
        return False

    def __post_init__(self) -> None:
        check_number("weight", self.weight, least=0.0)

    @abstractmethod
    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the term, a scalar, for what the student and the teacher gave for the same samples."""

    @property
    def pairs(self) -> Mapping[str, str]:
        """The student's modules and those of the teacher whose outputs are compared; the networks' own where empty."""
        return {}

    def at(self, step: int, total_steps: int | None) -> Self:
        """Return the same loss with the numbers that it has at an optimizer step in the place of what changes.

        Args:
            step: Optimizer steps completed so far.
            total_steps: Those of the whole run, or None where the run has no known end.
        """
        annealed = {name: value for name, value in vars(self).items() if isinstance(value, Annealing)}
        return replace(self, **{name: value.at(step, total_steps) for name, value in annealed.items()})

    def adaptors(self, student: Sequence[int], teacher: Sequence[int]) -> tuple[nn.Module, nn.Module]:
        """Return modules to learn, through which the student's and the teacher's output go first.

        Args:
            student: Shape of the student's output, a batch.
            teacher: Shape of the teacher's.

        Raises:
            ValueError: If the two cannot be compared.
        """
        return nn.Identity(), nn.Identity()


@dataclass(frozen=True, kw_only=True)
class FeatureLoss(DistillationLoss):
    """A loss that compares outputs of modules inside the networks, or what the networks return where none are named.

    Args:
        layers: Name of the student's module to that of the teacher's, such as ``{"layer3": "layer4"}``; a list where
            both have the same names. A ``*`` stands for any part of a name between two dots, and the teacher's pattern
            gets the same parts. Where a module returns several tensors, say which: ``"encoder[0]"``,
            ``"encoder[hidden]"``.
        weight: Factor in front of the mean over the pairs.
    """

    layers: Mapping[str, str] | Sequence[str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.layers, str):
            raise TypeError(f"`layers` must be a list of names or a mapping, got the single string {self.layers!r}.")

    @property
    def pairs(self) -> Mapping[str, str]:
        """The student's modules and the teacher's."""
        return self.layers if isinstance(self.layers, Mapping) else {name: name for name in self.layers}


def check_number(name: str, value: float | Annealing, *, least: float | None = None, positive: bool = False) -> None:
    """Check a number of a loss, at both ends where it changes.

    Args:
        name: Its name.
        value: The number.
        least: Its least value, if it has one.
        positive: Whether it must be above 0.

    Raises:
        ValueError: If it is out of range or not finite.

    Example:
        >>> check_number("weight", Annealing(0.0, 0.5), least=0.0)
        >>> check_number("temperature", 0.0, positive=True)
        Traceback (most recent call last):
        ...
        ValueError: `temperature` must be a positive finite number, got 0.0.
    """
    for number in (value.initial, value.final) if isinstance(value, Annealing) else (value,):
        is_number = isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
        if not is_number or (least is not None and number < least) or (positive and number <= 0):
            expected = "a finite number" if least is None else f"a finite number of at least {least:g}"
            expected = expected if not positive else "a positive finite number"
            raise ValueError(f"`{name}` must be {expected}, got {number!r}.")


def number(value: float | Annealing) -> float:
    """Return a number of a loss that `DistillationLoss.at` has given.

    Example:
        >>> number(0.7)
        0.7
    """
    if isinstance(value, Annealing):
        raise TypeError("A number that changes over the run is known only at a step: use `loss.at(step, total_steps)`.")
    return value


def precise(tensor: Tensor) -> Tensor:
    """Return a tensor in at least float32: half precision has too few digits for differences of nearly equal values.

    Example:
        >>> precise(torch.ones(1, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def check_same_shape(student: Tensor, teacher: Tensor, what: str) -> None:
    """Check that what is compared has one shape.

    Args:
        student: The student's.
        teacher: The teacher's.
        what: What they are, for the message.

    Raises:
        ValueError: If they differ.

    Example:
        >>> check_same_shape(torch.ones(2, 3), torch.ones(2, 3), "logits")
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"The student's and the teacher's {what} must have the same shape, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}: give both networks the same classes, or select other outputs."
        )


def rows_of(tensor: Tensor, what: str) -> Tensor:
    """Return one row a sample, of at least two samples, in at least float32.

    Args:
        tensor: Shape ``(N, ...)``.
        what: What it is, for the message.

    Raises:
        ValueError: If there is one sample alone: nothing can be told of how samples relate.

    Example:
        >>> rows_of(torch.ones(2, 3, 4), "embeddings").shape
        torch.Size([2, 12])
    """
    if tensor.dim() < 2 or len(tensor) < 2:
        raise ValueError(
            f"{what} relate the samples of a batch, so it must hold at least two, got a shape of "
            f"{tuple(tensor.shape)}. Give the loader a larger batch size, or `drop_last=True`."
        )
    return precise(tensor).flatten(1)
