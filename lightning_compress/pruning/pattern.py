"""N:M masks: keep n of every m consecutive weights along the input dimension."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_compress.pruning.magnitude import Scope, magnitudes, masks_from_scores


def pattern_sparsity(pattern: tuple[int, int]) -> float:
    """Return the sparsity of an N:M pattern, checked to be one.

    Args:
        pattern: ``(n, m)``: n of every m weights are kept.

    Returns:
        ``1 - n / m``.

    Raises:
        ValueError: If ``pattern`` is not two ints with ``0 < n < m``.

    Example:
        >>> pattern_sparsity((2, 4)), pattern_sparsity((1, 4))
        (0.5, 0.75)
    """
    if len(pattern) != 2 or not all(type(count) is int for count in pattern) or not 0 < pattern[0] < pattern[1]:
        raise ValueError(
            f"`pattern` must be two ints (n, m) with 0 < n < m, such as (2, 4) to keep 2 of every 4 weights, "
            f"got {pattern!r}."
        )
    n, m = pattern
    return 1.0 - n / m


def pattern_mask(weight: Tensor, pattern: tuple[int, int], input_dim: int = 1) -> Tensor:
    """Keep the n largest-magnitude of every m consecutive entries along ``input_dim`` (Zhou et al. 2021).

    Ties are broken by position: the first go first. Source: "Learning N:M fine-grained structured sparse neural
    networks from scratch", arXiv:2102.04010.

    Args:
        weight: Tensor of shape (out, in, *kernel), or (in, out, *kernel) with ``input_dim=0``.
        pattern: ``(n, m)`` with ``0 < n < m``.
        input_dim: The dimension that is cut into groups of m; its size is a multiple of m.

    Returns:
        Boolean tensor shaped like ``weight``; ``True`` marks a kept entry.

    Raises:
        ValueError: If the size of ``input_dim`` is not a multiple of m.

    Example:
        >>> pattern_mask(torch.tensor([[0.1, -2.0, 0.5, 1.0, 4.0, 3.0, 2.0, 1.0]]), (2, 4)).int()
        tensor([[0, 1, 0, 1, 1, 1, 0, 0]], dtype=torch.int32)
    """
    n, m = pattern
    size = weight.shape[input_dim]
    if size % m:
        raise ValueError(f"Dimension {input_dim} of the weight holds {size} entries, which is not a multiple of {m}.")
    grouped = (*weight.shape[:input_dim], size // m, m, *weight.shape[input_dim + 1 :])
    members = weight.detach().abs().reshape(grouped).unbind(input_dim + 1)
    # The rank of an entry in its group is the number of entries that must be dropped before it.
    ranks = [torch.zeros(members[0].shape, dtype=torch.int16, device=weight.device) for _ in range(m)]
    for first in range(m):
        for second in range(first + 1, m):
            first_is_larger = members[first] > members[second]
            ranks[first] += first_is_larger
            ranks[second] += ~first_is_larger
    return (torch.stack(ranks, dim=input_dim + 1) >= m - n).flatten(input_dim, input_dim + 1)


def pattern_masks(
    weights: Mapping[str, Tensor],
    pattern: tuple[int, int],
    sparsity: float | None = None,
    scope: Scope = "global",
    input_dims: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """Drop a part, or all, of the entries that an N:M pattern drops; the smallest magnitudes go first.

    Only entries that :func:`pattern_mask` would drop are candidates, so a sparsity that rises to ``1 - n / m`` ends
    in the exact pattern. At every sparsity exactly ``round(sparsity * total)`` entries are dropped.

    Args:
        weights: Finite tensors by layer name, see :func:`pattern_mask` for their shapes.
        pattern: ``(n, m)`` with ``0 < n < m``.
        sparsity: Fraction of entries to drop, in [0, 1 - n / m]; None for all the pattern drops.
        scope: ``"global"`` compares magnitudes across layers, ``"layer"`` only inside each.
        input_dims: Input dimension by layer name, 1 where it is not given.

    Returns:
        Boolean tensors by layer name, shaped like the weights; ``True`` marks a kept entry.

    Raises:
        ValueError: If a weight holds NaN or infinity, or an input dimension is not a multiple of m.

    Example:
        >>> weights = {"a": torch.tensor([[4.0, 3.0, 2.0, 1.0]]), "b": torch.tensor([[5.0, 6.0, 7.0, 8.0]])}
        >>> {name: mask.int().tolist() for name, mask in pattern_masks(weights, (2, 4), sparsity=0.25).items()}
        {'a': [[1, 1, 0, 0]], 'b': [[1, 1, 1, 1]]}
        >>> {name: mask.int().tolist() for name, mask in pattern_masks(weights, (2, 4)).items()}
        {'a': [[1, 1, 0, 0]], 'b': [[0, 0, 1, 1]]}
    """
    dims = input_dims or {}
    scores = {
        name: values.masked_fill(pattern_mask(values, pattern, dims.get(name, 1)), torch.inf)
        for name, values in magnitudes(weights).items()
    }
    return masks_from_scores(scores, pattern_sparsity(pattern) if sparsity is None else sparsity, scope)
