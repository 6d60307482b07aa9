"""Teachers: what may teach, several of them as one, and the student itself as its own teacher."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from lightning_compress.distillation.loss import check_number
from lightning_compress.distillation.onnx_teacher import OnnxNetwork
from lightning_compress.distillation.taps import Features
from lightning_compress.distillation.teacher import Answer, FrozenTeacher, load_weights
from lightning_compress.errors import CompressionError

Network: TypeAlias = nn.Module | Callable[..., Any] | str | os.PathLike[str]
"""A module, any other callable, the path of an ONNX file, or ``"self"`` or ``"ema"``."""

Precision = Literal["bf16", "fp16", "fp32"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

OWN = ("self", "ema")


@dataclass(frozen=True, eq=False)
class Teacher:
    """A teacher, and what it needs that the student does not.

    Args:
        network: A trained ``nn.Module`` or LightningModule; any other callable; the path of an ONNX file, which ONNX
            Runtime runs; ``"self"`` for the student in float as it was when the run began, the natural teacher of what
            is quantized or pruned; or ``"ema"`` for the moving average of the student's weights (Tarvainen & Valpola
            2017, arXiv:1703.01780).
        checkpoint: A file with the weights of ``network``, see `load_weights`.
        transform: Makes the teacher's positional inputs of the student's, such as a resize or another normalization:
            gets the student's positional inputs and returns a tensor, or a tuple of all.
        precision: Of its forward: ``"bf16"``, ``"fp16"`` or ``"fp32"``; that of the training by default.
        weight: Its share in the mean of the logits of several teachers, above 0.
        decay: Share of the old average that is kept in a step, in [0, 1), where ``network`` is ``"ema"``; in the first
            steps at most ``(1 + steps) / (10 + steps)``.

    Raises:
        TypeError: If ``network`` cannot teach.
        ValueError: If an argument is out of range.
        CompressionError: If ``checkpoint`` does not hold the weights.

    Example:
        >>> teacher = Teacher(nn.Linear(4, 2), transform=lambda x: x[:, ::2].repeat(1, 2), precision="bf16")
        >>> teacher.weight
        1.0
    """

    network: Network
    checkpoint: str | os.PathLike[str] | None = None
    transform: Callable[..., Any] | None = None
    precision: Precision | None = None
    weight: float = 1.0
    decay: float = 0.999

    def __post_init__(self) -> None:
        check_number("weight", self.weight, positive=True)
        if not 0.0 <= self.decay < 1.0:
            raise ValueError(f"`decay` must be in [0, 1), got {self.decay}.")
        if self.precision is not None and self.precision not in _DTYPES:
            raise ValueError(f"`precision` must be one of {', '.join(_DTYPES)}, got {self.precision!r}.")
        if isinstance(self.network, str | os.PathLike):
            path = os.fspath(self.network)
            if path not in OWN and not path.endswith(".onnx"):
                raise TypeError(
                    f"`teacher` as a path must be an ONNX file, got {path!r}. A checkpoint holds weights and no "
                    "network: give `Teacher(network, checkpoint=path)`."
                )
        elif not callable(self.network):
            raise TypeError(
                f"`teacher` must be an nn.Module, a callable, the path of an ONNX file, "
                f'"self" or "ema", got {type(self.network).__name__}.'
            )
        if self.checkpoint is not None:
            if not isinstance(self.network, nn.Module):
                raise ValueError("`checkpoint` holds the weights of an nn.Module: give that as the network.")
            load_weights(self.network, self.checkpoint)

    def made(self) -> FrozenTeacher:
        """Return what answers."""
        dtype = None if self.precision is None else _DTYPES[self.precision]
        if isinstance(self.network, nn.Module):
            return FrozenTeacher(self.network, self.transform, dtype)
        if isinstance(self.network, str | os.PathLike):
            if self.network in OWN:
                return OwnTeacher(self.decay if self.network == "ema" else None, self.transform, dtype)
            return FrozenTeacher(OnnxNetwork(self.network), self.transform, None)
        return FrozenTeacher(CallableNetwork(self.network), self.transform, dtype)


class CallableNetwork(nn.Module):
    """Any callable as a network without parameters.

    Args:
        function: Takes the student's inputs and returns the teacher's answer.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        return self.function(*args, **kwargs)


