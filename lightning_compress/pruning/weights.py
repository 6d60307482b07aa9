"""Prunable weights: the parameters that pruning works on, counted as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from lightning_compress.selection import TRANSPOSED_LAYERS


def check_pattern_fits(model: nn.Module, names: Sequence[str], pattern: tuple[int, int]) -> None:
    """Check that the input dimension of every named layer can be cut into groups of m.

    Args:
        model: The module that holds the layers.
        names: Names of convolution and linear layers.
        pattern: ``(n, m)``: n of every m consecutive weights are kept.

    Raises:
        ValueError: If the inputs of a layer (per group of a grouped convolution) are not a multiple of m.

    Example:
        >>> check_pattern_fits(nn.Sequential(nn.Linear(8, 2)), ["0"], (2, 4))
        >>> check_pattern_fits(nn.Sequential(nn.Linear(6, 2)), ["0"], (2, 4))
        Traceback (most recent call last):
        ...
        ValueError: Layer `0` has 6 inputs, which is not a multiple of 4 as `pattern=(2, 4)` needs.
        Leave it out with `exclude=["0"]`.
    """
    n, m = pattern
    for name in names:
        inputs = _inputs_per_group(model.get_submodule(name))
        if inputs % m:
            raise ValueError(
                f"Layer `{name}` has {inputs} input{'s' * (inputs != 1)}, which is not a multiple of {m} "
                f'as `pattern=({n}, {m})` needs. Leave it out with `exclude=["{name}"]`.'
            )


def input_dims(model: nn.Module, names: Sequence[str]) -> dict[str, int]:
    """Return which dimension of each named layer's weight runs over its inputs.

    Args:
        model: The module that holds the layers.
        names: Names of convolution and linear layers.

    Returns:
        0 for transposed convolutions and 1 for all others, by layer name.

    Example:
        >>> input_dims(nn.Sequential(nn.Linear(8, 2), nn.ConvTranspose1d(2, 4, 3)), ["0", "1"])
        {'0': 1, '1': 0}
    """
    return {name: 0 if isinstance(model.get_submodule(name), TRANSPOSED_LAYERS) else 1 for name in names}


def sparsity(weights: Mapping[str, Tensor]) -> float:
    """Return the fraction of zeros in ``weights``, counted entry by entry.

    Args:
        weights: Tensors by layer name.

    Returns:
        Zeros over entries, in [0, 1]; 0 where there are no entries.

    Example:
        >>> sparsity({"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([0.0, 0.0])})
        0.75
    """
    total = sum(weight.numel() for weight in weights.values())
    return sum(_count_zeros(weight) for weight in weights.values()) / total if total else 0.0


def sparsity_by_layer(weights: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the fraction of zeros of each weight, counted entry by entry.

    Args:
        weights: Non-empty tensors by layer name.

    Returns:
        Zeros over entries by layer name, in [0, 1].

    Example:
        >>> sparsity_by_layer({"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([0.0, 0.0])})
        {'a': 0.5, 'b': 1.0}
    """
    return {name: _count_zeros(weight) / weight.numel() for name, weight in weights.items()}


def _count_zeros(weight: Tensor) -> int:
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.float64):
        return weight.numel() - int(weight.count_nonzero())
    # Part by part, so that what is made of the entries stays in the processor's caches.
    array = weight.detach().flatten().numpy()
    parts = (array[start : start + _CHUNK] for start in range(0, array.size, _CHUNK))
    return array.size - sum(int(np.count_nonzero(part != 0)) for part in parts)


_CHUNK = 2**16


def _inputs_per_group(layer: nn.Module) -> int:
    if isinstance(layer, nn.Linear):
        return layer.in_features
    # Attributes of every convolution, transposed or not.
    return int(layer.in_channels) // int(layer.groups)  # type: ignore[arg-type]
