"""`FilterSharing`: channels whose filters draw together until one filter serves them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_compress.callbacks.decomposing import DecomposingCompressor, kept_state
from lightning_compress.decomposition.candidates import candidates, why_not_shared
from lightning_compress.decomposition.filter_groups import (
    GROUPINGS,
    OVERS,
    Grouping,
    Groups,
    Over,
    consecutive_groups,
    dim_of,
    similar_groups,
)
from lightning_compress.decomposition.sharing_state import SharingState
from lightning_compress.errors import CompressionError
from lightning_compress.processes import check_alike
from lightning_compress.selection import weight_layers
from lightning_compress.settings import plain

STATE_KEY = "sharing"
"""Where the groups lie in a checkpoint: ``checkpoint["lightning_compress"]["sharing"]``."""


class FilterSharing(DecomposingCompressor):
    """Let the channels of a group share one filter, their mean W = 1/R (w_1 + ... + w_R), so that it is applied once.

    At ``start`` the channels of every layer are put into groups of ``size``. From then on the filters of a group are
    drawn towards their mean, as in centripetal SGD (Ding et al. 2019, arXiv:1904.03837), and at ``end`` they are tied:
    one value, one gradient, one momentum. Without gradients, what is left of the gap between them after a step is 1
    less a cubic schedule's value of that step (Zhu & Gupta 2017), however many updates were made on the way.

    Over ``"inputs"`` the parts of all filters for the input channels of a group become alike: these channels are
    summed before one convolution of ``1/size`` as many inputs. Over ``"outputs"`` output channels become alike: one of
    each group is computed, and repeated with the channels' own biases. Both divide the multiply-accumulates and the
    weights of the layer by ``size``. `compact` makes these layers on a copy, and `OnnxExport` writes them.

    The parameters stay plain leaf parameters under their own names and shapes. The groups travel in every checkpoint.
    Together with `QuantizationAwareTraining` in the same fit tied filters stay tied when they are rounded, but the
    file has layers of the full shape: sums of rounded inputs lie on another grid. Quantize the small module in a
    second fit where it shall be small and in integers. Which layers keep their filters to themselves, and why, is told
    by `left_alone`: grouped and transposed convolutions, shared weights, layers of fewer than two groups, and over
    outputs the last layer of the module and of each network in it, in the order in which they were made. Where other
    layers make what the network returns, `exclude` them. Frozen layers are shared too, unless they are excluded.

    Args:
        size: Channels of a group, R; the last group of a layer may be smaller.
        over: Whether ``"inputs"`` or ``"outputs"`` share.
        groups: ``"similar"`` puts filters that are near to one another into a group, which needs weights that have
            been trained at ``start``; ``"consecutive"`` puts neighbours into one.
        start: When the groups are chosen: a share of the run (float) or optimizer steps (int).
        end: When the filters are tied: a share of the run (float) or optimizer steps (int).
        overrides: Other sizes, by patterns of layer names; the last that matches counts.
        exclude: Patterns of layer names to leave out; a pattern covers everything below the name it matches.
        update_every: Optimizer steps between two pulls; None for at most 100 over the rise.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If a moment is neither a float nor an int, or a size no int.

    Example:
        >>> sharing = FilterSharing(2, over="inputs", start=0.2, end=0.6, overrides={"conv2": 4})
        >>> trainer = pl.Trainer(max_epochs=3, callbacks=[sharing], logger=False)  # trainer.fit(model, data)
    """

    max_updates = 100
    clears_optimizers_each_step = False
    state_key = STATE_KEY

    def __init__(
        self,
        size: int = 2,
        *,
        over: Over = "inputs",
        groups: Grouping = "similar",
        start: int | float = 0.0,
        end: int | float = 0.5,
        overrides: Mapping[str, int] | None = None,
        exclude: Sequence[str] = (),
        update_every: int | None = None,
    ) -> None:
        super().__init__(start, end, exclude, update_every)
        self.size = size = plain(size)
        self.overrides = dict(plain(overrides or {}))
        for name, number in (("size", size), *((f"overrides[{key!r}]", one) for key, one in self.overrides.items())):
            if isinstance(number, bool) or not isinstance(number, int):
                raise TypeError(f"`{name}` is a number of channels, an int, got {type(number).__name__}.")
            if number < 2:
                raise ValueError(f"`{name}` is the number of channels that share a filter, at least 2, got {number}.")
        for name, value, known in (("over", over, OVERS), ("groups", groups, GROUPINGS)):
            if value not in known:
                raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {value!r}.")
        self.over: Over = over
        self.grouping: Grouping = groups
        self._state = SharingState()
        self._sizes: dict[str, int] = {}

    @property
    @override
    def has_begun(self) -> bool:
        """Whether filters have been drawn together."""
        return self._state.closed > 0.0

    @property
    def groups(self) -> dict[str, Groups]:
        """The channels of each group, by the layer's name; empty before ``start``."""
        return self._state.groups

    @override
    def shortfall(self, pl_module: pl.LightningModule) -> str:
        """Return how far the filters were drawn together, and when they would have been tied."""
        return (
            f"`FilterSharing` had closed {self._state.closed:.3f} of the gap between the filters, which were to be "
            f"tied after step {self._rise.end_step}"
        )

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Give tied filters one gradient, before it is clipped."""
        if self.complete:
            held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            weights = self._weights(pl_module)
            self._state.tie_gradients_(weights, [name for name, weight in weights.items() if id(weight) in held])

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_end(trainer, pl_module)
        self._state.rest()

    @property
    @override
    def _its_state(self) -> SharingState:
        return self._state

    @property
    @override
    def _chosen_layers(self) -> list[str]:
        return list(self._sizes)

    @override
    def _take_state(self, pl_module: pl.LightningModule) -> None:
        self._state = kept_state(pl_module, STATE_KEY, SharingState)

    @property
    @override
    def _settings(self) -> dict[str, Any]:
        return {
            "size": self.size,
            "over": self.over,
            "groups": self.grouping,
            "overrides": self.overrides,
            "exclude": list(self.exclude),
        }

    @property
    @override
    def _progress(self) -> tuple[str, float]:
        return "compress/filter_gap", 1.0 - self._state.closed

    @property
    @override
    def _decisions(self) -> tuple[str, Any]:
        return "groups of filters", self._state.groups

    @override
    def _project(self, module: nn.Module, *optimizers: Optimizer) -> None:
        self._state.tie_(self._weights(module), *optimizers)

    @override
    def _update(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        weights = self._weights(pl_module)
        if not self._state.groups:
            self._state.over = self.over
            self._state.groups = {name: self._chosen(name, weight) for name, weight in weights.items()}
            check_alike(*self._decisions)
        self._state.close_(weights, self._schedule(step))
        self._apply(trainer, pl_module, *trainer.optimizers)

    def _chosen(self, name: str, weight: nn.Parameter) -> Groups:
        filters = weight.detach().movedim(dim_of(self.over), 0).flatten(1)
        if self.grouping == "consecutive":
            return consecutive_groups(len(filters), self._sizes[name])
        if not bool(torch.isfinite(filters).all()):
            raise CompressionError(
                f"The weight of layer `{name}` holds NaN or infinite values, so that its filters cannot be compared."
            )
        return similar_groups(filters, self._sizes[name])

    @override
    def _select_layers(self, pl_module: pl.LightningModule) -> None:
        layers, self._left_alone = candidates(pl_module, self.exclude)
        sizes = self._overridden([*layers, *self._left_alone], self.size, self.overrides)
        last = _last_layers(pl_module)
        for name in layers:
            reason = why_not_shared(layers[name], self.over, sizes[name], is_last=name in last)
            if reason:
                self._left_alone[name] = reason
        self._check_none_named("overrides", list(self.overrides))
        self._sizes = {name: sizes[name] for name in layers if name not in self._left_alone}
        self._check_any(pl_module, self._sizes, "Exclude fewer, or leave `FilterSharing` out.")

    def _weights(self, pl_module: nn.Module) -> dict[str, nn.Parameter]:
        return {name: pl_module.get_parameter(f"{name}.weight") for name in self._sizes}

    @override
    def _check_state_fits(self, pl_module: pl.LightningModule) -> None:
        self._check_same_layers(list(self._state.groups), list(self._sizes), "shared filters")


def _last_layers(pl_module: nn.Module) -> set[str]:
    """Return the last layer of a module and of each network in it: what they make is likely to be returned."""
    networks = {"": pl_module, **{f"{name}.": child for name, child in pl_module.named_children()}}
    layers = {prefix: list(weight_layers(network)) for prefix, network in networks.items()}
    found = {f"{prefix}{names[-1]}" for prefix, names in layers.items() if names}
    return {name for name in found if not name.endswith(".")}  # a child that is a layer itself is no network
