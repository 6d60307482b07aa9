"""The proof of channel groups: a network without some of their channels computes what it computes with zeros there."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.pruning.channels.narrowing import narrow_
from lightning_compress.pruning.channels.places import ChannelGroup, record_of, removed_places

TOLERANCE = 1e-9
"""Largest difference, relative to the largest output, of a masked and a removed network that compute in float64."""

SHARE_TRIED = 0.5
"""Share of the channels that are removed to see whether a network still runs and computes the same."""


def first_line(error: Exception) -> str:
    """Return the first line that an error says, as a sentence.

    Example:
        >>> first_line(ValueError("no such shape"))
        'no such shape.'
    """
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".") + "."


def proved(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    groups: list[ChannelGroup],
    left_alone: dict[str, str],
) -> list[ChannelGroup]:
    """Return the groups whose channels can be removed; the others' names get the reason."""
    failure = _failure(model, args, kwargs, groups)
    if failure is None:
        return groups
    if len(groups) == 1:
        left_alone.update({member.module: failure for member in groups[0].members if member.side != "in"})
        return []
    middle = len(groups) // 2
    halves = [proved(model, args, kwargs, half, left_alone) for half in (groups[:middle], groups[middle:])]
    found = [*halves[0], *halves[1]]
    if _failure(model, args, kwargs, found) is not None:  # each half runs, both together do not
        for group in halves[1]:
            left_alone[group.name] = "its removal breaks the forward together with that of other groups"
        return halves[0]
    return found


def _failure(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], groups: Sequence[ChannelGroup]
) -> str | None:
    """Return what goes wrong when channels of ``groups`` are removed, or None."""
    if not groups:
        return None
    generator = torch.Generator().manual_seed(0)
    kept = [_some_units(group, generator) for group in groups]
    masked, removed = copy.deepcopy(model), copy.deepcopy(model)
    try:
        with torch.no_grad():
            for place in removed_places(masked, groups, kept):
                place.clear_(masked.get_parameter(place.parameter))
            narrow_(removed, record_of(model, groups, kept))
            expected = [leaf for leaf in pytree.tree_leaves(masked(*args, **kwargs)) if isinstance(leaf, Tensor)]
            found = [leaf for leaf in pytree.tree_leaves(removed(*args, **kwargs)) if isinstance(leaf, Tensor)]
    except Exception as error:  # user code may raise anything
        return f"without some of them the forward fails: {first_line(error)}"
    for one, other in zip(expected, found, strict=True):
        if one.shape != other.shape:
            return "without some of them the output has another shape"
        largest = float(one.abs().max()) if one.numel() else 0.0
        if one.is_floating_point() and not bool(((one - other).abs() <= TOLERANCE * max(largest, 1e-30)).all()):
            return "without some of them the model does not compute what it computes with zeros in their place"
    return None


def _some_units(group: ChannelGroup, generator: torch.Generator) -> Tensor:
    """Return a random choice of units that stay, as many of each block."""
    kept = torch.zeros(group.n_units, dtype=torch.bool)
    blocks = torch.zeros(group.n_units, dtype=torch.long) if group.blocks is None else group.blocks
    size = group.n_units // group.n_blocks
    n_kept = size - int(torch.randint(1, max(2, int(size * SHARE_TRIED) + 1), (), generator=generator))
    for block in range(group.n_blocks):
        units = (blocks == block).nonzero().flatten()
        kept[units[torch.randperm(len(units), generator=generator)[: max(1, n_kept)]]] = True
    return kept
