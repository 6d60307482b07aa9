"""Shared filters of a model: which are one, drawn together over steps, and carried in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_compress.decomposition.filter_groups import Groups, Over, dim_of, draw_together_, spread, stacked
from lightning_compress.settings import check_same_settings

TIED = 1e-6
"""Largest spread of tied filters, relative to the weight, that is rounding alone."""


class SharingState:
    """Which filters of one model are one.

    It holds plain types and no reference to the model, so a deep copy of a model that carries it owns its groups.

    Attributes:
        groups: Channels of each group, by layer name; empty before the groups are chosen.
        over: Whether these are input or output channels.
        closed: Which part of the gap between the filters is closed, in [0, 1]; at 1 they are tied.
        settings: What the groups are made by, as plain types; empty where nobody makes any.

    Example:
        >>> state, weight = SharingState(), torch.tensor([[0.0, 4.0, 5.0, 7.0]])
        >>> state.groups = {"fc": [[0, 1], [2, 3]]}
        >>> state.close_({"fc": weight}, 0.5), weight
        (None, tensor([[1.0000, 3.0000, 5.5000, 6.5000]]))
        >>> state.close_({"fc": weight}, 1.0), weight
        (None, tensor([[2., 2., 6., 6.]]))
    """

    def __init__(self) -> None:
        self.groups: dict[str, Groups] = {}
        self.over: Over = "inputs"
        self.closed = 0.0
        self.settings: dict[str, Any] = {}
        self._stacked: dict[tuple[str, torch.device], list[Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_stacked": {}}

    @property
    def decided(self) -> bool:
        """Whether the groups are chosen."""
        return bool(self.groups)

    @property
    def complete(self) -> bool:
        """Whether the filters of a group are one."""
        return bool(self.groups) and self.closed == 1.0

    def clear(self) -> None:
        """Forget all groups."""
        self.groups, self.closed, self._stacked = {}, 0.0, {}

    def close_(self, weights: Mapping[str, Tensor], part: float) -> None:
        """Draw the filters of each group together until ``part`` of the gap is closed, in place.

        What is left of a gap is multiplied by ``(1 - part) / (1 - closed)``. These factors multiply up to ``1 - part``
        however many there are: how far the gap is closed does not hang on how often that is done.

        Args:
            weights: The parameters by layer name.
            part: Part of the gap that is closed then, not below `closed`.
        """
        pull = 1.0 if part >= 1.0 else (part - self.closed) / (1.0 - self.closed)
        if pull > 0.0:
            for name in self.groups:
                self._draw_(name, weights[name].detach(), pull)
        self.closed = max(self.closed, min(part, 1.0))

    def tie_(self, weights: Mapping[str, Tensor], *optimizers: Optimizer) -> None:
        """Put the mean of its group in the place of every filter, in place, once the gap is closed.

        Args:
            weights: The parameters by layer name; each layer that has groups must be among them.
            *optimizers: The optimizers whose momentum and moments of the weights become one too.
        """
        if not self.complete:
            return
        for name in self.groups:
            weight = weights[name]
            self._draw_(name, weight.detach())
            for optimizer in optimizers:
                if weight in optimizer.state:  # reading a missing key of this defaultdict would add it
                    for value in optimizer.state[weight].values():
                        if isinstance(value, Tensor) and value.shape == weight.shape:
                            self._draw_(name, value)

    def tie_gradients_(self, weights: Mapping[str, Tensor], names: Iterable[str]) -> None:
        """Give tied filters one gradient, the mean of their own, in place.

        Args:
            weights: The parameters by layer name.
            names: The layers whose gradients these are.
        """
        for name in names:
            gradient = weights[name].grad
            if self.complete and gradient is not None:
                self._draw_(name, gradient)

    def is_obeyed(self, weights: Mapping[str, Tensor]) -> bool:
        """Tell whether the filters of every group are one."""
        return not self.broken(weights)

    def broken(self, weights: Mapping[str, Tensor]) -> list[str]:
        """Return the layers in which filters of a group differ, are not finite, as many no more, or not there."""
        found = []
        for name, groups in self.groups.items():
            weight = weights.get(name)
            n_channels = sum(map(len, groups))
            if weight is None or weight.shape[dim_of(self.over)] != n_channels or not torch.isfinite(weight).all():
                found.append(name)
                continue
            weight = weight.detach()
            gap = spread(weight, dim_of(self.over), stacked(groups, weight.device))
            if gap > TIED * float(weight.float().square().mean().sqrt()):
                found.append(name)
        return found

    def rest(self) -> None:
        """Free the memory that tying the filters in every step takes."""
        self._stacked = {}

    def record(self) -> dict[str, dict[str, Any]]:
        """Return which layers share filters, in the form of a `CompactRecord`."""
        return {name: {"over": self.over, "groups": groups} for name, groups in self.groups.items()}

    def save(self) -> dict[str, Any]:
        """Return the state as plain types."""
        return {"groups": dict(self.groups), "over": self.over, "closed": self.closed, "settings": self.settings}

    def load(self, saved: Mapping[str, Any]) -> None:
        """Take over what `save` returned; an empty dict clears it.

        Raises:
            CompressionError: If it was saved under other settings.
        """
        self.clear()
        if not saved:
            return
        check_same_settings(saved["settings"], self.settings)
        self.groups, self.over, self.closed = dict(saved["groups"]), saved["over"], saved["closed"]
        self.settings = saved["settings"]

    def _draw_(self, name: str, tensor: Tensor, pull: float = 1.0) -> None:
        key = (name, tensor.device)
        if key not in self._stacked:
            self._stacked[key] = stacked(self.groups[name], tensor.device)
        draw_together_(tensor, dim_of(self.over), self._stacked[key], pull)
