"""Places: where the channels of a group lie in the layers and parameters of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.pruning.channels.attention import head_parts
from lightning_compress.pruning.channels.narrowing import ChannelRecord, width


@dataclass(frozen=True)
class Member:
    """The channels of a group in one layer.

    Args:
        module: Name of the module, or of a bare parameter.
        side: ``"out"``, ``"in"`` or ``"both"``; ``"dim0"``, ``"dim1"``, ... of a bare parameter.
        units: The group's unit that each channel belongs to, shape (channels,).
        channels: The channels, shape (channels,), each once.
    """

    module: str
    side: str
    units: Tensor
    channels: Tensor


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that can only be removed together: a unit is one channel of every member, or several.

    Args:
        name: Name of the first layer that makes them.
        n_units: How many units it has.
        members: Where they lie.
        blocks: The block of each unit, where as many units of each block must stay; None where any may stay.
    """

    name: str
    n_units: int
    members: tuple[Member, ...]
    blocks: Tensor | None = None

    @property
    def n_blocks(self) -> int:
        """In how many blocks the units lie."""
        return 1 if self.blocks is None else int(self.blocks.max()) + 1

    def ranked(self, scores: Tensor) -> Tensor:
        """Return the units, the most important first; blocks take turns, so that as many of each are among the first.

        Args:
            scores: Importance of every unit.

        Example:
            >>> ChannelGroup("conv", 4, (), torch.tensor([0, 0, 1, 1])).ranked(torch.tensor([4.0, 3.0, 1.0, 2.0]))
            tensor([0, 3, 1, 2])
        """
        order = scores.argsort(descending=True, stable=True)
        if self.blocks is None:
            return order
        rows = [order[self.blocks[order] == block] for block in range(self.n_blocks)]
        # A row of the result holds the units of one rank: their blocks lose them together.
        return torch.stack(rows, 1).flatten()

    def save(self) -> dict[str, Any]:
        """Return the group as tensors and plain types."""
        return {
            "name": self.name,
            "n_units": self.n_units,
            "members": [
                {"module": m.module, "side": m.side, "units": m.units.int(), "channels": m.channels.int()}
                for m in self.members
            ],
            "blocks": None if self.blocks is None else self.blocks.int(),
        }

    @staticmethod
    def load(saved: Mapping[str, Any]) -> ChannelGroup:
        """Undo `save`."""
        members = tuple(
            Member(m["module"], m["side"], m["units"].cpu().long(), m["channels"].cpu().long())
            for m in saved["members"]
        )
        blocks = saved["blocks"]
        return ChannelGroup(saved["name"], saved["n_units"], members, None if blocks is None else blocks.cpu().long())


def record_of(model: nn.Module, groups: Sequence[ChannelGroup], kept: Sequence[Tensor]) -> ChannelRecord:
    """Return which channels of which layers stay.

    Args:
        model: The model with all its channels.
        groups: Its groups.
        kept: For each group, whether each unit stays: boolean, shape (units,).

    Example:
        >>> from lightning_compress.pruning.channels.groups import find_channel_groups
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> group = find_channel_groups(net, [torch.rand(1, 2)]).groups[0]
        >>> record_of(net, [group], [torch.tensor([True, False, True])])
        {'0': {'out': [0, 2]}, '2': {'in': [0, 2]}}
    """
    removed: dict[tuple[str, str], list[Tensor]] = {}
    for group, mask in zip(groups, kept, strict=True):
        if bool(mask.all()):
            continue
        for member in group.members:
            gone = member.channels[~mask.cpu()[member.units]]
            removed.setdefault((member.module, member.side), []).append(gone)
    record: ChannelRecord = {}
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    for (name, side), parts in removed.items():
        n_channels = channels_of(modules.get(name), parameters.get(name), side)
        stays = torch.ones(n_channels, dtype=torch.bool)
        stays[torch.cat(parts)] = False
        record.setdefault(name, {})[side] = stays.nonzero().flatten().tolist()
    return record


def channels_of(module: nn.Module | None, parameter: Tensor | None, side: str) -> int:
    """Return how many channels a layer has on one side, or a bare parameter along one dimension.

    Example:
        >>> channels_of(nn.Linear(2, 3), None, "out"), channels_of(None, torch.ones(4, 1), "dim0")
        (3, 4)
    """
    if parameter is not None:
        return parameter.shape[int(side.removeprefix("dim"))]
    assert module is not None
    return width(module, side)


@dataclass(frozen=True)
class Place:
    """Channels in one parameter.

    Args:
        parameter: Name of the parameter.
        rows: Which of its rows (along dimension 0) they lie in, as a slice's bounds; None for all.
        dim: Dimension along which they are counted.
        index: The channels, counted inside these rows.
    """

    parameter: str
    rows: tuple[int, int] | None
    dim: int
    index: Tensor

    def clear_(self, tensor: Tensor) -> None:
        """Set the channels to zero in ``tensor``, which has the parameter's shape, in place."""
        part = tensor.detach() if self.rows is None else tensor.detach()[self.rows[0] : self.rows[1]]
        part.index_fill_(self.dim, self.index.to(tensor.device), 0)


