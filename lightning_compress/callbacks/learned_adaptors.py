"""What distillation learns and keeps: adaptors in the user's optimizer; they and own teachers in checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.distillation import Adaptors, DistillationLoss, OwnTeacher
from lightning_compress.errors import CompressionError
from lightning_compress.processes import average_, n_processes

STATE_KEY = "distillation"
"""Where they lie in a checkpoint: ``checkpoint["lightning_compress"]["distillation"]``."""


class LearnedAdaptors:
    """The adaptors of a list of losses during a fit, and the teachers that are the student itself.

    Args:
        losses: The losses by name; the name of a pair of modules begins with that of its loss and a colon.
        own_teachers: The teachers, whose weights travel too.
    """

    def __init__(
        self, losses: Mapping[str, DistillationLoss] | None = None, own_teachers: Sequence[OwnTeacher] = ()
    ) -> None:
        self.losses = dict(losses or {})
        self._own_teachers = own_teachers
        self._adaptors = Adaptors()
        self._optimizer: Optimizer | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> LearnedAdaptors:
        return LearnedAdaptors()  # a copy of the module has no part in the fit

    def __reduce__(self) -> tuple[type[LearnedAdaptors], tuple[()]]:
        return LearnedAdaptors, ()

    def adapted(self, name: str, student: Tensor, teacher: Tensor, trainer: pl.Trainer) -> tuple[Tensor, Tensor]:
        """Return both features through their adaptors, which are made and join the optimizer when there are none yet.

        Args:
            name: Name of the pair.
            student: The student's feature, a batch.
            teacher: The teacher's.
            trainer: The Trainer whose optimizer they join.

        Raises:
            ValueError: If the two cannot be compared.
        """
        if name not in self._adaptors:
            self._adaptors.make(name, self._loss_of(name), student.shape, teacher.shape)
            self.join(first_optimizer(trainer.optimizers))
        return self._adaptors.adapted(name, student, teacher)

    def join(self, optimizer: Optimizer | None) -> None:
        """Let an optimizer learn the adaptors that there are."""
        self._optimizer = optimizer
        if optimizer is not None:
            learn_too(optimizer, self._adaptors.parameters())

    def average_gradients(self) -> None:
        """Put the mean over the processes in the place of each adaptor's gradient; all must call it."""
        if n_processes() == 1:
            return
        parameters = self._adaptors.parameters()
        for parameter in parameters:  # as many in every process, whatever its batch has reached
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        average_([parameter.grad for parameter in parameters if parameter.grad is not None])

    def save(self) -> dict[str, Any]:
        """Return the adaptors as plain types and tensors."""
        return {
            "adaptors": self._adaptors.state_dict(),
            "own_teachers": [teacher.save() for teacher in self._own_teachers],
        }

    def load(self, saved: dict[str, Any]) -> None:
        """Take over what `save` returned, or begin anew where that is empty."""
        adaptors = saved.get("adaptors", {})
        if self._optimizer is not None:  # as after a search of the learning rate: it is loaded next
            forget_again(self._optimizer, self._adaptors.parameters())
        losses = {name: self._loss_of(name) for name in adaptors if name.partition(":")[0] in self.losses}
        self._adaptors.load_state_dict(adaptors, losses)
        self.join(self._optimizer)
        weights = saved.get("own_teachers") or [{} for _ in self._own_teachers]
        if len(weights) != len(self._own_teachers):
            raise CompressionError(
                f"The checkpoint was written with {len(weights)} teachers that are the student itself, this run has "
                f"{len(self._own_teachers)}. Give the same teachers to go on with it."
            )
        for teacher, its_weights in zip(self._own_teachers, weights, strict=True):
            teacher.load(its_weights)

    def _loss_of(self, name: str) -> DistillationLoss:
        return self.losses[name.partition(":")[0]]


def first_optimizer(configured: Any) -> Optimizer | None:
    """Return the first optimizer in what ``configure_optimizers`` returns, in any of its forms.

    Example:
        >>> from torch.optim import SGD
        >>> optimizer = SGD(nn.Linear(1, 1).parameters(), 0.1)
        >>> all(first_optimizer(form) is optimizer for form in (optimizer, [optimizer], ([optimizer], []),
        ...     {"optimizer": optimizer}, {"optimizer": optimizer, "lr_scheduler": None}))
        True
    """
    if isinstance(configured, Mapping):
        return first_optimizer(configured.get("optimizer"))
    if isinstance(configured, tuple | list):
        return first_optimizer(configured[0]) if configured else None
    found = getattr(configured, "optimizer", configured)  # Lightning wraps optimizers under manual optimization
    return found if isinstance(found, Optimizer) else None


def learn_too(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    """Let an optimizer learn more parameters, with the settings of its first group.

    They join that group: a group of their own would be unknown to schedulers that exist already.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1)
        >>> learn_too(optimizer, [nn.Parameter(torch.ones(1))])
        >>> len(optimizer.param_groups[0]["params"])
        3
    """
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    optimizer.param_groups[0]["params"].extend(item for item in parameters if id(item) not in known)


def forget_again(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    """Undo `learn_too`.

    Example:
        >>> import torch
        >>> added, optimizer = nn.Parameter(torch.ones(1)), torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1)
        >>> learn_too(optimizer, [added])
        >>> forget_again(optimizer, [added])
        >>> len(optimizer.param_groups[0]["params"])
        2
    """
    gone = {id(parameter) for parameter in parameters}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in gone]
    for parameter in parameters:
        optimizer.state.pop(parameter, None)
