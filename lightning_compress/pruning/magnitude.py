"""Magnitude masks: which weights to keep at a given sparsity."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Scope = Literal["global", "layer", "lamp"]
"""How layers compare: by one magnitude threshold for all, each layer to the same sparsity, or by LAMP scores."""

CHUNK = 2**16
"""Entries that are worked on at a time: what is made of them stays in the processor's caches, in memory used again."""

SAMPLE_EVERY = 64
"""One entry of so many is looked at to tell about where the k-th smallest lies."""


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
    values = {name: weight.detach() for name, weight in weights.items()}
    check_finite(values)
    if scope == "lamp":
        return _lamp_masks(values, sparsity)
    return masks_from_scores(values, sparsity, scope)


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
    check_finite(weights)
    return {name: weight.detach().abs() for name, weight in weights.items()}


def check_finite(weights: Mapping[str, Tensor]) -> None:
    """Check that ``weights`` can be ranked.

    Args:
        weights: Tensors of any shape by layer name.

    Raises:
        ValueError: If a weight holds NaN or infinity.

    Example:
        >>> check_finite({"a": torch.tensor([-1.0, 2.0])})
    """
    for name, weight in weights.items():
        if not _is_finite(weight.detach()):
            raise ValueError(
                f"The weight of layer `{name}` holds NaN or infinity, so its entries cannot be ranked. "
                "The training has diverged: lower the learning rate or clip the gradients."
            )


