"""Groups of channels whose filters become one: which go together, and how near they are to their mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

Over = Literal["inputs", "outputs"]
"""Whether input or output channels of a layer share their filters."""

OVERS: tuple[Over, ...] = get_args(Over)

Grouping = Literal["similar", "consecutive"]
"""How channels are put into groups."""

GROUPINGS: tuple[Grouping, ...] = get_args(Grouping)

MOST_COMPARED = 2048
"""Channels that are compared with one another at once; of wider layers so many neighbours at a time."""

Groups = list[list[int]]
"""Channels of each group, all of them once; only the last group may be smaller."""


def dim_of(over: Over) -> int:
    """Return the dimension of a weight along which its channels lie.

    Example:
        >>> dim_of("inputs"), dim_of("outputs")
        (1, 0)
    """
    return 1 if over == "inputs" else 0


def consecutive_groups(n_channels: int, size: int) -> Groups:
    """Return groups of neighbours.

    Example:
        >>> consecutive_groups(5, 2)
        [[0, 1], [2, 3], [4]]
    """
    return [list(range(first, min(first + size, n_channels))) for first in range(0, n_channels, size)]


def similar_groups(filters: Tensor, size: int) -> Groups:
    """Return groups of equal size in which the filters are near to one another.

    A group begins with the two nearest of the filters that are left, and takes in the one that is nearest to its mean
    until it is full; those left over at the end are the last group. Equal distances are decided by position, so that
    every process finds the same groups.

    Args:
        filters: One row for each channel, finite.
        size: Channels of a group, at least 2.

    Returns:
        The groups in the order of their first channels, but for a smaller one, which comes last.

    Example:
        >>> similar_groups(torch.tensor([[0.0], [5.0], [5.5], [0.1], [9.0]]), 2)
        [[0, 3], [1, 2], [4]]
    """
    filters = filters.detach().cpu().double()
    found: Groups = []
    for first in range(0, len(filters), MOST_COMPARED):
        part = filters[first : first + MOST_COMPARED]
        found += [[first + channel for channel in group] for group in _nearest(part, size)]
    full = [group for group in found if len(group) == size]
    rest = [channel for group in found if len(group) < size for channel in group]
    return full + [[rest[n] for n in group] for group in consecutive_groups(len(rest), size)]


def _nearest(filters: Tensor, size: int) -> Groups:
    n_channels = len(filters)
    distances = torch.cdist(filters, filters)
    rows, columns = torch.triu_indices(n_channels, n_channels, offset=1)
    nearest_first = distances[rows, columns].argsort(stable=True)
    squares = distances.square_()
    taken = [False] * n_channels
    groups: Groups = []
    for one, other in zip(rows[nearest_first].tolist(), columns[nearest_first].tolist(), strict=True):
        if len(groups) == n_channels // size:
            break
        if taken[one] or taken[other]:
            continue
        group = [one, other]
        taken[one] = taken[other] = True
        while len(group) < size:
            # The nearest to the mean has the smallest sum of squared distances to the members.
            sums = squares[group].sum(0).masked_fill_(torch.tensor(taken), torch.inf)
            group.append(int(sums.argmin()))
            taken[group[-1]] = True
        groups.append(sorted(group))
    rest = [channel for channel, is_taken in enumerate(taken) if not is_taken]
    return sorted(groups) + ([rest] if rest else [])


def stacked(groups: Sequence[Sequence[int]], device: torch.device | None = None) -> list[Tensor]:
    """Return the channels of the groups as tensors of one group a row: the full ones, and the smaller one if any.

    Example:
        >>> stacked([[0, 3], [1, 2], [4]])
        [tensor([[0, 3],
                [1, 2]]), tensor([[4]])]
    """
    sizes = dict.fromkeys(len(group) for group in groups)
    return [torch.tensor([group for group in groups if len(group) == size], device=device) for size in sizes]


@torch.no_grad()
def draw_together_(tensor: Tensor, dim: int, groups: Sequence[Tensor], pull: float = 1.0) -> None:
    """Move every filter towards the mean of its group, W = 1/R (w_1 + ... + w_R), in place.

    Filters that are equal stay as they are, to the bit.

    Args:
        tensor: A weight, or a tensor like it.
        dim: The dimension of its channels.
        groups: As of `stacked`, on the tensor's device.
        pull: Which part of the way, in [0, 1]; at 1 the filters of a group are one.

    Example:
        >>> weight = torch.tensor([[0.0, 2.0], [1.0, 3.0]])
        >>> draw_together_(weight, 0, stacked([[0, 1]]), pull=0.5)
        >>> weight
        tensor([[0.2500, 2.2500],
                [0.7500, 2.7500]])
    """
    precise = torch.promote_types(tensor.dtype, torch.float32)
    for rows in groups:
        nth_channels = list(rows.T.contiguous())  # the first of every group, the second, ...
        members = [tensor.index_select(dim, channels).to(precise) for channels in nth_channels]
        # By what they differ from one of them: filters that are equal stay as they are, whatever rounds.
        mean = members[0] + sum(member - members[0] for member in members[1:]) / len(members)
        for channels, member in zip(nth_channels, members, strict=True):
            moved = mean if pull == 1.0 else torch.lerp(member, mean, pull)
            tensor.index_copy_(dim, channels, moved.to(tensor.dtype))


@torch.no_grad()
def spread(tensor: Tensor, dim: int, groups: Sequence[Tensor]) -> float:
    """Return the root mean square of what the filters differ by from the mean of their group.

    Example:
        >>> spread(torch.tensor([[0.0, 2.0], [1.0, 3.0]]), 0, stacked([[0, 1]]))
        0.5
    """
    together = tensor.detach().clone()
    draw_together_(together, dim, groups)
    return float((tensor.detach() - together).float().square().mean().sqrt())
