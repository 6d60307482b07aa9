"""The architecture that a checkpoint was written for, against the one of the model that reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from lightning_compress.errors import CompressionError

MAX_NAMES = 3
"""How many names of each kind a message tells."""


def check_architecture(pl_module: pl.LightningModule, weights: Mapping[str, Any]) -> None:
    """Check, by loading them, that ``weights`` are those of ``pl_module``'s architecture.

    The Trainer loads them right afterwards; before that our states are loaded, whose messages would tell of one of
    many layers that are missing.

    Args:
        pl_module: The module that goes on with a checkpoint.
        weights: The checkpoint's ``state_dict``.

    Raises:
        CompressionError: If they do not fit, with the names that differ.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> check_architecture(BoringModel(), BoringModel().state_dict())
        >>> check_architecture(BoringModel(), {"head.weight": BoringModel().layer.weight})
        Traceback (most recent call last):
            ...
        lightning_compress.errors.CompressionError: The checkpoint was written for another architecture than this
        `BoringModel`: only the checkpoint has `head.weight`; only the model has `layer.weight`, `layer.bias`. Build
        the model as it was in the run that wrote the checkpoint.
    """
    try:
        pl_module.load_state_dict(weights, strict=pl_module.strict_loading)
    except RuntimeError as error:
        own = pl_module.state_dict()
        shapes = [
            f"`{name}` has the shape {tuple(value.shape)} in the checkpoint and {tuple(own[name].shape)} in the model"
            for name, value in weights.items()
            if isinstance(value, Tensor) and name in own and value.shape != own[name].shape
        ]
        found = [
            _told("only the checkpoint has ", [f"`{name}`" for name in weights if name not in own]),
            _told("only the model has ", [f"`{name}`" for name in own if name not in weights]),
            _told("", shapes),
        ]
        differences = "; ".join(part for part in found if part) or str(error)
        raise CompressionError(
            f"The checkpoint was written for another architecture than this `{type(pl_module).__name__}`: "
            f"{differences}. Build the model as it was in the run that wrote the checkpoint."
        ) from error


def _told(lead: str, items: Sequence[str]) -> str:
    if not items:
        return ""
    more = f" and {len(items) - MAX_NAMES} more" if len(items) > MAX_NAMES else ""
    return f"{lead}{', '.join(items[:MAX_NAMES])}{more}"
