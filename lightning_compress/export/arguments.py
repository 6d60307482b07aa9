"""The arguments of a forward as an ONNX file sees them: flat tensors with names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.graph import forward_signature


@dataclass(frozen=True)
class CallArguments:
    """Positional and keyword arguments of one forward.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


Inputs = Tensor | Sequence[Any] | Mapping[str, Any] | CallArguments
"""Inputs of a forward: one tensor, positional arguments, keyword arguments, or both."""


def as_arguments(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return ``inputs`` as positional and keyword arguments on the CPU.

    Example:
        >>> as_arguments({"x": 1}), as_arguments((1, 2))
        (((), {'x': 1}), ((1, 2), {}))
    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(inputs, CallArguments):
        args, kwargs = inputs.args, dict(inputs.kwargs)
    elif isinstance(inputs, Mapping):
        kwargs = dict(inputs)
    elif isinstance(inputs, Tensor):
        args = (inputs,)
    else:
        args = tuple(inputs)
    know_records((args, kwargs))
    found: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(
        Tensor,
        lambda tensor: plain_tensor(tensor).clone(),  # the network may overwrite what it is given
        (args, kwargs),
    )
    return found


def know_records(value: Any) -> None:
    """Let torch take every dataclass in ``value`` as a container of its fields, as it takes tuples and dicts.

    Args:
        value: Arguments or results of a forward, nested at will.

    Example:
        >>> @dataclass
        ... class Pair:
        ...     mean: Tensor
        ...     deviation: Tensor
        >>> know_records([Pair(torch.zeros(1), torch.ones(1))])
        >>> pytree.tree_leaves(Pair(torch.zeros(1), torch.ones(1)))
        [tensor([0.]), tensor([1.])]
    """
    for leaf in pytree.tree_leaves(value):
        if is_dataclass(leaf) and not isinstance(leaf, type):
            torch.export.register_dataclass(type(leaf))
            know_records([getattr(leaf, field.name) for field in fields(leaf)])


def plain_tensor(tensor: Tensor) -> Tensor:
    """Return ``tensor`` without gradient, on the CPU, in float32 where it is floating-point."""
    tensor = tensor.detach().cpu()
    return tensor.float() if tensor.is_floating_point() else tensor


def tensors_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors of a call in the order of the file's inputs.

    Example:
        >>> [tensor.item() for tensor in tensors_of((torch.tensor(1), None), {"x": [torch.tensor(2)]})]
        [1, 2]
    """
    return [leaf for leaf in pytree.tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]


def at_least_two_samples(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a call with a batch of one doubled: the exporter would take a one for a constant of the model.

    Example:
        >>> args, _ = at_least_two_samples((torch.zeros(1, 3),), {})
        >>> args[0].shape
        torch.Size([2, 3])
    """
    if any(tensor.dim() and tensor.shape[0] != 1 for tensor in tensors_of(args, kwargs)):
        return args, kwargs
    doubled: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(
        Tensor, lambda tensor: torch.cat([tensor, tensor]) if tensor.dim() else tensor, (args, kwargs)
    )
    return doubled


def names_of_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[str]:
    """Return a name for each tensor of a call, after the parameters of the model's forward.

    Example:
        >>> names_of_inputs(nn.Linear(2, 2), (torch.zeros(1, 2),), {})
        ['input']
    """
    parameters = list(forward_signature(model).parameters)
    positional = [*parameters[: len(args)], *[f"input_{index}" for index in range(len(parameters), len(args))]]
    names: list[str] = []
    for name, value in [*zip(positional, args, strict=False), *kwargs.items()]:
        names += _leaf_names(name, value)
    return names


def names_of_outputs(outputs: Any) -> list[str]:
    """Return a name for each tensor that a forward returned, after the keys or fields where it has such.

    Example:
        >>> names_of_outputs({"logits": torch.zeros(1)}), names_of_outputs((torch.zeros(1), torch.zeros(1)))
        (['logits'], ['output_0', 'output_1'])
    """
    named = _entries(outputs)
    if named is None:
        return _leaf_names("output", outputs)
    return [name for key, value in named.items() for name in _leaf_names(key, value)]


def _leaf_names(name: str, value: Any) -> list[str]:
    named = _entries(value)
    if named is not None:
        return [leaf for key, item in named.items() for leaf in _leaf_names(f"{name}.{key}", item)]
    leaves = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    return [name] if len(leaves) == 1 else [f"{name}_{index}" for index in range(len(leaves))]


def _entries(value: Any) -> dict[str, Any] | None:
    """Return the entries of a dict, or the fields of a dataclass, by name; None for anything else."""
    if isinstance(value, Mapping):
        return {str(key): item for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return None
