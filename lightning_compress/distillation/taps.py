"""Taps: the outputs of modules inside a network, by the modules' names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Features = dict[str, list[Tensor]]
"""What modules returned during one call of a network, by the name that was asked for, in the order of their calls."""


class FeatureTap:
    """Keeps what modules of a network return, between `clear` and `take`.

    Tensors are kept themselves, not copies. What comes next may write into them, as an in-place ReLU does after a
    batch norm: in the first call all are copied, and from then on those that were seen to be overwritten.

    Args:
        network: The network; copies and pickles of it have hooks that keep nothing.
        names: Names of its modules, as of ``named_modules()``; ``"name[0]"`` and ``"name[key]"`` for one of several
            tensors that a module returns.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 3), nn.ReLU(inplace=True))
        >>> tap = FeatureTap(network, ["0"])
        >>> tap.clear()
        >>> output = network(torch.ones(1, 2))
        >>> {name: [feature.shape for feature in features] for name, features in tap.take().items()}
        {'0': [torch.Size([1, 3])]}
        >>> tap.remove()
    """

    def __init__(self, network: nn.Module, names: Iterable[str]) -> None:
        self._log = _FeatureLog()
        self._handles: list[RemovableHandle] = []
        for name in dict.fromkeys(names):
            module = network.get_submodule(split_name(name)[0])
            self._handles.append(module.register_forward_hook(FeatureEar(self._log, name).hear))

    def clear(self) -> None:
        """Forget what was kept, and keep from now on."""
        self._log.kept.clear()
        self._log.is_listening = True

    def take(self) -> Features:
        """Return what was kept since `clear`, and keep nothing from now on."""
        log, found = self._log, Features()
        for kept in log.kept:
            if _version(kept.tensor) != kept.version:
                log.overwritten.add(kept.name)
            is_changed = kept.name in log.overwritten and kept.copy is not None
            found.setdefault(kept.name, []).append(kept.copy if is_changed and kept.copy is not None else kept.tensor)
        log.is_first = log.is_first and not log.kept
        self.stop()
        return found

    def stop(self) -> None:
        """Forget what was kept, and keep nothing from now on."""
        self._log.kept.clear()
        self._log.is_listening = False

    def remove(self) -> None:
        """Take every hook away; the tap is of no use afterwards."""
        self.stop()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


@dataclass
class _Kept:
    name: str
    tensor: Tensor
    version: int
    copy: Tensor | None


@dataclass
class _FeatureLog:
    """What the hooks of one tap have kept; a copy is deaf."""

    is_copy: bool = False
    is_listening: bool = False
    is_first: bool = True
    kept: list[_Kept] = field(default_factory=list)
    overwritten: set[str] = field(default_factory=set)

    def __reduce__(self) -> tuple[type[_FeatureLog], tuple[bool]]:
        return _FeatureLog, (True,)


@dataclass(frozen=True)
class FeatureEar:
    """The hook of one module.

    Args:
        log: Where it keeps what it hears.
        name: The name that was asked for.
    """

    log: _FeatureLog
    name: str

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def hear(self, module: nn.Module, args: Any, output: Any) -> None:
        """Keep the output."""
        if not self.log.is_listening:
            return
        tensor = _entry(output, self.name)
        must_copy = self.log.is_first or self.name in self.log.overwritten
        self.log.kept.append(_Kept(self.name, tensor, _version(tensor), tensor.clone() if must_copy else None))


def _version(tensor: Tensor) -> int:
    """Return how often a tensor was written into; of one of inference mode nobody counts."""
    return 0 if tensor.is_inference() else tensor._version


def split_name(name: str) -> tuple[str, str | None]:
    """Return the name of a module, and which of its tensors is meant.

    Example:
        >>> split_name("layer3"), split_name("encoder.0[hidden]")
        (('layer3', None), ('encoder.0', 'hidden'))
    """
    match = re.fullmatch(r"(.*)\[(\w+)\]", name)
    return (match[1], match[2]) if match else (name, None)


def _entry(output: Any, name: str) -> Tensor:
    key = split_name(name)[1]
    found = output
    if key is not None:
        is_row = isinstance(output, Sequence) and key.isdigit() and int(key) < len(output)
        found = (
            output[int(key)]
            if is_row
            else output.get(key)
            if isinstance(output, Mapping)
            else getattr(output, key, None)
        )
    if isinstance(found, Tensor):
        return found
    if isinstance(output, Mapping):
        keys = [str(key) for key, value in output.items() if isinstance(value, Tensor)]
    elif isinstance(output, Sequence):
        keys = [str(index) for index, value in enumerate(output) if isinstance(value, Tensor)]
    else:
        keys = []
    known = ", ".join(f'"{split_name(name)[0]}[{key}]"' for key in keys) or "none that could be named"
    raise TypeError(f"`{name}` returns a {type(output).__name__} and not one tensor. Its tensors are: {known}.")


def paired_names(
    pairs: Mapping[str, str], student: Iterable[str], teacher: Iterable[str], owner: str
) -> dict[str, str]:
    """Return the modules of a student and of a teacher that pairs of names, or patterns of them, mean.

    Args:
        pairs: The student's name to the teacher's; a ``*`` stands for any part of a name between two dots, and the
            teacher's name gets the same parts.
        student: Names of the student's modules.
        teacher: Names of the teacher's modules.
        owner: Whose pairs they are, for the message.

    Raises:
        ValueError: If a name is none of a module, or a pattern matches none.

    Example:
        >>> student, teacher = ["blocks.0", "blocks.1"], ["layers.0.out", "layers.1.out"]
        >>> paired_names({"blocks.*": "layers.*.out"}, student, teacher, "FeatureDistillation")
        {'blocks.0': 'layers.0.out', 'blocks.1': 'layers.1.out'}
    """
    student, teacher = list(student), list(teacher)
    found: dict[str, str] = {}
    for mine, theirs in pairs.items():
        (name, key), (their_name, their_key) = split_name(mine), split_name(theirs)
        if name.count("*") != their_name.count("*"):
            raise ValueError(f"`{owner}` pairs {mine!r} with {theirs!r}: both need as many `*`.")
        pattern = re.compile(re.escape(name).replace(r"\*", r"([^.]+)"))
        matches = [match for known in student if (match := pattern.fullmatch(known))]
        if not matches:
            raise ValueError(_unknown(owner, "student", name, student))
        for match in matches:
            parts = iter(match.groups())
            partner = "".join(next(parts) if piece == "*" else piece for piece in re.split(r"(\*)", their_name))
            if partner not in teacher:
                raise ValueError(_unknown(owner, "teacher", partner, teacher))
            found[_joined(match[0], key)] = _joined(partner, their_key)
    return found


def _joined(name: str, key: str | None) -> str:
    return name if key is None else f"{name}[{key}]"


def _unknown(owner: str, whose: str, name: str, known: Sequence[str]) -> str:
    known = [item for item in known if item]
    near = get_close_matches(name, known, n=5, cutoff=0.4) or known[:12]
    listed = ", ".join(f"`{item}`" for item in near) or "none"
    return f"`{owner}` names the {whose}'s module `{name}`, which it does not have. The nearest names are: {listed}."


def output_shapes(network: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Run a network and return the shapes of what its modules return, by name; for a message.

    Example:
        >>> output_shapes(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), [torch.ones(1, 2)], {})
        {'0': (1, 3), '1': (1, 3)}
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def listen(name: str) -> Any:
        def hear(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                shapes.setdefault(name, tuple(output.shape))

        return hear

    modules = {name: module for name, module in network.named_modules() if name}
    handles = [
        module.register_forward_hook(listen(name))
        for name, module in modules.items()
        if not isinstance(module, torch.jit.ScriptModule)
    ]
    try:
        with torch.no_grad():
            network(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: shapes[name] for name in modules if name in shapes}