def removed_places(model: nn.Module, groups: Sequence[ChannelGroup], kept: Sequence[Tensor]) -> list[Place]:
    """Return where the removed channels lie: where they are made and where they are read.

    Once these are zeros, what reads a channel multiplies it by zero, so whatever a norm or an activation makes of it
    does not matter.

    Args:
        model: The model with all its channels.
        groups: Its groups.
        kept: For each group, whether each unit stays: boolean, shape (units,).

    Example:
        >>> from lightning_compress.pruning.channels.groups import find_channel_groups
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> group = find_channel_groups(net, [torch.rand(1, 2)]).groups[0]
        >>> removed = removed_places(net, [group], [torch.tensor([True, False, True])])
        >>> [(place.parameter, place.dim, place.index.tolist()) for place in removed]
        [('0.weight', 0, [1]), ('0.bias', 0, [1]), ('2.weight', 1, [1])]
    """
    found: dict[tuple[str, tuple[int, int] | None, int], list[Tensor]] = {}
    for group, mask in zip(groups, kept, strict=True):
        if bool(mask.all()):
            continue
        for member in group.members:
            gone = member.channels[~mask.cpu()[member.units]]
            for place in places(model, member, gone):
                found.setdefault((place.parameter, place.rows, place.dim), []).append(place.index)
    return [Place(*key, torch.cat(parts).sort().values) for key, parts in found.items()]


def places(model: nn.Module, member: Member, channels: Tensor) -> list[Place]:
    """Return the parameters in which channels of a member lie.

    Args:
        model: The model with all its channels.
        member: A member of one of its groups.
        channels: Some of its channels.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2))
        >>> member = Member("0", "in", torch.arange(4), torch.arange(4))
        >>> [(place.rows, place.dim, place.index.tolist()) for place in places(net, member, torch.tensor([1, 2]))]
        [((0, 2), 1, [1]), ((2, 4), 1, [0])]
    """
    if len(channels) == 0:
        return []
    if member.side.startswith("dim"):
        return [Place(member.module, None, int(member.side.removeprefix("dim")), channels)]
    module: Any = model.get_submodule(member.module)
    if member.side == "heads":
        return [
            Place(f"{member.module}.{part.parameter}", None, part.dim, part.index[channels].flatten())
            for part in head_parts(module)
        ]
    own = {name for name, _ in module.named_parameters(recurse=False)}
    found = []
    if "weight" in own:
        n_groups, is_transposed = getattr(module, "groups", 1), getattr(module, "transposed", False)
        dim = 0 if member.side == "both" else int((member.side == "in") != is_transposed)
        if n_groups == 1 or dim == 0:
            found.append(Place(f"{member.module}.weight", None, dim, channels))
        else:
            per_group, n_rows = width(module, member.side) // n_groups, len(module.weight) // n_groups
            for group in range(n_groups):
                local = channels[channels // per_group == group] - group * per_group
                if len(local):
                    rows = (group * n_rows, (group + 1) * n_rows)
                    found.append(Place(f"{member.module}.weight", rows, dim, local))
    if "bias" in own and member.side != "in":
        found.append(Place(f"{member.module}.bias", None, 0, channels))
    return found


def unread_units(model: nn.Module, group: ChannelGroup) -> Tensor:
    """Return which units of a group no layer reads: all weights that would are zeros. Boolean, shape (units,).

    Example:
        >>> from lightning_compress.pruning.channels.groups import find_channel_groups
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> with torch.no_grad():
        ...     net[2].weight[0, 1] = 0
        >>> unread_units(net, find_channel_groups(net, [torch.rand(1, 2)]).groups[0])
        tensor([False,  True, False])
    """
    is_read = torch.zeros(group.n_units, dtype=torch.bool)
    for member in group.members:
        if member.side in ("in", "heads"):
            largest = channel_sums(model.get_submodule(member.module), member.side, torch.abs, reads_alone=True)
            is_read[member.units[largest[member.channels] != 0]] = True
    return ~is_read


def channel_sums(layer: nn.Module, side: str, measure: Callable[[Tensor], Tensor], reads_alone: bool = False) -> Tensor:
    """Return the sum of a measure of the weights over each channel of a convolution or linear layer, or each head.

    Args:
        layer: The layer.
        side: ``"out"``, ``"in"``, ``"both"`` or ``"heads"``.
        measure: Makes of the weight a tensor of its shape.
        reads_alone: Whether, of attention heads, only the weights that read them count.

    Returns:
        Float32 tensor of shape (channels,) on the CPU.

    Example:
        >>> layer = nn.Conv2d(4, 2, 1, groups=2)
        >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, -2.0], [3.0, 4.0]]).view(2, 2, 1, 1))
        >>> channel_sums(layer, "out", torch.abs), channel_sums(layer, "in", torch.abs)
        (tensor([3., 7.]), tensor([1., 2., 3., 4.]))
    """
    if side == "heads":
        of_parts = [
            measure(part.of(layer).data).float().movedim(part.dim, 0).flatten(1).sum(1).cpu()[part.index].sum(1)
            for part in head_parts(layer)
            if part.of(layer).dim() > 1 and part.role in (("reads",) if reads_alone else ("makes", "reads"))
        ]
        return torch.stack(of_parts).sum(0)
    weight, n_groups = layer.weight, getattr(layer, "groups", 1)
    assert isinstance(weight, Tensor)
    values = measure(weight.data).float()
    values = values.flatten(2) if values.dim() > 2 else values.unsqueeze(2)
    dim = 0 if side == "both" else int((side == "in") != getattr(layer, "transposed", False))
    if dim == 0:
        return values.sum((1, 2)).cpu()
    # g = groups, o = rows of a group, i = columns of a group
    sums: Tensor = values.unflatten(0, (n_groups, -1)).sum((1, 3))  # type: ignore[no-untyped-call]
    return sums.flatten().cpu()
