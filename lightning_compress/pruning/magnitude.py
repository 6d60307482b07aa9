"""Magnitude masks: which weights to keep at a given sparsity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Scope = Literal["global", "layer", "lamp"]
"""How layers compare: by one magnitude threshold for all, each layer to the same sparsity, or by LAMP scores."""


def magnitude_mask(weight: Tensor, sparsity: float) -> Tensor:
    """Keep the largest-magnitude entries of ``weight`` (Han et al. 2015, arXiv:1506.02626).

    Ties are broken by position (the first go first), so exactly ``round(sparsity * weight.numel())`` entries are
    dropped.

    Args:
        weight: Finite tensor of any shape.
        sparsity: Fraction of entries to drop, in [0, 1].

    Returns:
        Boolean tensor shaped like ``weight``; ``True`` marks a kept entry.

    Raises:
        ValueError: If ``weight`` holds NaN or infinity.

    Example:
        >>> magnitude_mask(torch.tensor([0.1, -2.0, 0.5, 1.0]), sparsity=0.5)
        tensor([False,  True, False,  True])
    """
    return magnitude_masks({"weight": weight}, sparsity)["weight"]


def magnitude_masks(weights: Mapping[str, Tensor], sparsity: float, scope: Scope = "global") -> dict[str, Tensor]:
    """Keep the largest-magnitude entries of several weights.

    Over all weights together exactly ``round(sparsity * total)`` entries are dropped, in either scope; with
    ``scope="layer"`` each layer is within one entry of the sparsity as well.

    Args:
        weights: Finite tensors of any shape by layer name.
        sparsity: Fraction of entries to drop, in [0, 1].
        scope: ``"global"`` compares magnitudes across layers, ``"layer"`` only inside each, ``"lamp"`` compares
            `lamp_scores` across layers.

    Returns:
        Boolean tensors by layer name, shaped like the weights; ``True`` marks a kept entry.

    Raises:
        ValueError: If a weight holds NaN or infinity.

    Example:
        >>> weights = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])}
        >>> magnitude_masks(weights, 0.5)
        {'a': tensor([False, False]), 'b': tensor([True, True])}
        >>> magnitude_masks(weights, 0.5, scope="layer")
        {'a': tensor([False,  True]), 'b': tensor([False,  True])}
    """
    scores = magnitudes(weights)
    if scope == "lamp":
        scores = {name: lamp_scores(values) for name, values in scores.items()}
    return masks_from_scores(scores, sparsity, scope)


def lamp_scores(weight: Tensor) -> Tensor:
    """Return the layer-adaptive magnitude scores of ``weight`` (Lee et al. 2021, eq. 4, arXiv:2010.07611).

    The score of an entry is its square over the sum of the squares of all entries of the layer that are no smaller:
    the share of what would be left of the layer that goes with it. The largest entry of a layer scores 1, so no layer
    is emptied.

    Args:
        weight: Finite tensor of any shape; only magnitudes count.

    Returns:
        Scores in [0, 1] as float64, shaped like ``weight``; among equal entries a later one scores higher.

    Example:
        >>> lamp_scores(torch.tensor([1.0, -2.0, 2.0]))
        tensor([0.1111, 0.5000, 1.0000], dtype=torch.float64)
    """
    squares, order = weight.detach().double().square().flatten().sort(stable=True)
    no_smaller = squares.flip(0).cumsum(0).flip(0)
    scores = torch.empty_like(squares)
    # A layer of zeros has nothing to lose: its scores are zero, not NaN.
    scores[order] = torch.where(no_smaller > 0.0, squares / no_smaller, 0.0)
    return scores.view(weight.shape)


def magnitudes(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the absolute values of ``weights``, checked to be finite.

    Args:
        weights: Tensors of any shape by layer name.

    Returns:
        Their absolute values, detached.

    Raises:
        ValueError: If a weight holds NaN or infinity.

    Example:
        >>> magnitudes({"a": torch.tensor([-1.0, 2.0])})
        {'a': tensor([1., 2.])}
    """
    absolute = {name: weight.detach().abs() for name, weight in weights.items()}
    for name, values in absolute.items():
        # The maximum hands NaN on, so one pass over the values finds both.
        if values.numel() and not torch.isfinite(values.amax()):
            raise ValueError(
                f"The weight of layer `{name}` holds NaN or infinity, so its entries cannot be ranked. "
                "The training has diverged: lower the learning rate or clip the gradients."
            )
    return absolute


def masks_from_scores(scores: Mapping[str, Tensor], sparsity: float, scope: Scope = "global") -> dict[str, Tensor]:
    """Drop the entries with the smallest scores.

    Args:
        scores: Non-negative tensors by layer name, without NaN; infinity marks entries that must stay.
        sparsity: Fraction of all entries to drop, in [0, 1].
        scope: ``"layer"`` compares scores inside each layer, any other across layers.

    Returns:
        Boolean tensors by layer name, shaped like the scores; ``True`` marks a kept entry.

    Example:
        >>> masks_from_scores({"a": torch.tensor([3.0, 1.0, 2.0])}, 1 / 3)
        {'a': tensor([ True, False,  True])}
    """
    sizes = [values.numel() for values in scores.values()]
    if scope != "layer":
        masks = _keep_largest(list(scores.values()), round(sparsity * sum(sizes)))
        return dict(zip(scores, masks, strict=True))
    # Rounding the running total instead of each layer keeps the sum exact and each layer within one entry.
    ends = [round(sparsity * end) for end in accumulate(sizes)]
    starts = [0, *ends]
    return {
        name: _keep_largest([values], end - start)[0]
        for (name, values), start, end in zip(scores.items(), starts, ends, strict=False)
    }


def _keep_largest(scores: Sequence[Tensor], n_dropped: int) -> list[Tensor]:
    if n_dropped == 0:
        return [torch.ones_like(values, dtype=torch.bool) for values in scores]
    flat = torch.cat([values.flatten() for values in scores])
    threshold = _kth_smallest(flat, n_dropped)
    mask = flat > threshold
    # Of the entries equal to the threshold, the last ones stay, as many as are still missing.
    n_missing = flat.numel() - n_dropped - int(torch.count_nonzero(mask))
    if n_missing:
        mask[(flat == threshold).nonzero().flatten()[-n_missing:]] = True
    masks: list[Tensor] = []
    start = 0
    for values in scores:
        masks.append(mask[start : start + values.numel()].view(values.shape).clone())
        start += values.numel()
    return masks


def _kth_smallest(values: Tensor, k: int) -> Tensor:
    """Return the k-th smallest of values from 0 on, k from 1; quick selection on the CPU, a sort elsewhere."""
    if values.device.type != "cpu":
        return values.sort().values[k - 1]
    # Most entries are zeros once a network is pruned, and many equal values make the selection slow.
    n_zeros = values.numel() - int(torch.count_nonzero(values))
    if k <= n_zeros:
        return values.new_zeros(1)
    if n_zeros:
        values, k = values[values > 0], k - n_zeros
    # numpy has no bfloat16; float32 holds every smaller format exactly.
    comparable = values if values.dtype == torch.float64 else values.float()
    return torch.from_numpy(np.partition(comparable.numpy(), k - 1)[k - 1 : k]).to(values.dtype)
