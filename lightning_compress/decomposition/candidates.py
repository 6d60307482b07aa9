"""Candidates: which layers can be decomposed, and why the others are left alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import nn

from lightning_compress.decomposition.attribute_reads import why_read
from lightning_compress.decomposition.filter_groups import Over, dim_of
from lightning_compress.decomposition.layers import CONVOLUTIONS, factor_macs
from lightning_compress.decomposition.low_rank import Scheme, full_rank
from lightning_compress.selection import TRANSPOSED_LAYERS, plain_weights, weight_layers

LEAST_CHANNELS = 16
"""Channels from which on a share of them is a rank: a quarter of the logits of ten classes tells hardly any apart."""


def candidates(model: nn.Module, exclude: Sequence[str]) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Return the layers of a model that two others can stand for, and why the other layers cannot be replaced.

    Args:
        model: Any module.
        exclude: Patterns of layer names to leave out.

    Returns:
        Layers by name, and reasons by the name of a layer.

    Raises:
        ValueError: If a pattern matches no layer.
        CompressionError: If a weight is not a plain initialized parameter.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.ConvTranspose2d(8, 3, 2))
        >>> found, reasons = candidates(net, [])
        >>> list(found), reasons
        (['0'], {'1': 'is a grouped convolution', '2': 'is a transposed convolution'})
    """
    plain_weights(model, exclude)  # only checks
    uses = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    found: dict[str, nn.Module] = {}
    reasons: dict[str, str] = {}
    for name, layer in weight_layers(model, exclude).items():
        reason = ""
        if isinstance(layer, TRANSPOSED_LAYERS):
            reason = "is a transposed convolution"
        elif type(layer) not in (*CONVOLUTIONS, nn.Linear):
            reason = f"is a `{type(layer).__name__}`, whose forward may be its own"
        elif not name:
            reason = "is the whole model, and has no place in another module"
        elif isinstance(layer, CONVOLUTIONS) and layer.groups > 1:
            reason = "is a grouped convolution"
        elif uses[id(layer.weight)] > 1:
            reason = "shares its weight with another layer"
        else:
            reason = why_read(model, name)
        if reason:
            reasons[name] = reason
        else:
            found[name] = layer
    return found, reasons


def scheme_of(layer: nn.Module, scheme: Scheme) -> Scheme:
    """Return how a layer is factorised where ``scheme`` is asked for: only convolutions over images are spatially.

    Example:
        >>> scheme_of(nn.Linear(2, 2), "spatial"), scheme_of(nn.Conv2d(2, 2, 3), "spatial")
        ('channel', 'spatial')
    """
    return scheme if isinstance(layer, nn.Conv2d) else "channel"


def rank_of(layer: nn.Module, rank: float) -> int:
    """Return the rank of a layer's factors: a share of its channels (float), or a number (int).

    The share is one of the largest rank by channel for both schemes: that of the output channels, where these are not
    more than what each of them reads. So one share means as many channels between the factors of either scheme.

    Example:
        >>> rank_of(nn.Conv2d(16, 8, 3), 0.25), rank_of(nn.Linear(16, 8), 3)
        (2, 3)
    """
    shape = layer.get_parameter("weight").shape
    return max(1, round(rank * full_rank(shape, "channel"))) if isinstance(rank, float) else rank


def why_not_factorised(layer: nn.Module, scheme: Scheme, rank: float) -> str:
    """Return why a layer should not become two factors; empty where nothing stands against it.

    Args:
        layer: One of the candidates.
        scheme: How its weight is a matrix.
        rank: As of `rank_of`.

    Example:
        >>> why_not_factorised(nn.Linear(64, 20), "channel", 0.9)
        'costs no more multiply-accumulates than two factors of rank 18'
        >>> why_not_factorised(nn.Linear(64, 10), "channel", 0.5)
        'has 10 channels, too few for a share of them'
    """
    shape = layer.get_parameter("weight").shape
    if isinstance(rank, float) and full_rank(shape, "channel") < LEAST_CHANNELS:
        return f"has {full_rank(shape, 'channel')} channels, too few for a share of them"
    number = rank_of(layer, rank)
    factors, whole = factor_macs(layer, scheme, number)
    if factors < whole and number < full_rank(shape, scheme):
        return ""
    return f"costs no more multiply-accumulates than two factors of rank {number}"


def why_not_shared(layer: nn.Module, over: Over, size: int, *, is_last: bool) -> str:
    """Return why the channels of a layer should not share filters; empty where nothing stands against it.

    Args:
        layer: One of the candidates.
        over: Which of its channels.
        size: Channels of a group.
        is_last: Whether no layer of the model comes after it.

    Example:
        >>> why_not_shared(nn.Conv2d(3, 8, 3), "inputs", 2, is_last=False)
        'has 3 inputs, fewer than two groups of 2'
        >>> why_not_shared(nn.Linear(8, 4), "outputs", 2, is_last=True)
        'is the last layer, whose outputs are those of the model'
    """
    n_channels = layer.get_parameter("weight").shape[dim_of(over)]
    if n_channels < 2 * size:
        return f"has {n_channels} {over}, fewer than two groups of {size}"
    if over == "outputs" and is_last:
        return "is the last layer, whose outputs are those of the model"
    return ""
