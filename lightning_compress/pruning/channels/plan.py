"""Channel plans: how many units of each group stay, so that a share of the cost remains."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_compress.errors import CompressionError
from lightning_compress.pruning.channels.attention import head_parts
from lightning_compress.pruning.channels.places import ChannelGroup, channels_of

Scope = Literal["global", "layer"]
"""How groups compare: units of all groups by their importance, or every group to the same share."""

TOLERANCE = 0.01
"""How far, as a share of the whole cost, a plan may end from its target."""

SIDES = ("out", "in", "both", "heads")

LEAST_STEPS = 4
"""A group of few units is rounded more finely, so that it can take at least so many widths."""


@dataclass(frozen=True)
class _Term:
    """The cost of one layer: a product over its sides of the share of their channels that stays.

    Args:
        cost: What it costs with all channels.
        sides: For each side, the share of its channels that belongs to each group, by the group's number.
    """

    cost: float
    sides: tuple[Mapping[int, float], ...]

    def __call__(self, shares: Sequence[float]) -> float:
        found = self.cost
        for side in self.sides:
            found *= 1.0 - sum(part * (1.0 - shares[group]) for group, part in side.items())
        return found


class CostModel:
    """What a model costs when a share of the units of each group stays.

    Args:
        model: The model with all its channels.
        groups: Its groups.
        costs: Multiply-accumulates of every convolution and linear layer, by name; None to count parameters.
        total: Multiply-accumulates of the whole model, at least those of its layers; what is over stays.

    Attributes:
        total: What the model costs with all channels.

    Example:
        >>> from lightning_compress.pruning.channels.groups import find_channel_groups
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> found = find_channel_groups(net, [torch.rand(1, 2)])
        >>> cost = CostModel(net, found.groups, found.costs)
        >>> cost.total, cost([0.5])
        (12.0, 6.0)
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[ChannelGroup],
        costs: Mapping[str, float] | None,
        total: float | None = None,
    ) -> None:
        parts: dict[tuple[str, str], dict[int, float]] = {}
        modules = dict(model.named_modules())
        parameters = dict(model.named_parameters())
        for number, group in enumerate(groups):
            for member in group.members:
                module, parameter = modules.get(member.module), parameters.get(member.module)
                share = len(member.channels) / channels_of(module, parameter, member.side)
                parts.setdefault((member.module, member.side), {})[number] = share
        heads = {
            f"{name}.{part.parameter}": (name, side)
            for name, side in parts
            if side == "heads"
            for part in head_parts(modules[name])
        }
        terms = []
        if costs is not None:
            for name, cost in costs.items():
                keys = [*((name, side) for side in SIDES), heads.get(f"{name}.weight", ("", ""))]
                terms.append(_Term(cost, tuple(parts[key] for key in keys if key in parts)))
            self.total = float(sum(costs.values()) if total is None else max(total, sum(costs.values())))
        else:
            seen: set[int] = set()
            for name, parameter in parameters.items():
                owner, _, own_name = name.rpartition(".")
                sides = tuple(
                    part
                    for (module, side), part in parts.items()
                    if module == name
                    or heads.get(name) == (module, side)
                    or (side != "heads" and module == owner and (own_name == "weight" or side != "in"))
                )
                if id(parameter) not in seen:
                    terms.append(_Term(parameter.numel(), sides))
                seen.add(id(parameter))
            self.total = float(sum(term.cost for term in terms))
        self._terms = terms
        self._rest = self.total - sum(term.cost for term in terms)
        self._of_group = [
            [term for term in terms if any(number in side for side in term.sides)] for number in range(len(groups))
        ]

    def __call__(self, shares: Sequence[float]) -> float:
        """Return the cost when these shares of the groups' units stay."""
        return self._rest + sum(term(shares) for term in self._terms)

    def saved(self, shares: Sequence[float], group: int, share: float) -> float:
        """Return what is saved when the share of one group becomes ``share``."""
        fewer = list(shares)
        fewer[group] = share
        return sum(term(shares) - term(fewer) for term in self._of_group[group])


def widths(group: ChannelGroup, round_to: int, floor: float) -> list[int]:
    """Return how many units of a group may stay, most first.

    Args:
        group: The group.
        round_to: What the numbers are a multiple of; less for groups with fewer than four times as many units.
        floor: Least share of the units that stays, in (0, 1].

    Example:
        >>> group = ChannelGroup("conv", 64, ())
        >>> widths(group, 16, 0.1), widths(ChannelGroup("conv", 24, ()), 16, 0.3)
        ([64, 48, 32, 16], [24, 20, 16, 12, 8])
    """
    step = round_to
    while step > 1 and step * LEAST_STEPS > group.n_units:
        step //= 2
    step = math.lcm(step, group.n_blocks)
    least = max(group.n_blocks, math.ceil(floor * group.n_units - 1e-9))
    found = [count for count in range(step, group.n_units, step) if count >= least]
    return [group.n_units, *reversed(found)]


