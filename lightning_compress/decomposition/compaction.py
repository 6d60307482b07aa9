"""Compaction: the small layers in the place of shared and factorised ones, by a record of plain types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_compress.decomposition.layers import factor_layers, shared_layer
from lightning_compress.decomposition.low_rank import full_rank
from lightning_compress.errors import CompressionError
from lightning_compress.selection import TRANSPOSED_LAYERS

CompactRecord = dict[str, dict[str, Any]]
"""What stands for each layer, by its name: ``{"over": "inputs", "groups": [[0, 3], [1, 2]]}`` of shared filters, or
``{"scheme": "channel", "rank": 8}`` of factors. Plain types, so that it can be written as JSON."""


def compact_(model: nn.Module, record: Mapping[str, Mapping[str, Any]]) -> None:
    """Put small layers in the place of those of ``record``, in place.

    Their weights are those of the layers: one filter of each group, or the best factors. The parameters are new ones:
    do it on a copy, or before an optimizer is built.

    Args:
        model: A model with the layers that the record names.
        record: What stands for each layer.

    Raises:
        CompressionError: If the model has no such layer, or not of such a shape.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
        >>> compact_(net, {"0": {"scheme": "channel", "rank": 2}})
        >>> [tuple(parameter.shape) for parameter in net.parameters()]
        [(2, 4), (6, 2), (6,)]
    """
    modules = dict(model.named_modules())
    for name, found in record.items():
        layer = modules.get(name)
        if (
            layer is None
            or not isinstance(layer, nn.Linear | nn.modules.conv._ConvNd)
            or isinstance(layer, TRANSPOSED_LAYERS)
            or getattr(layer, "groups", 1) != 1
        ):
            raise CompressionError(
                f"The record of small layers is that of another architecture: `{type(model).__name__}` has no layer "
                f"`{name}` that small ones could stand for. Where it makes its layers in `configure_model`, call that "
                "first."
            )
        _check_fits(name, layer, found)
        small = (
            shared_layer(layer, found["over"], found["groups"])
            if "groups" in found
            else factor_layers(layer, found["scheme"], found["rank"])
        )
        parent, _, own_name = name.rpartition(".")
        setattr(model.get_submodule(parent), own_name, small)


def _check_fits(name: str, layer: nn.Module, found: Mapping[str, Any]) -> None:
    shape = layer.get_parameter("weight").shape
    if "groups" in found:
        n_channels, over = shape[1 if found["over"] == "inputs" else 0], found["over"]
        recorded = sorted(channel for group in found["groups"] for channel in group)
        if recorded != list(range(n_channels)):
            raise CompressionError(
                f"The record of small layers is that of another architecture: it groups {len(recorded)} {over} of "
                f"`{name}`, which has {n_channels}."
            )
    elif (found["scheme"] == "spatial" and len(shape) != 4) or found["rank"] > full_rank(shape, found["scheme"]):
        raise CompressionError(
            f"The record of small layers is that of another architecture: it has {found['scheme']} factors of rank "
            f"{found['rank']} for `{name}`, whose weight has the shape {tuple(shape)}."
        )