def masks_from_scores(scores: Mapping[str, Tensor], sparsity: float, scope: Scope = "global") -> dict[str, Tensor]:
    """Drop the entries with the smallest scores.

    Args:
        scores: Tensors by layer name, without NaN; their magnitudes count, infinity marks entries that must stay.
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
        return [torch.ones_like(values, dtype=torch.bool, memory_format=torch.contiguous_format) for values in scores]
    n_kept = sum(values.numel() for values in scores) - n_dropped
    return _keep_above(scores, _kth_smallest(scores, n_dropped), n_kept)


def _keep_above(scores: Sequence[Tensor], threshold: float, n_kept: int) -> list[Tensor]:
    """Keep what is larger than ``threshold``; of the entries equal to it the last ones, as many as are missing."""
    masks = [_is_above(values, threshold) for values in scores]
    n_missing = n_kept - sum(map(_count, masks))
    for values, mask in zip(reversed(scores), reversed(masks), strict=True):
        if n_missing == 0:
            break
        equal = (_magnitudes_of([values]) == threshold).nonzero().flatten()[-n_missing:]
        mask.view(-1)[equal] = True
        n_missing -= equal.numel()
    return masks


def _is_above(values: Tensor, threshold: float) -> Tensor:
    if values.device.type != "cpu":
        return (_magnitudes_of([values]) > threshold).view(values.shape)
    mask = np.empty(values.numel(), dtype=bool)
    for start, chunk in _magnitude_chunks(values):
        np.greater(chunk, threshold, out=mask[start : start + chunk.size])
    return torch.from_numpy(mask).view(values.shape)


def _kth_smallest(scores: Sequence[Tensor], k: int) -> float:
    """Return the k-th smallest magnitude, k from 1: it is bracketed by a sample, and selected inside the bracket.

    Python's floats hold every magnitude exactly.
    """
    total = sum(values.numel() for values in scores)
    if total < CHUNK or any(values.device.type != "cpu" for values in scores):
        return _kth_of(_magnitudes_of(scores), k)
    sample = np.sort(_magnitudes_of([values.flatten()[::SAMPLE_EVERY] for values in scores]).numpy())
    share = k / total
    # Four standard deviations of the rank in a random sample; where it is not random enough, all is looked at.
    margin = 4.0 * math.sqrt(len(sample) * share * (1.0 - share)) + 1.0
    first, last = math.floor(share * len(sample) - margin), math.ceil(share * len(sample) + margin)
    low = float(sample[first]) if first >= 0 else -1.0
    high = float(sample[last]) if last < len(sample) else math.inf
    n_below, candidates = 0, []
    for values in scores:
        for _, chunk in _magnitude_chunks(values):
            is_above = chunk > low
            n_below += chunk.size - int(np.count_nonzero(is_above))
            candidates.append(chunk[is_above & (chunk <= high)])
    if k <= n_below and low == 0.0:
        return 0.0  # most entries are zeros once a network is pruned
    inside = np.concatenate(candidates)
    if not n_below < k <= n_below + inside.size:
        return _kth_of(_magnitudes_of(scores), k)
    return _kth_of(torch.from_numpy(inside), k - n_below)


def _kth_of(values: Tensor, k: int) -> float:
    if values.device.type != "cpu":
        return float(values.sort().values[k - 1])
    array = values.numpy()
    # Many equal values make the selection slow.
    n_zeros = array.size - int(np.count_nonzero(array))
    if k <= n_zeros:
        return 0.0
    if n_zeros:
        array, k = array[array > 0], k - n_zeros
    return float(np.partition(array, k - 1)[k - 1])


def _lamp_masks(weights: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """Return `masks_from_scores` of `lamp_scores`, by one sort of the values of each layer that are not zero.

    In a layer the scores rise with the magnitudes, so how many of them stay tells which.
    """
    total = sum(values.numel() for values in weights.values())
    n_kept = total - round(sparsity * total)
    if n_kept == 0:
        return masks_from_scores(weights, sparsity)
    largest_first = [_positive_largest_first(values) for values in weights.values()]
    scores = [_lamp_scores_of_sorted(values) for values in largest_first]
    n_positive = sum(values.numel() for values in scores)
    threshold = 0.0 if n_kept >= n_positive else _kth_smallest(scores, n_positive - n_kept)
    counts = [_count(_is_above(values, threshold)) for values in scores]
    if sum(counts) != n_kept:  # some scores are equal, and their places in the weights decide
        return masks_from_scores({name: lamp_scores(values) for name, values in weights.items()}, sparsity)
    return {
        name: _keep_above([values], float(order[count]) if count < order.numel() else 0.0, count)[0]
        for (name, values), order, count in zip(weights.items(), largest_first, counts, strict=True)
    }


def _lamp_scores_of_sorted(values: Tensor) -> Tensor:
    """Return `lamp_scores` of positive values that begin with the largest."""
    if values.device.type != "cpu":
        squares = values.double().square()
        no_smaller = squares.cumsum(0)
        return torch.where(no_smaller > 0.0, squares / no_smaller, 0.0)
    scores = np.square(values.numpy(), dtype=np.float64)
    sums = np.cumsum(scores)
    np.divide(scores, sums, out=scores, where=sums > 0.0)  # squares may underflow to zeros
    return torch.from_numpy(scores)


def _positive_largest_first(values: Tensor) -> Tensor:
    if values.device.type != "cpu":
        found = _magnitudes_of([values])
        return found[found > 0].sort(descending=True).values
    positive = [chunk[chunk > 0] for _, chunk in _magnitude_chunks(values)]
    ascending = np.concatenate(positive) if positive else np.empty(0, np.float32)
    ascending.sort()
    return torch.from_numpy(ascending[::-1].copy())


# On the CPU all passes over the weights are numpy's: of one thread, they never wait for another one that the system has
# given to somebody else, and there are many passes, each shorter than such a wait.


def _count(mask: Tensor) -> int:
    return int(np.count_nonzero(mask.numpy())) if mask.device.type == "cpu" else int(mask.count_nonzero())


def _is_finite(weight: Tensor) -> bool:
    """Tell whether all entries are finite; a maximum hands NaN on."""
    if weight.device.type != "cpu":
        return bool(torch.isfinite(weight).all())
    return all(bool(np.isfinite(chunk.max())) for _, chunk in _magnitude_chunks(weight))


def _magnitudes_of(scores: Sequence[Tensor]) -> Tensor:
    flat = [_comparable(values.flatten()) for values in scores]
    if any(values.device.type != "cpu" for values in flat):
        return torch.cat(flat).abs_()
    joined = np.concatenate([values.numpy() for values in flat])
    return torch.from_numpy(np.abs(joined, out=joined))


def _magnitude_chunks(values: Tensor) -> Iterator[tuple[int, Any]]:
    """Yield positions and magnitudes part by part, as numpy arrays; each part is overwritten by the next."""
    flat = values.flatten()
    memory = _comparable(flat[:0]).new_empty(min(CHUNK, flat.numel())).numpy()
    for start in range(0, flat.numel(), CHUNK):
        chunk = _comparable(flat[start : start + CHUNK]).numpy()
        yield start, np.abs(chunk, out=memory[: chunk.size])


def _comparable(values: Tensor) -> Tensor:
    """Return the values as float64 or float32, which holds every smaller format exactly; numpy has no bfloat16."""
    return values if values.dtype == torch.float64 else values.float()
