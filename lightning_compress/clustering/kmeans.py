"""One-dimensional k-means: the values that stand best for many, by Lloyd's algorithm on sorted values."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Init = Literal["linear", "density", "random", "kmeans++"]
"""How centroids begin; the first three are those of Han, Mao & Dally 2016, section 3.2, arXiv:1510.00149."""

INITS: tuple[Init, ...] = get_args(Init)

MAX_ROUNDS = 300


class Clusters(NamedTuple):
    """What `kmeans` returns.

    Attributes:
        centroids: The values, in order, float64 of shape ``(K,)``; K is smaller where there are fewer different ones.
        codes: For every value the number of its centroid, int64 in the shape of the values.
    """

    centroids: Tensor
    codes: Tensor


def kmeans(values: Tensor, n_clusters: int, init: Init = "linear", seed: int = 0) -> Clusters:
    """Find centroids with about the least squared distance of every value to its nearest.

    Lloyd's algorithm, in which centroids without values begin anew, ends in a local minimum, which depends on ``init``:
    evenly spaced over the range (``"linear"``, which serves the few large weights best), over the ranks
    (``"density"``), values drawn at random (``"random"``), or drawn by their
    squared distance from those drawn before (``"kmeans++"``, Arthur & Vassilvitskii 2007).

    Args:
        values: Finite values, at least one, of any shape.
        n_clusters: How many centroids, at least 1.
        init: How they begin.
        seed: Of the random numbers of ``"random"`` and ``"kmeans++"``.

    Example:
        >>> found = kmeans(torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0]), 2)
        >>> found.centroids.tolist(), found.codes.tolist()
        ([0.5, 11.0], [0, 0, 1, 1, 1])
    """
    flat = values.detach().flatten().double().cpu()
    ordered, _ = flat.sort()
    distinct = torch.unique_consecutive(ordered)
    if len(distinct) <= n_clusters:
        return Clusters(distinct, torch.searchsorted(distinct, flat).view(values.shape))
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), ordered.cumsum(0)])
    centroids = _begin(ordered, n_clusters, init, torch.Generator().manual_seed(seed))
    for _ in range(MAX_ROUNDS):
        ends = torch.searchsorted(ordered, _borders(centroids), right=True)
        ends = torch.cat([torch.zeros(1, dtype=torch.long), ends, torch.tensor([len(ordered)])])
        counts = ends.diff()
        moved = (sums[ends[1:]] - sums[ends[:-1]]) / counts.clamp_min(1)
        empty = counts == 0
        if bool(empty.any()):  # such a centroid begins anew at one of the values that are worst off
            distances = _distances(distinct, moved[~empty].sort().values)
            moved[empty] = distinct[distances.topk(int(empty.sum())).indices]
        moved, _ = moved.sort()
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return Clusters(centroids, torch.searchsorted(_borders(centroids), flat).view(values.shape))


def _distances(values: Tensor, centroids: Tensor) -> Tensor:
    """Return how far every value is from the nearest centroid, both in order."""
    above = torch.searchsorted(centroids, values).clamp_max(len(centroids) - 1)
    return torch.minimum((values - centroids[above]).abs(), (values - centroids[(above - 1).clamp_min(0)]).abs())


def _borders(centroids: Tensor) -> Tensor:
    """Return where one centroid's values end and the next one's begin; the border is the lower one's."""
    return (centroids[:-1] + centroids[1:]) / 2


def _begin(ordered: Tensor, n_clusters: int, init: Init, generator: torch.Generator) -> Tensor:
    if init == "linear":
        return torch.linspace(float(ordered[0]), float(ordered[-1]), n_clusters, dtype=torch.float64)
    if init == "density":
        ranks = (torch.arange(n_clusters, dtype=torch.float64) + 0.5) / n_clusters * len(ordered)
        return ordered[ranks.long()]
    if init == "random":
        return ordered[torch.randperm(len(ordered), generator=generator)[:n_clusters]].sort().values
    chosen = [ordered[int(torch.randint(len(ordered), (), generator=generator))]]
    distances = (ordered - chosen[0]) ** 2
    for _ in range(n_clusters - 1):
        reached = distances.cumsum(0)
        drawn = torch.rand((), generator=generator, dtype=torch.float64) * reached[-1]
        chosen.append(ordered[min(int(torch.searchsorted(reached, drawn)), len(ordered) - 1)])
        distances = torch.minimum(distances, (ordered - chosen[-1]) ** 2)
    return torch.stack(chosen).sort().values