def plan_channels(
    groups: Sequence[ChannelGroup],
    scores: Mapping[str, Tensor],
    kept: Sequence[Tensor],
    cost: CostModel,
    target: float,
    *,
    final_target: float | None = None,
    scope: Scope = "global",
    round_to: int = 16,
    floors: Sequence[float] = (),
) -> list[Tensor]:
    """Choose which units stay, so that a share of the cost remains; what is removed already stays removed.

    The units with the least importance go first, as many at a time as the next width of their group takes. A step that
    would fall short of the target by more than 1 % of the whole cost is passed over; where no other is left, widths
    are rounded more finely.

    Args:
        groups: The groups.
        scores: Importance of every unit by group name.
        kept: Whether each unit is still there, for each group.
        cost: What the groups' widths cost.
        target: Share of the cost that remains, in (0, 1].
        final_target: Where the cost is to end later, if that is less: until then a wide step may go below ``target``.
        scope: ``"global"`` or ``"layer"``.
        round_to: What widths are a multiple of, see `widths`.
        floors: Least share of the units that stays, for each group; 0.1 where not given.

    Returns:
        For each group, whether each unit stays.

    Raises:
        CompressionError: If the floors leave more than the target.

    Example:
        >>> from lightning_compress.pruning.channels.groups import find_channel_groups
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> found = find_channel_groups(net, [torch.rand(1, 2)])
        >>> cost = CostModel(net, found.groups, found.costs)
        >>> scores = {"0": torch.tensor([4.0, 1.0, 2.0, 3.0])}
        >>> plan_channels(found.groups, scores, [torch.ones(4, dtype=torch.bool)], cost, 0.5)
        [tensor([ True, False, False,  True])]
    """
    floors = list(floors) or [0.1] * len(groups)
    counts = [int(mask.sum()) for mask in kept]
    orders = [
        group.ranked(torch.where(mask, scores[group.name], -torch.inf))
        for group, mask in zip(groups, kept, strict=True)
    ]
    goal, slack = target * cost.total, TOLERANCE * cost.total
    least = (target if final_target is None else min(target, final_target)) * cost.total - slack / 2
    step = round_to
    while True:
        ways = [widths(group, step, floor) for group, floor in zip(groups, floors, strict=True)]
        total = _descend(groups, orders, counts, ways, cost, goal, least, scores, scope)
        if total <= goal + slack or step == 1:
            break
        step //= 2
    if total > goal + slack:
        total = _come_near(groups, counts, ways, cost, goal)
    least_share = least_cost(groups, cost, 1, floors)
    if total > goal + slack and least_share > target:
        raise CompressionError(
            f"No more than {1 - least_share:.1%} of the cost can be removed, so that {least_share:.3f} remains, and "
            f"{target:.3f} was asked for. Lower `floor`, exclude fewer layers, or ask for more."
        )
    masks = []
    for group, order, count in zip(groups, orders, counts, strict=True):
        mask = torch.zeros(group.n_units, dtype=torch.bool)
        mask[order[:count]] = True
        masks.append(mask)
    return masks


def least_cost(groups: Sequence[ChannelGroup], cost: CostModel, round_to: int, floors: Sequence[float]) -> float:
    """Return the share of the cost that remains when every group is as narrow as it may be."""
    ways = [widths(group, round_to, floor) for group, floor in zip(groups, floors, strict=True)]
    return cost([way[-1] / group.n_units for way, group in zip(ways, groups, strict=True)]) / cost.total


def _descend(
    groups: Sequence[ChannelGroup],
    orders: Sequence[Tensor],
    counts: list[int],
    ways: Sequence[Sequence[int]],
    cost: CostModel,
    goal: float,
    least: float,
    scores: Mapping[str, Tensor],
    scope: Scope,
) -> float:
    """Lower ``counts`` step by step; return the cost that is reached."""
    shares = [count / group.n_units for count, group in zip(counts, groups, strict=True)]
    total = cost(shares)

    def candidate(number: int) -> tuple[float, int, int] | None:
        group, count = groups[number], counts[number]
        narrower = next((way for way in ways[number] if way < count), None)
        if narrower is None:
            return None
        if scope == "layer":
            return -count / group.n_units, number, narrower
        return float(scores[group.name][orders[number][narrower:count]].mean()), number, narrower

    heap = [found for number in range(len(groups)) if (found := candidate(number)) is not None]
    heapq.heapify(heap)
    while heap and total > goal:
        _, number, narrower = heapq.heappop(heap)
        share = narrower / groups[number].n_units
        saved = cost.saved(shares, number, share)
        if total - saved < least:
            continue  # too much: another group may fit
        counts[number], shares[number] = narrower, share
        total -= saved
        if (following := candidate(number)) is not None:
            heapq.heappush(heap, following)
    return total


def _come_near(
    groups: Sequence[ChannelGroup], counts: list[int], ways: Sequence[Sequence[int]], cost: CostModel, goal: float
) -> float:
    """Narrow one group after the other as long as that comes nearer to the goal; return the cost."""
    while True:
        shares = [count / group.n_units for count, group in zip(counts, groups, strict=True)]
        total = cost(shares)
        found = [
            (abs(total - cost.saved(shares, number, way / groups[number].n_units) - goal), number, way)
            for number, group_ways in enumerate(ways)
            for way in group_ways
            if way < counts[number]
        ]
        if not found or min(found)[0] >= abs(total - goal):
            return total
        _, number, way = min(found)
        counts[number] = way
