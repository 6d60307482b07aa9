"""Narrowing: layers that keep some of their channels, and the record from which a fresh model is made as narrow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.errors import CompressionError
from lightning_compress.pruning.channels.attention import narrow_heads_

ChannelRecord = dict[str, dict[str, list[int]]]
"""The channels that stay: by module name, and by side (``"out"``, ``"in"``, ``"both"``, ``"heads"``); for a bare
parameter by its name and ``"dim0"``, ``"dim1"``, ... Plain types, so that it can be written as JSON."""

NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


def width(module: nn.Module, side: str) -> int:
    """Return how many channels a layer has on one side.

    Example:
        >>> width(nn.Conv2d(3, 8, 1), "in"), width(nn.Conv2d(3, 8, 1), "out"), width(nn.BatchNorm2d(4), "both")
        (3, 8, 4)
    """
    if side == "heads":
        return int(module.num_heads)  # type: ignore[arg-type]
    names = {nn.Linear: ("in_features", "out_features"), nn.modules.conv._ConvNd: ("in_channels", "out_channels")}
    for kind, (reads, makes) in names.items():
        if isinstance(module, kind):
            return int(getattr(module, reads if side == "in" else makes))
    return int(getattr(module, "num_parameters" if isinstance(module, nn.PReLU) else "num_features"))


def narrow_(model: nn.Module, record: Mapping[str, Mapping[str, Sequence[int]]]) -> None:
    """Take all channels off the layers of ``model`` but those of ``record``, in place.

    Parameters become new, smaller ones: do it on a copy, or before an optimizer is built. Frozen ones stay frozen.

    Args:
        model: A model whose forwards are its own.
        record: The channels that stay, see `ChannelRecord`.

    Raises:
        CompressionError: If the model has no such module, or not as many channels.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> narrow_(net, {"0": {"out": [0, 2]}, "2": {"in": [0, 2]}})
        >>> net[0].weight.shape, net[2].in_features
        (torch.Size([2, 2]), 2)
    """
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    for name, sides in record.items():
        known = modules.get(name) or parameters.get(name)
        if known is None:
            raise CompressionError(
                f"The record of channels is that of another architecture: `{type(model).__name__}` has no `{name}`."
            )
        for side, kept in sides.items():
            index = torch.tensor(list(kept), dtype=torch.long)
            if isinstance(known, Tensor):
                owner_name, _, own_name = name.rpartition(".")
                dim = int(side.removeprefix("dim"))
                _check_fits(name, index, known.shape[dim])
                _replace(model.get_submodule(owner_name), own_name, known.index_select(dim, index.to(known.device)))
            else:
                _check_fits(name, index, width(known, side))
                _narrow_module(known, side, index)


def _check_fits(name: str, index: Tensor, n_channels: int) -> None:
    if len(index) == 0 or int(index.max()) >= n_channels:
        raise CompressionError(
            f"The record of channels is that of another architecture: it keeps channel {int(index.max())} of `{name}`, "
            f"which has {n_channels}."
            if len(index)
            else f"The record keeps no channel of `{name}`."
        )


def _narrow_module(module: Any, side: str, kept: Tensor) -> None:
    if side == "heads":
        narrow_heads_(module, kept)
    elif isinstance(module, nn.Linear):
        _select(module, "weight", 1 if side == "in" else 0, kept)
        if side == "out":
            _select(module, "bias", 0, kept)
        setattr(module, "in_features" if side == "in" else "out_features", len(kept))
    elif isinstance(module, nn.modules.conv._ConvNd):
        _narrow_convolution(module, side, kept)
    elif isinstance(module, nn.PReLU):
        _select(module, "weight", 0, kept)
        module.num_parameters = len(kept)
    elif isinstance(module, NORMS):
        for name in ("weight", "bias", "running_mean", "running_var"):
            _select(module, name, 0, kept)
        module.num_features = len(kept)
    else:
        raise CompressionError(f"A `{type(module).__name__}` has no channels that could be removed.")


def _narrow_convolution(module: Any, side: str, kept: Tensor) -> None:
    if side == "both":
        _select(module, "weight", 0, kept)
        _select(module, "bias", 0, kept)
        module.in_channels = module.out_channels = module.groups = len(kept)
    elif side == "in":
        _replace(module, "weight", kept_inputs(module, module.weight, kept))
        module.in_channels = len(kept)
    else:
        _replace(module, "weight", kept_outputs(module, module.weight, kept))
        _select(module, "bias", 0, kept)
        module.out_channels = len(kept)


def kept_inputs(module: Any, weight: Tensor, kept: Tensor) -> Tensor:
    """Return ``weight``, or a tensor like it, of a convolution with some of its input channels alone.

    Args:
        module: The convolution.
        weight: A tensor like its weight.
        kept: Channels that stay, as many of each group.

    Example:
        >>> grouped = nn.Conv2d(4, 2, 1, groups=2)
        >>> kept_inputs(grouped, grouped.weight, torch.tensor([0, 3])).shape
        torch.Size([2, 1, 1, 1])
    """
    return weight.index_select(0, kept.to(weight.device)) if module.transposed else _kept_columns(module, weight, kept)


def kept_outputs(module: Any, weight: Tensor, kept: Tensor) -> Tensor:
    """Return ``weight``, or a tensor like it, of a convolution with some of its output channels alone.

    Args:
        module: The convolution.
        weight: A tensor like its weight.
        kept: Channels that stay, as many of each group.

    Example:
        >>> grouped = nn.ConvTranspose2d(2, 4, 1, groups=2)
        >>> kept_outputs(grouped, grouped.weight, torch.tensor([0, 3])).shape
        torch.Size([2, 1, 1, 1])
    """
    return _kept_columns(module, weight, kept) if module.transposed else weight.index_select(0, kept.to(weight.device))


def _kept_columns(module: Any, weight: Tensor, kept: Tensor) -> Tensor:
    """Return ``weight`` with some of its columns alone: each group has its own rows, and counts its columns from 0."""
    rows, per_group = weight.chunk(module.groups), weight.shape[1]
    parts = [kept[kept // per_group == group] - group * per_group for group in range(module.groups)]
    return torch.cat([row.index_select(1, part.to(row.device)) for row, part in zip(rows, parts, strict=True)])


def _select(module: nn.Module, name: str, dim: int, kept: Tensor) -> None:
    value = getattr(module, name, None)
    if value is not None:
        _replace(module, name, value.index_select(dim, kept.to(value.device)))


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    old = getattr(module, name)
    value = value.detach().clone()
    setattr(module, name, nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value)
