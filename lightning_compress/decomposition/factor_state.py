"""Factorised weights of a model: of which rank they are, held there over steps, and carried in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_compress.decomposition.low_rank import (
    Scheme,
    as_matrix,
    as_weight,
    best_basis,
    full_rank,
    narrower_basis,
    projected,
    rank_error,
    retracted,
)
from lightning_compress.errors import CompressionError
from lightning_compress.settings import check_same_settings

ON_RANK = 1e-5
"""Largest part of a weight outside its rank, relative to its norm, that is rounding alone."""


class FactorState:
    """Of which rank the weights of one model are.

    It holds plain tensors and no reference to the model, so a deep copy of a model that carries it owns its ranks. The
    bases, in whose directions the weights lie, are what the next step begins from; see `retracted`.

    Attributes:
        ranks: Ranks by layer name; empty before any weight is changed.
        schemes: How each of these weights is a matrix.
        bases: As of `best_basis`, of those weights that are of less than full rank.
        complete: Whether the ranks are those that were asked for.
        settings: What the ranks are made by, as plain types; empty where nobody makes any.

    Example:
        >>> state, weight = FactorState(), torch.tensor([[3.0, 0.0], [0.0, 1.0]])
        >>> state.schemes = {"fc": "channel"}
        >>> state.truncate_({"fc": weight}, {"fc": 1})
        >>> weight
        tensor([[3., 0.],
                [0., 0.]])
    """

    def __init__(self) -> None:
        self.ranks: dict[str, int] = {}
        self.schemes: dict[str, Scheme] = {}
        self.bases: dict[str, Tensor] = {}
        self.complete = False
        self.settings: dict[str, Any] = {}

    @property
    def decided(self) -> bool:
        """Whether the weights have ranks."""
        return bool(self.ranks)

    def clear(self) -> None:
        """Forget all ranks."""
        self.ranks, self.schemes, self.bases, self.complete = {}, {}, {}, False

    @torch.no_grad()
    def truncate_(self, weights: Mapping[str, Tensor], ranks: Mapping[str, int]) -> None:
        """Put the best approximation of its rank in the place of every weight, in place.

        Args:
            weights: The parameters by layer name.
            ranks: The new ranks; each of these layers must have a scheme.

        Raises:
            CompressionError: If a weight is not finite.
        """
        for name, rank in ranks.items():
            self.ranks[name] = rank
            weight, scheme = weights[name], self.schemes[name]
            if not bool(torch.isfinite(weight).all()):
                raise CompressionError(
                    f"The weight of layer `{name}` holds NaN or infinite values, which cannot be factorised."
                )
            if rank < full_rank(weight.shape, scheme):
                matrix, basis = as_matrix(weight, scheme), self.bases.get(name)
                basis = None if basis is None else basis.to(weight.device)
                self.bases[name] = best_basis(matrix, rank) if basis is None else narrower_basis(matrix, basis, rank)
                weight.copy_(as_weight(projected(matrix, self.bases[name]), weight.shape, scheme))

    @torch.no_grad()
    def retract_(self, weights: Mapping[str, Tensor]) -> None:
        """Put the weights back onto their rank after a step, in place."""
        for name in self.bases:
            self.bases[name] = self._retract(name, weights[name], 1)

    @torch.no_grad()
    def retract_average_(self, weights: Mapping[str, Tensor]) -> None:
        """Put averages of the weights, which lag behind, onto the rank of the weights, in place."""
        for name in self.bases:
            self._retract(name, weights[name], 2)

    @torch.no_grad()
    def settle_(self, weights: Mapping[str, Tensor]) -> None:
        """Put the best approximation of its rank in the place of a weight that is not of it, in place.

        Unlike `retract_` it needs no weight nearby, and leaves weights that are of their rank as they are, to the bit.
        """
        for name, basis in self.bases.items():
            weight, scheme = weights[name], self.schemes[name]
            matrix = as_matrix(weight, scheme)
            if rank_error(matrix, basis.to(weight.device)) > ON_RANK:
                best = best_basis(matrix, basis.shape[1])
                weight.copy_(as_weight(projected(matrix, best), weight.shape, scheme))

    def is_obeyed(self, weights: Mapping[str, Tensor]) -> bool:
        """Tell whether all weights are of their rank."""
        return not self.broken(weights)

    def broken(self, weights: Mapping[str, Tensor]) -> list[str]:
        """Return the layers whose weights are of a higher rank, not finite, of another shape or not there."""
        found = []
        for name, basis in self.bases.items():
            if not self._fits(name, basis, weights.get(name)):
                found.append(name)
                continue
            matrix = as_matrix(weights[name].detach(), self.schemes[name])
            # Averages of the weights lie in other directions.
            is_in_basis = rank_error(matrix, self.bases[name].to(matrix.device)) <= ON_RANK
            if not is_in_basis and rank_error(matrix, best_basis(matrix, self.ranks[name])) > ON_RANK:
                found.append(name)
        return found

    def _fits(self, name: str, basis: Tensor, weight: Tensor | None) -> bool:
        if weight is None or (self.schemes[name] == "spatial" and weight.dim() != 4):
            return False
        matrix = as_matrix(weight.detach(), self.schemes[name])
        return basis.shape[0] == min(matrix.shape) and bool(torch.isfinite(matrix).all())

    def record(self) -> dict[str, dict[str, Any]]:
        """Return which layers are factorised, in the form of a `CompactRecord`."""
        return {name: {"scheme": self.schemes[name], "rank": self.ranks[name]} for name in self.bases}

    def save(self) -> dict[str, Any]:
        """Return the state as tensors and plain types."""
        return {
            "ranks": dict(self.ranks),
            "schemes": dict(self.schemes),
            "bases": {name: basis.cpu() for name, basis in self.bases.items()},
            "complete": self.complete,
            "settings": self.settings,
        }

    def load(self, saved: Mapping[str, Any]) -> None:
        """Take over what `save` returned; an empty dict clears it.

        Raises:
            CompressionError: If it was saved under other settings.
        """
        self.clear()
        if not saved:
            return
        check_same_settings(saved["settings"], self.settings)
        self.ranks, self.schemes, self.bases = dict(saved["ranks"]), dict(saved["schemes"]), dict(saved["bases"])
        self.complete, self.settings = saved["complete"], saved["settings"]

    def _retract(self, name: str, weight: Tensor, n_iterations: int) -> Tensor:
        scheme, basis = self.schemes[name], self.bases[name].to(weight.device)
        found, basis = retracted(as_matrix(weight.detach(), scheme), basis, n_iterations)
        weight.copy_(as_weight(found, weight.shape, scheme))
        return basis
