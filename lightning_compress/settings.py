"""Settings as plain types, and those that a checkpoint was written with against those of the run that reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np

from lightning_compress.errors import CompressionError

T = TypeVar("T")


def plain(setting: T) -> T:
    """Return a setting with Python's own numbers in the place of numpy's.

    They compute alike, but `torch.load` with ``weights_only=True`` reads no numpy scalars, and numpy's ints and floats
    of other widths are no instances of ``int`` and ``float``.

    Args:
        setting: A setting; numbers are found inside lists, tuples and mappings too.

    Example:
        >>> plain(np.int64(4)), plain((np.int64(2), 4)), plain({"head": {"weight_bits": np.int8(4)}})
        (4, (2, 4), {'head': {'weight_bits': 4}})
    """
    found: Any = setting
    if isinstance(setting, np.generic):
        found = setting.item()
    elif isinstance(setting, Mapping):
        found = {plain(name): plain(value) for name, value in setting.items()}
    elif isinstance(setting, tuple):
        found = tuple(plain(value) for value in setting)
    elif isinstance(setting, list):
        found = [plain(value) for value in setting]
    return found  # type: ignore[no-any-return]


def check_same_settings(saved: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Check that a run goes on with the settings that its checkpoint was written with.

    Args:
        saved: Settings by name, of the checkpoint; what it does not tell is not compared.
        ours: Settings by name, of this run.

    Raises:
        CompressionError: If they differ, with every difference.

    Example:
        >>> check_same_settings({"weight_bits": 8}, {"weight_bits": 8, "edge_bits": 8})
        >>> check_same_settings({"weight_bits": 8}, {"weight_bits": 4})
        Traceback (most recent call last):
            ...
        lightning_compress.errors.CompressionError: The checkpoint was written with weight_bits=8, this run has
        weight_bits=4. Use the same settings to go on with it, or `load_from_checkpoint` to begin a new run with its
        weights.
    """
    if different := differences(saved, ours):
        raise CompressionError(
            f"The checkpoint was written with {different[0]}, this run has {different[1]}. "
            "Use the same settings to go on with it, or `load_from_checkpoint` to begin a new run with its weights."
        )


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the settings of either side that differ, for a sentence; None where none do.

    Args:
        first: Settings by name.
        second: Settings by name; those that the first side lacks are not compared.

    Example:
        >>> differences({"weight_bits": 8, "edge_bits": 8}, {"weight_bits": 4, "edge_bits": 8})
        ('weight_bits=8', 'weight_bits=4')
    """
    names = [name for name, value in second.items() if name in first and first[name] != value]
    if not names:
        return None
    listed = [", ".join(f"{name}={settings[name]!r}" for name in names) for settings in (first, second)]
    return listed[0], listed[1]
