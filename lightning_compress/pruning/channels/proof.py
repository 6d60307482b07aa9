"""The proof of channel groups: a network without some of their channels computes what it computes with zeros there."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.pruning.channels.narrowing import narrow_
from lightning_compress.pruning.channels.outputs import output_tensors, same_random_numbers
from lightning_compress.pruning.channels.places import ChannelGroup, record_of, removed_places

TOLERANCE = 1e-9
"""Largest difference, relative to the largest output, of a masked and a removed network that compute in float64."""

TOLERANCE_FLOAT32 = 1e-4
"""The same for a network that cannot compute in float64."""

SHARES_TRIED = (0.5, 0.1, 0.9)
"""Shares of the channels of which random numbers are removed to see whether a network still computes the same."""


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
    failures = (_failure_of(model, args, kwargs, groups, share) for share in SHARES_TRIED if groups)
    return next((failure for failure in failures if failure is not None), None)


@torch.no_grad()
def _failure_of(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], groups: Sequence[ChannelGroup], share: float
) -> str | None:
    generator = torch.Generator().manual_seed(0)
    kept = [_some_units(group, generator, share) for group in groups]

    def mask_(network: nn.Module) -> None:
        for place in removed_places(network, groups, kept):
            place.clear_(network.get_parameter(place.parameter))

    def remove_(network: nn.Module) -> None:
        narrow_(network, record_of(model, groups, kept))

    results = []
    for change_ in (mask_, remove_):
        changed = copy.deepcopy(model)
        try:
            change_(changed)
            with same_random_numbers():
                results.append(list(output_tensors(changed(*copy.deepcopy(args), **copy.deepcopy(kwargs)))))
        except Exception as error:  # user code may raise anything
            return f"without some of them the forward fails: {first_line(error)}"
        del changed  # one copy at a time, for the largest networks
    expected, found = results
    if not expected or len(expected) != len(found):
        return "the output holds no tensors that could be compared"
    is_double = any(parameter.dtype == torch.float64 for parameter in model.parameters())
    tolerance = TOLERANCE if is_double else TOLERANCE_FLOAT32
    for one, other in zip(expected, found, strict=True):
        if one.shape != other.shape:
            return "without some of them the output has another shape"
        largest = float(one.abs().max()) if one.numel() else 0.0
        if one.is_floating_point() and not bool(((one - other).abs() <= tolerance * max(largest, 1e-30)).all()):
            return "without some of them the model does not compute what it computes with zeros in their place"
    return None


def _some_units(group: ChannelGroup, generator: torch.Generator, share: float) -> Tensor:
    """Return a random choice of units that stay, as many of each block; up to ``share`` of them goes."""
    kept = torch.zeros(group.n_units, dtype=torch.bool)
    blocks = torch.zeros(group.n_units, dtype=torch.long) if group.blocks is None else group.blocks
    size = group.n_units // group.n_blocks
    n_kept = size - int(torch.randint(1, max(2, int(size * share) + 1), (), generator=generator))
    for block in range(group.n_blocks):
        units = (blocks == block).nonzero().flatten()
        kept[units[torch.randperm(len(units), generator=generator)[: max(1, n_kept)]]] = True
    return kept
