"""The frozen teacher: a trained network that answers but never learns, held outside of every module tree."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.copying import copy_of
from lightning_compress.distillation.taps import Features, FeatureTap, output_shapes
from lightning_compress.errors import CompressionError


def load_weights(network: nn.Module, checkpoint: str | os.PathLike[str]) -> None:
    """Load trained weights into a teacher.

    Args:
        network: The teacher.
        checkpoint: A checkpoint of a Trainer, or a state dict that `torch.save` wrote; nothing but tensors and plain
            types is read. The network may be a part of what was saved, such as the ``network`` of a LightningModule.

    Raises:
        CompressionError: If the checkpoint does not hold all weights of ``network``.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> trained, network = nn.Sequential(nn.Linear(2, 3)), nn.Linear(2, 3)
        >>> with TemporaryDirectory() as folder:
        ...     torch.save(trained.state_dict(), f"{folder}/teacher.pt")
        ...     load_weights(network, f"{folder}/teacher.pt")
        >>> torch.equal(network.weight, trained[0].weight)
        True
    """
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CompressionError(
            f"{os.fspath(checkpoint)} holds more than tensors and plain types, which are all that is read: {error} "
            "Load it yourself where you trust it, and give the network alone."
        ) from error
    weights: Mapping[str, Any] = content.get("state_dict", content)
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    names = list(shapes)
    prefixes = ["", *(name.removesuffix(names[0]) for name in weights if name.endswith(f".{names[0]}"))]
    fitting = [
        prefix
        for prefix in prefixes
        if all(
            isinstance(found := weights.get(f"{prefix}{name}"), Tensor) and found.shape == shape
            for name, shape in shapes.items()
        )
    ]
    if len(fitting) > 1 and fitting[0] != "":
        raise CompressionError(
            f"{os.fspath(checkpoint)} holds {len(fitting)} networks that fit the teacher, a "
            f"`{type(network).__name__}`: {', '.join(f'`{prefix[:-1]}`' for prefix in fitting)}. Load the one you "
            "mean yourself, and give the network alone."
        )
    if fitting:
        network.load_state_dict({name: weights[f"{fitting[0]}{name}"] for name in names})
        return
    for prefix in prefixes:
        unlike = [name for name in names if f"{prefix}{name}" in weights]
        if len(unlike) == len(names):
            name = next(name for name in names if weights[f"{prefix}{name}"].shape != shapes[name])
            raise CompressionError(
                f"{os.fspath(checkpoint)} does not hold the weights of the teacher, a `{type(network).__name__}`: its "
                f"`{prefix}{name}` has the shape {tuple(weights[f'{prefix}{name}'].shape)} instead of "
                f"{tuple(shapes[name])}."
            )
    missing = next(name for name in names if name not in weights)
    raise CompressionError(
        f"{os.fspath(checkpoint)} does not hold the weights of the teacher, a `{type(network).__name__}`: it has no "
        f"`{missing}`. It begins with {', '.join(f'`{name}`' for name in list(weights)[:3])}."
    )


def identity_of(network: nn.Module) -> str:
    """Return a number that tells a teacher from others: of its class, its settings and its weights.

    Example:
        >>> identity_of(nn.ReLU()) == identity_of(nn.ReLU()), identity_of(nn.ReLU()) == identity_of(nn.Tanh())
        (True, False)
    """
    found = hashlib.sha256(repr(network).encode())
    for name, tensor in network.state_dict().items():
        found.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:32]


def identity_of_function(function: Callable[..., Any]) -> str:
    """Return what tells a function from others: its name, its code, and the values that it holds on to.

    Example:
        >>> first, second = lambda x: x[0], lambda x: x[1]
        >>> identity_of_function(first) == identity_of_function(second)
        False
    """
    name = getattr(function, "__qualname__", type(function).__qualname__)
    code = getattr(function, "__code__", None)
    if code is None:
        return re.sub(r" at 0x[0-9a-f]+", "", f"{name} {function!r} {getattr(function, '__dict__', {})}")
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    parts = [name, _identity_of_code(code), repr(getattr(function, "__defaults__", None)), repr(cells)]
    return re.sub(r" at 0x[0-9a-f]+", "", " ".join(parts))


def _identity_of_code(code: CodeType) -> str:
    constants = [_identity_of_code(item) if isinstance(item, CodeType) else repr(item) for item in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {constants}"


class Answer(NamedTuple):
    """What a teacher says of one batch.

    Attributes:
        output: The tensor that was selected from what it returned, or None where none was asked for.
        features: What its modules returned, by the name that was asked for.
    """

    output: Tensor | None
    features: Features


class FrozenTeacher:
    """A teacher between :meth:`freeze` and :meth:`release`: eval mode, no gradients, out of reach of the student.

    It is no ``nn.Module``, so a module that holds it does not register the teacher's parameters. A deep copy is the
    same teacher, not a second one.

    Args:
        network: The trained network; one of `torch.compile` runs compiled where no loss reads its modules.
        transform: Makes its positional inputs of the student's: a tensor, or a tuple of all.
        dtype: Floating-point type that it computes in, outside of autocast; that of the student by default.

    Raises:
        TypeError: If ``network`` is not an ``nn.Module``.

    Example:
        >>> network = nn.Linear(2, 3)
        >>> teacher = FrozenTeacher(network)
        >>> teacher.freeze()
        >>> network.training, network.weight.requires_grad
        (False, False)
        >>> teacher.release()
        >>> network.training, network.weight.requires_grad
        (True, True)
    """

    def __init__(
        self,
        network: nn.Module,
        transform: Callable[..., Any] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(network, nn.Module):
            raise TypeError(f"`teacher` must be an nn.Module, got {type(network).__name__}.")
        # What `torch.compile` made runs where nobody listens; modules are named and heard in the original.
        self.network: nn.Module = getattr(network, "_orig_mod", network)
        self._compiled = network if network is not self.network else None
        self._transform = transform
        self._dtype = dtype
        self._runner = self.network
        self._place: tuple[torch.device, torch.dtype] | None = None
        self._modes: dict[nn.Module, bool] | None = None
        self._flags: list[tuple[nn.Parameter, bool]] = []
        self._home: torch.device | None = None
        self._names: tuple[str, ...] = ()
        self._tap: FeatureTap | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenTeacher:
        return self

    def freeze(self) -> None:
        """Put the network into eval mode without gradients, remembering what it was; again is no change."""
        if self._modes is not None:
            return
        self._modes = {module: module.training for module in self.network.modules()}
        self._flags = [(parameter, parameter.requires_grad) for parameter in self.network.parameters()]
        self._home = next((parameter.device for parameter in self.network.parameters()), None)
        self.network.eval().requires_grad_(False)

    def release(self) -> None:
        """Give the network back as :meth:`freeze` found it: modes, gradients, device; again is no change."""
        self._untap()
        if self._modes is None:
            return
        for module, was_training in self._modes.items():
            module.training = was_training
        for parameter, required_grad in self._flags:
            parameter.requires_grad_(required_grad)
        if self._home is not None and self._place is not None:
            self.network.to(device=self._home)
        self._modes, self._flags, self._home = None, [], None
        self._runner, self._place = self.network, None

    def check_apart_from(self, student: nn.Module) -> None:
        """Check that no parameter is both the teacher's and the student's.

        Args:
            student: The module that is trained.

        Raises:
            ValueError: If teacher and student share a parameter, which freezing the teacher would freeze in both.

        Example:
            >>> FrozenTeacher(nn.Linear(2, 3)).check_apart_from(nn.Linear(2, 3))
        """
        students = {id(parameter): name for name, parameter in student.named_parameters()}
        for name, parameter in self.network.named_parameters():
            if id(parameter) in students:
                raise ValueError(
                    f"The teacher's parameter `{name}` is also the student's `{students[id(parameter)]}`: "
                    f"give `copy.deepcopy(teacher)`, and do not hold the teacher in the LightningModule."
                )

    def move_to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Run on ``device`` in ``dtype`` from now on.

        A network with tensors of another floating-point type is copied first: the user's weights keep their precision.

        Args:
            device: The student's device.
            dtype: The student's floating-point type.
        """
        dtype = self._dtype or dtype
        if self._place == (device, dtype):
            return
        self._untap()  # it may listen to another copy
        tensors = chain(self.network.parameters(), self.network.buffers())
        if any(tensor.is_floating_point() and tensor.dtype != dtype for tensor in tensors):
            self._runner = copy_of(self.network)
        else:
            self._runner = self.network
        self._runner.to(device=device, dtype=dtype)
        self._place = (device, dtype)

    def tap(self, names: Sequence[str]) -> None:
        """Keep the outputs of these modules in every `answer` from now on, see `FeatureTap`; () for none."""
        self._names = tuple(names)
        self._untap()

    def is_asked(self, select: Callable[[Any], Tensor] | None) -> bool:
        """Tell whether a loss reads anything of it."""
        return select is not None or bool(self._names)

    def _untap(self) -> None:
        if self._tap is not None:
            self._tap.remove()
            self._tap = None

    def answer(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], select: Callable[[Any], Tensor] | None = None
    ) -> Answer:
        """Run the teacher once and return what the losses want of it, which carries no gradient and is finite.

        Args:
            args: Positional inputs, as the student got them.
            kwargs: Keyword inputs, as the student got them.
            select: Takes the tensor out of the network's output; None where no loss reads it.

        Returns:
            Ordinary tensors: targets that may be saved for backward.

        Raises:
            ValueError: If a value is NaN or infinite.

        Example:
            >>> FrozenTeacher(nn.Flatten()).answer((torch.ones(1, 2, 1),), {}, select=lambda output: output).output
            tensor([[1., 1.]])
        """
        args, kwargs = self._inputs(args, kwargs)
        if self._names:
            return self._answer_with_features(args, kwargs, select)
        assert select is not None
        with torch.inference_mode(), self._own_precision():
            can_compile = self._compiled is not None and self._runner is self.network
            runner = self._compiled if can_compile else self._runner
            assert runner is not None
            selected = select(runner(*args, **kwargs))
            is_finite = bool(torch.isfinite(selected).all())
        if not is_finite:
            raise self._not_finite("")
        # Inference tensors cannot be saved for backward; a clone made outside of inference mode is ordinary.
        return Answer(selected.clone(), {})

    def _answer_with_features(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], select: Callable[[Any], Tensor] | None
    ) -> Answer:
        if self._tap is None:
            self._tap = FeatureTap(self._runner, self._names)
        # Not in inference mode: its tensors would all have to be copied.
        with torch.no_grad(), self._own_precision():
            self._tap.clear()
            output = self._runner(*args, **kwargs)
            features = self._tap.take()
            selected = None if select is None else select(output)
        found = {"": [selected] if selected is not None else [], **features}
        for name, tensors in found.items():
            if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
                raise self._not_finite(name)
        return Answer(selected, {name: [tensor.detach() for tensor in tensors] for name, tensors in features.items()})

    def identity(self) -> dict[str, Any]:
        """Return what tells this teacher from others, as plain types."""
        return {
            "network": identity_of(self.network),
            "transform": None if self._transform is None else identity_of_function(self._transform),
            "precision": None if self._dtype is None else str(self._dtype),
        }

    def shapes(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of what its modules return, see `output_shapes`."""
        with self._own_precision():
            return output_shapes(self._runner, *self._inputs(args, kwargs))

    def _inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Sequence[Any], Mapping[str, Any]]:
        """Return the teacher's inputs."""
        if self._transform is not None:
            with torch.no_grad():
                made = self._transform(*args)
            args = made if isinstance(made, tuple) else (made,)
        if self._dtype is None:
            return args, kwargs

        def cast(tensor: Tensor) -> Tensor:
            return tensor.to(self._dtype) if tensor.is_floating_point() else tensor

        cast_args, cast_kwargs = pytree.tree_map_only(Tensor, cast, (tuple(args), dict(kwargs)))
        return cast_args, cast_kwargs

    def _own_precision(self) -> AbstractContextManager[Any]:
        if self._dtype is None or self._place is None:
            return nullcontext()
        return torch.autocast(self._place[0].type, enabled=False)

    def _not_finite(self, name: str) -> ValueError:
        where = f" in `{name}`" if name else ""
        return ValueError(
            f"The teacher `{type(self.network).__name__}` returned NaN or infinite values{where}: "
            f"check its weights, and that its inputs are normalised as the student's are."
        )