class OwnTeacher(FrozenTeacher):
    """The student itself, as it was when the run began, or the average of its weights over the run.

    Args:
        decay: Share of the old average that is kept in a step; None for the student as it was.
        transform: See `Teacher`.
        dtype: See `FrozenTeacher`.
    """

    def __init__(
        self, decay: float | None, transform: Callable[..., Any] | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(nn.Identity(), transform, dtype)
        self.decay = decay
        self.has_begun = False
        self._n_updates = 0
        self._saved: dict[str, Tensor] | None = None

    def begin(self, network: nn.Module) -> None:
        """Take over a copy of the student in float, with the weights of a checkpoint where one was loaded.

        Args:
            network: The copy, which becomes the teacher's own.
        """
        if self.decay is not None:
            network = network.float()  # half precision would round small steps of the average away
        if self._saved is not None:
            network.load_state_dict(self._saved)
        self.release()
        self.network = self._runner = network
        self.freeze()
        self.has_begun, self._saved = True, None

    def forget(self) -> None:
        """Begin anew with the next run."""
        self.release()
        self.network = self._runner = nn.Identity()
        self.has_begun, self._n_updates, self._saved = False, 0, None

    @torch.no_grad()
    def follow(self, student: nn.Module) -> None:
        """Take the student's weights after a step into the average; buffers are taken over as they are."""
        if self.decay is None or not self.has_begun:
            return
        self._n_updates += 1
        decay = min(self.decay, (1 + self._n_updates) / (10 + self._n_updates))
        for mine, theirs in zip(self.network.parameters(), student.parameters(), strict=True):
            mine.lerp_(theirs.to(mine.device, mine.dtype), 1.0 - decay)
        for buffer, value in zip(self.network.buffers(), student.buffers(), strict=True):
            buffer.copy_(value)
        if self._runner is not self.network:  # it answers in another precision
            self._runner.load_state_dict(self.network.state_dict())

    def save(self) -> dict[str, Any]:
        """Return its weights, as CPU tensors."""
        if self._saved is not None:
            return {"weights": self._saved, "updates": self._n_updates}
        if not self.has_begun:
            return {}
        weights = {name: tensor.detach().cpu().clone() for name, tensor in self.network.state_dict().items()}
        return {"weights": weights, "updates": self._n_updates}

    def load(self, saved: Mapping[str, Any]) -> None:
        """Take over what `save` returned, for the time when `begin` gives a network."""
        self.forget()
        if saved:
            self._saved, self._n_updates = dict(saved["weights"]), saved["updates"]


class TeacherEnsemble:
    """One teacher or several as one: their logits are averaged, their features stay apart.

    Args:
        teachers: At least one.

    Raises:
        ValueError: If there is none.

    Example:
        >>> ensemble = TeacherEnsemble([Teacher(nn.Identity()), Teacher(nn.ReLU(), weight=3.0)])
        >>> ensemble.answer([torch.tensor([[-4.0]])], {}, select=lambda output: output).output
        tensor([[-1.]])
    """

    def __init__(self, teachers: Sequence[Teacher]) -> None:
        if not teachers:
            raise ValueError("There must be at least one teacher, got none.")
        self.teachers = [teacher.made() for teacher in teachers]
        total = sum(teacher.weight for teacher in teachers)
        self._shares = [teacher.weight / total for teacher in teachers]

    def __deepcopy__(self, memo: dict[int, Any]) -> TeacherEnsemble:
        return self

    @property
    def own(self) -> list[OwnTeacher]:
        """Those that are the student itself."""
        return [teacher for teacher in self.teachers if isinstance(teacher, OwnTeacher)]

    def names(self, student: Sequence[str]) -> list[str]:
        """Return the names of all modules; where there are several teachers, each begins with its teacher's number.

        Args:
            student: Names of the student's, which are those of a teacher that is the student itself.
        """
        found: list[str] = []
        for number, teacher in enumerate(self.teachers):
            known = [name for name, _ in teacher.network.named_modules()]
            known = list(student) if isinstance(teacher, OwnTeacher) else known
            found += [f"{number}.{name}" for name in known] if self._are_several else known
        return found

    def identity(self) -> list[dict[str, Any]]:
        """Return what tells these teachers from others, as plain types.

        Raises:
            ValueError: If one of them may say something else of the same sample later.
        """
        found = []
        for teacher, share in zip(self.teachers, self._shares, strict=True):
            if isinstance(teacher, OwnTeacher):
                raise ValueError(
                    '"self" and "ema" are another teacher in every run and step: their answers cannot be kept. Train '
                    "without a cache."
                )
            if isinstance(teacher.network, CallableNetwork):
                raise ValueError(
                    "Nothing tells whether a callable gives the same answers in the next run, so they cannot be kept. "
                    "Give the teacher as an nn.Module or an ONNX file, or train without a cache."
                )
            found.append({**teacher.identity(), "share": share})
        return found

    def in_network(self, name: str, network: str) -> str:
        """Return a name as of `names` without that of the network, where it is that of the student's own module.

        Args:
            name: Name of a teacher's module.
            network: Name of the student's network in the module that holds it, which a copy of it has no more.
        """
        for number, teacher in enumerate(self.teachers):
            prefix = f"{number}." if self._are_several else ""
            if isinstance(teacher, OwnTeacher) and name.startswith(f"{prefix}{network}."):
                return prefix + name.removeprefix(f"{prefix}{network}.")
        return name

    @property
    def _are_several(self) -> bool:
        return len(self.teachers) > 1

    def freeze(self) -> None:
        """Freeze all, see `FrozenTeacher.freeze`."""
        for teacher in self.teachers:
            teacher.freeze()

    def release(self) -> None:
        """Give all back, see `FrozenTeacher.release`."""
        for teacher in self.teachers:
            teacher.release()

    def check_apart_from(self, student: nn.Module) -> None:
        """Check that no parameter is both a teacher's and the student's."""
        for teacher in self.teachers:
            teacher.check_apart_from(student)

    def move_to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Run all on ``device`` in ``dtype``, or their own, from now on."""
        for teacher in self.teachers:
            teacher.move_to(device, dtype)

    def tap(self, names: Sequence[str]) -> None:
        """Keep the outputs of these modules, named as by `names`, in every answer from now on."""
        for number, teacher in enumerate(self.teachers):
            prefix = f"{number}." if self._are_several else ""
            teacher.tap([name.removeprefix(prefix) for name in names if name.startswith(prefix)])

    def shapes(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of what all modules return for these inputs of the student; for a message."""
        found: dict[str, tuple[int, ...]] = {}
        for number, teacher in enumerate(self.teachers):
            prefix = f"{number}." if self._are_several else ""
            found |= {f"{prefix}{name}": shape for name, shape in teacher.shapes(args, kwargs).items()}
        return found

    def answer(self, args: Sequence[Any], kwargs: Mapping[str, Any], select: Callable[[Any], Tensor] | None) -> Answer:
        """Run every teacher once, see `FrozenTeacher.answer`.

        Raises:
            CompressionError: If the logits of several teachers have not one shape.
        """
        answers = {
            number: teacher.answer(args, kwargs, select)
            for number, teacher in enumerate(self.teachers)
            if teacher.is_asked(select)
        }
        if len(self.teachers) == 1:
            return answers[0]
        features: Features = {}
        for number, answer in answers.items():
            features |= {f"{number}.{name}": values for name, values in answer.features.items()}
        outputs = [answer.output for answer in answers.values() if answer.output is not None]
        if not outputs:
            return Answer(None, features)
        if len({output.shape for output in outputs}) > 1:
            shapes = ", ".join(str(tuple(output.shape)) for output in outputs)
            raise CompressionError(f"The teachers' logits must have one shape to be averaged, got {shapes}.")
        shares = [share * output.float() for share, output in zip(self._shares, outputs, strict=True)]
        return Answer(torch.stack(shares).sum(0), features)


def as_teachers(teacher: Any, checkpoint: str | os.PathLike[str] | None) -> list[Teacher]:
    """Return the teachers that a user's argument means.

    Args:
        teacher: A `Teacher`, what its first argument may be, or a list of these.
        checkpoint: A file with the weights of the one teacher.

    Raises:
        ValueError: If there is a checkpoint for several.

    Example:
        >>> [type(item.network).__name__ for item in as_teachers([nn.ReLU(), "self"], None)]
        ['ReLU', 'str']
    """
    if isinstance(teacher, list | tuple):
        if checkpoint is not None:
            raise ValueError("`teacher_checkpoint` is of one teacher. Give each a `Teacher(network, checkpoint=...)`.")
        return [item if isinstance(item, Teacher) else Teacher(item) for item in teacher]
    if isinstance(teacher, Teacher):
        if checkpoint is not None:
            raise ValueError("Give the checkpoint to the `Teacher`: `Teacher(network, checkpoint=...)`.")
        return [teacher]
    return [Teacher(teacher, checkpoint=checkpoint)]
