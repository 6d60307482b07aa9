"""Channel importance: what a unit of a channel group is worth."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_compress.pruning.channels.attention import head_parts
from lightning_compress.pruning.channels.narrowing import NORMS
from lightning_compress.pruning.channels.places import ChannelGroup, Member, channel_sums

Importance = Literal["l1", "l2", "bn_scale", "taylor", "fpgm", "random"]
"""How units are ranked: by the magnitudes of their weights, the scale of their batch norm, the change of the loss
without them, their distance from the other filters, or not at all (the control)."""

IMPORTANCES: tuple[str, ...] = get_args(Importance)


def channel_importance(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    importance: Importance = "l2",
    *,
    taylor: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return the importance of every unit, relative to the mean of its group.

    For a unit, what is measured in every layer of the group is averaged over these layers:

    - ``"l1"``: the sum of the absolute weights, where the channel is made and where it is read (Li et al. 2017,
      arXiv:1608.08710, extended to groups as by Fang et al. 2023, arXiv:2301.12900);
    - ``"l2"``: the sum of their squares;
    - ``"bn_scale"``: the absolute scale of the batch norm (Liu et al. 2017, arXiv:1708.06519); groups without a batch
      norm are ranked by ``"l2"``;
    - ``"taylor"``: the squared sum of weight times gradient (Molchanov et al. 2019, arXiv:1906.10771, eq. 8), summed up
      over steps by `taylor_scores`;
    - ``"fpgm"``: the sum of the distances to all other filters of the layer, which is least for filters near the
      geometric median (He et al. 2019, arXiv:1811.00250);
    - ``"random"``: numbers that hang on the group's name alone.

    Args:
        model: The model.
        groups: Its groups.
        importance: What to measure.
        taylor: Scores by group name, for ``"taylor"``.

    Returns:
        Float32 tensors of shape (units,) on the CPU, with mean 1, by group name.

    Raises:
        ValueError: If a weight is NaN or infinite.

    Example:
        >>> from lightning_compress.pruning.channels.groups import find_channel_groups
        >>> net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
        >>> with torch.no_grad():
        ...     _ = net[0].weight.copy_(torch.tensor([[1.0], [3.0]])), net[2].weight.copy_(torch.tensor([[1.0, 1.0]]))
        >>> channel_importance(net, find_channel_groups(net, [torch.rand(1, 1)]).groups, "l1")
        {'0': tensor([0.6667, 1.3333])}
    """
    scores = {}
    for group in groups:
        if importance == "taylor":
            found = (taylor or {}).get(group.name, torch.zeros(group.n_units))
        elif importance == "random":
            generator = torch.Generator().manual_seed(zlib.crc32(group.name.encode()))
            found = torch.rand(group.n_units, generator=generator)
        else:
            found = _measured(model, group, importance)
        mean = found.mean()
        if not torch.isfinite(mean):
            raise ValueError(
                f"A weight of the channel group `{group.name}` holds NaN or infinity, so its channels cannot be "
                "ranked. The training has diverged: lower the learning rate or clip the gradients."
            )
        scores[group.name] = found / mean if mean > 0 else torch.ones_like(found)
    return scores


@torch.no_grad()
def taylor_scores(model: nn.Module, groups: Sequence[ChannelGroup]) -> dict[str, Tensor]:
    """Return the first-order Taylor importance of every unit for the gradients that the parameters hold now.

    Args:
        model: The model, after a backward pass.
        groups: Its groups.

    Returns:
        Float32 tensors of shape (units,) on the CPU by group name: the mean over the group's layers of the squared sum
        of weight times gradient.

    Example:
        >>> from lightning_compress.pruning.channels.groups import find_channel_groups
        >>> net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> groups = find_channel_groups(net, [torch.rand(1, 1)]).groups
        >>> net(torch.ones(1, 1)).sum().backward()
        >>> taylor_scores(net, groups)["0"].shape
        torch.Size([2])
    """
    scores = {}
    for group in groups:
        found = []
        for member in _layers(model, group):
            layer = model.get_submodule(member.module)
            found.append(_per_unit(group, member, channel_sums(layer, member.side, _by_gradient(layer))).square())
        scores[group.name] = torch.stack(found).mean(0)
    return scores


def _by_gradient(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return what multiplies a parameter of ``layer`` by its gradient; what has none counts as zeros."""
    gradients = {parameter.data_ptr(): parameter.grad for parameter in layer.parameters()}

    def product(values: Tensor) -> Tensor:
        gradient = gradients[values.data_ptr()]
        return torch.zeros_like(values) if gradient is None else values * gradient

    return product


@torch.no_grad()
def _measured(model: nn.Module, group: ChannelGroup, importance: str) -> Tensor:
    measures: dict[str, Callable[[Tensor], Tensor]] = {"l1": torch.abs, "l2": torch.square}
    if importance == "bn_scale":
        norms = [(member, model.get_submodule(member.module).weight) for member in _members(model, group, NORMS)]
        found = [
            _per_unit(group, member, scale.detach().abs().float().cpu())
            for member, scale in norms
            if isinstance(scale, Tensor)
        ]
        if found:
            return torch.stack(found).mean(0)
        importance = "l2"
    if importance == "fpgm":
        makers = [member for member in _layers(model, group) if member.side != "in"]
        return torch.stack([_per_unit(group, member, _distances(model, member)) for member in makers]).mean(0)
    layers = [(member, model.get_submodule(member.module)) for member in _layers(model, group)]
    sums = [(member, channel_sums(layer, member.side, measures[importance])) for member, layer in layers]
    return torch.stack([_per_unit(group, member, per_channel) for member, per_channel in sums]).mean(0)


def _layers(model: nn.Module, group: ChannelGroup) -> list[Member]:
    """Return the members that are convolutions, linear layers or attention heads."""
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    heads = [member for member in group.members if member.side == "heads"]
    return heads or _members(model, group, kinds)


def _members(model: nn.Module, group: ChannelGroup, kinds: tuple[type[nn.Module], ...]) -> list[Member]:
    modules = [member for member in group.members if not member.side.startswith("dim")]
    return [member for member in modules if isinstance(model.get_submodule(member.module), kinds)]


def _per_unit(group: ChannelGroup, member: Member, per_channel: Tensor) -> Tensor:
    return torch.zeros(group.n_units).index_add_(0, member.units, per_channel[member.channels])


def _distances(model: nn.Module, member: Member) -> Tensor:
    """Return for each filter the sum of its distances to the others of its layer."""
    module: Any = model.get_submodule(member.module)
    if member.side == "heads":
        makes = head_parts(module)[0]
        rows = makes.of(module).detach().float()[makes.index].flatten(1)
        return torch.cdist(rows, rows).sum(1).cpu()
    weight = module.weight.detach().float()
    n_groups = getattr(module, "groups", 1)
    if getattr(module, "transposed", False):
        weight = weight.unflatten(0, (n_groups, -1)).transpose(1, 2).flatten(0, 1)
    filters = weight.flatten(1)
    return torch.cdist(filters, filters).sum(1).cpu()
