"""Selection: which layers of a model a technique works on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_compress.errors import CompressionError

WEIGHT_LAYERS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)
"""Layers whose ``weight`` is a kernel or a matrix; biases and normalisations never count."""

TRANSPOSED_LAYERS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
"""Layers whose weights have the output channels second."""


def match_names(names: Iterable[str], patterns: Sequence[str], argument: str) -> set[str]:
    """Return the names that match at least one shell-style pattern.

    A pattern also covers everything below the name it matches: ``"head"`` covers ``"head.0"``.

    Args:
        names: Names to choose from.
        patterns: Patterns as of :mod:`fnmatch`, such as ``"classifier"`` or ``"layer?.*"``.
        argument: Name of the user's argument, for the message.

    Returns:
        The names that matched.

    Raises:
        TypeError: If ``patterns`` is one string instead of a list of strings.
        ValueError: If a pattern matches none of the names.

    Example:
        >>> sorted(match_names(["conv1", "head.0", "head.2"], ["head"], "exclude"))
        ['head.0', 'head.2']
    """
    if isinstance(patterns, str):
        raise TypeError(f"`{argument}` must be a list of patterns, got the single string {patterns!r}.")
    names = list(names)
    matched: set[str] = set()
    for pattern in patterns:
        hits = {name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")}
        if not hits:
            raise ValueError(f"`{argument}` pattern {pattern!r} matches no layer. The layers are: {_listing(names)}.")
        matched |= hits
    return matched


def weight_layers(model: nn.Module, exclude: Sequence[str] = ()) -> dict[str, nn.Module]:
    """Return the convolution and linear layers of ``model`` by name, each layer once.

    Args:
        model: Any module.
        exclude: Patterns of layer names to leave out, see :func:`match_names`.

    Returns:
        Layer names, as of ``named_modules()``, with their layers.

    Raises:
        ValueError: If a pattern matches no layer.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
        >>> list(weight_layers(net)), list(weight_layers(net, exclude=["3"]))
        (['0', '3'], ['0'])
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, WEIGHT_LAYERS)}
    excluded = match_names(layers, exclude, "exclude")
    return {name: module for name, module in layers.items() if name not in excluded}


def _listing(names: Sequence[str], limit: int = 12) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:limit])
    return f"{shown}, and {len(names) - limit} more" if len(names) > limit else shown or "none"


def plain_weights(model: nn.Module, exclude: Sequence[str] = ()) -> dict[str, nn.Parameter]:
    """Return the weights of the convolution and linear layers of ``model``, a shared weight once.

    Args:
        model: Any module.
        exclude: Patterns of layer names to leave out, see :func:`match_names`.

    Returns:
        Parameters by layer name; a weight that several layers share stands under the first of them.

    Raises:
        ValueError: If a pattern matches no layer.
        CompressionError: If a weight is not a plain initialized parameter.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
        >>> [(name, tuple(weight.shape)) for name, weight in plain_weights(net).items()]
        [('0', (8, 3, 3, 3)), ('3', (2, 8))]
    """
    weights: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, layer in weight_layers(model, exclude).items():
        weight = dict(layer.named_parameters(recurse=False)).get("weight")
        if weight is None:
            raise CompressionError(
                f"The weight of layer `{name}` is computed from other parameters (a parametrization or a weight norm) "
                "and cannot be changed in place. Remove the parametrization, or leave it out with "
                f'`exclude=["{name}"]`.'
            )
        if is_lazy(weight):
            raise CompressionError(
                f"Layer `{name}` is lazy and has no weight yet. "
                "Run one batch through the model before the fit to give it its shape."
            )
        if id(weight) not in seen:
            seen.add(id(weight))
            weights[name] = weight
    return weights
