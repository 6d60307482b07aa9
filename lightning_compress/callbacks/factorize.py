"""`Factorize`: weights whose rank falls gradually, until two small layers compute what one did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_compress.callbacks.averages import averaged_modules
from lightning_compress.callbacks.compressor import Compressor
from lightning_compress.callbacks.decomposing import DecomposingCompressor, kept_state
from lightning_compress.callbacks.quantization import QuantizationAwareTraining
from lightning_compress.decomposition.candidates import candidates, rank_of, scheme_of, why_not_factorised
from lightning_compress.decomposition.factor_state import FactorState
from lightning_compress.decomposition.low_rank import SCHEMES, Scheme, full_rank
from lightning_compress.errors import CompressionError
from lightning_compress.selection import match_names
from lightning_compress.settings import plain

STATE_KEY = "factors"
"""Where the ranks lie in a checkpoint: ``checkpoint["lightning_compress"]["factors"]``."""


class Factorize(DecomposingCompressor):
    """Lower the rank of weights in the training, until two small layers compute what each layer did.

    Between ``start`` and ``end`` the rank of every weight falls from the full one to ``rank`` on a cubic schedule
    (Zhu & Gupta 2017): the best approximation of the new rank, of a singular value decomposition, takes the weight's
    place. After every optimizer step the weight is put back onto its rank. So the training knows of the factors, and
    the two layers compute what was trained.

    A linear layer becomes two. A convolution becomes, by the scheme ``"channel"``, one of its kernel to r channels and
    a 1x1 convolution (Zhang et al. 2016, arXiv:1505.06798); by ``"spatial"``, one of height x 1 and one of 1 x width
    (Jaderberg et al. 2014, arXiv:1405.3866). `compact` makes these layers on a copy, and `OnnxExport` writes them.

    The parameters stay plain leaf parameters under their own names and shapes. The ranks travel in every checkpoint.
    Layers whose factors would cost no fewer multiply-accumulates stay as they are (counted at each position of the
    output, with an input as wide as stride times output), and so do those of fewer than 16 channels where a share is
    asked for, as a first layer of grey images or one of ten classes, grouped and transposed convolutions and shared
    weights; `left_alone` tells which and why. Frozen layers are factorised too, unless they are excluded. Weights must
    be float32, as of ``precision="bf16-mixed"``: rounded to bfloat16 they are of full rank again.

    Args:
        rank: Channels between the factors: a share of the layer's output channels, or of what each of them reads
            where that is less, in (0, 1) (float); or a number (int).
        layers: Patterns of the names of layers to factorise; None for all where it pays.
        scheme: How convolutions over images become two; others, and linear layers, always are by channel.
        start: When the ranks begin to fall: a share of the run (float) or optimizer steps (int).
        end: When they have fallen to ``rank``: a share of the run (float) or optimizer steps (int).
        overrides: Other ranks, by patterns of layer names; the last that matches counts.
        exclude: Patterns of layer names to leave out; a pattern covers everything below the name it matches.
        update_every: Optimizer steps between two falls; None for at most 16 over the rise.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If a moment or a rank is neither a float nor an int.

    Example:
        >>> factors = Factorize(0.5, layers=["blocks.*"], scheme="spatial", overrides={"blocks.0": 8})
        >>> trainer = pl.Trainer(max_epochs=3, callbacks=[factors], logger=False)  # trainer.fit(model, data)
    """

    max_updates = 16
    clears_optimizers_each_step = False
    state_key = STATE_KEY
    refused: ClassVar[Mapping[type[Compressor], str]] = {
        **DecomposingCompressor.refused,
        QuantizationAwareTraining: "a rounded weight is of full rank, and what training would round is not its factors",
    }

    def __init__(
        self,
        rank: int | float = 0.5,
        *,
        layers: Sequence[str] | None = None,
        scheme: Scheme = "channel",
        start: int | float = 0.0,
        end: int | float = 0.5,
        overrides: Mapping[str, int | float] | None = None,
        exclude: Sequence[str] = (),
        update_every: int | None = None,
    ) -> None:
        super().__init__(start, end, exclude, update_every)
        self.rank = rank = plain(rank)
        self.overrides = dict(plain(overrides or {}))
        for name, one in (("rank", rank), *((f"overrides[{key!r}]", value) for key, value in self.overrides.items())):
            _check_rank(name, one)
        if scheme not in SCHEMES:
            raise ValueError(f"`scheme` must be one of {', '.join(SCHEMES)}, got {scheme!r}.")
        self.layers = None if layers is None else plain(layers)
        self.scheme: Scheme = scheme
        self._state = FactorState()
        self._targets: dict[str, int] = {}
        self._full: dict[str, int] = {}
        self._schemes: dict[str, Scheme] = {}

    @property
    @override
    def has_begun(self) -> bool:
        """Whether the rank of a weight has fallen."""
        return bool(self._state.bases)

    @property
    def ranks(self) -> dict[str, tuple[int, int]]:
        """The full rank of each weight and the one that it has, by the layer's name."""
        return {name: (full, self._state.ranks.get(name, full)) for name, full in self._full.items()}

    @override
    def shortfall(self, pl_module: pl.LightningModule) -> str:
        """Return what ranks were reached, and when the final ones would have been."""
        return (
            f"`Factorize` was at {self._share:.3f} of the full ranks, and {self._share_at(1.0):.3f} was due after step "
            f"{self._rise.end_step}"
        )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for name, weight in self._weights(pl_module).items():
            if weight.dtype not in (torch.float32, torch.float64):
                raise CompressionError(
                    f"The weight of layer `{name}` is {weight.dtype}, in which no low rank can be held. Train with "
                    '`precision="bf16-mixed"` or "16-mixed", which keep weights in float32.'
                )
        super().on_train_start(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # `WeightAveraging` that comes after this callback has moved its average once more: two weights of a rank have
        # a mean of twice that rank.
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._apply_to_averages(trainer)
        super().on_validation_start(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._apply_to_averages(trainer)
        super().on_train_epoch_end(trainer, pl_module)

    @property
    @override
    def _its_state(self) -> FactorState:
        return self._state

    @property
    @override
    def _chosen_layers(self) -> list[str]:
        return list(self._targets)

    @override
    def _take_state(self, pl_module: pl.LightningModule) -> None:
        self._state = kept_state(pl_module, STATE_KEY, FactorState)

    @property
    @override
    def _settings(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "layers": None if self.layers is None else list(self.layers),
            "scheme": self.scheme,
            "overrides": self.overrides,
            "exclude": list(self.exclude),
        }

    @property
    def _share(self) -> float:
        ranks = self.ranks.values()
        return sum(now for _, now in ranks) / sum(full for full, _ in ranks)

    def _share_at(self, part: float) -> float:
        return sum(self._rank_at(name, part) for name in self._full) / sum(self._full.values())

    def _rank_at(self, name: str, part: float) -> int:
        full, target = self._full[name], self._targets[name]
        return target + round((full - target) * (1.0 - part))

    @property
    @override
    def _progress(self) -> tuple[str, float]:
        return "compress/rank", self._share

    @property
    @override
    def _decisions(self) -> tuple[str, Any]:
        return "ranks of weights", self._state.ranks

    @override
    def _project(self, module: nn.Module, *optimizers: Optimizer) -> None:
        self._state.settle_(self._weights(module))

    @override
    def _apply(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *optimizers: Optimizer) -> None:
        self._state.retract_(self._weights(pl_module))
        self._apply_to_averages(trainer)

    def _apply_to_averages(self, trainer: pl.Trainer) -> None:
        for average in averaged_modules(trainer):
            self._state.retract_average_(self._weights(average))

    @override
    def _update(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        part = self._schedule(step)
        ranks = {name: self._rank_at(name, part) for name in self._targets}
        fallen = {name: rank for name, rank in ranks.items() if rank != self._state.ranks.get(name)}
        self._state.schemes = dict(self._schemes)
        self._state.truncate_(self._weights(pl_module), fallen)
        self._state.complete = step >= self._rise.end_step
        for average in averaged_modules(trainer):
            self._state.settle_(self._weights(average))

    @override
    def _select_layers(self, pl_module: pl.LightningModule) -> None:
        layers, self._left_alone = candidates(pl_module, self.exclude)
        names = [*layers, *self._left_alone]
        wanted = set(names) if self.layers is None else match_names(names, self.layers, "layers")
        ranks = self._overridden(names, self.rank, self.overrides)
        for pattern in self.overrides:
            if not match_names(names, [pattern], "overrides") & wanted:
                raise ValueError(
                    f"`overrides` names {pattern!r}, and `layers` leaves all of it as it is. Add it to `layers`, or "
                    "take it out of `overrides`."
                )
        self._schemes = {name: scheme_of(layer, self.scheme) for name, layer in layers.items() if name in wanted}
        self._targets, self._full = {}, {}
        for name, scheme in self._schemes.items():
            reason = why_not_factorised(layers[name], scheme, ranks[name])
            if reason:
                self._left_alone[name] = reason
            else:
                self._targets[name] = rank_of(layers[name], ranks[name])
                self._full[name] = full_rank(layers[name].get_parameter("weight").shape, scheme)
        self._left_alone = {name: reason for name, reason in self._left_alone.items() if name in wanted}
        self._check_none_named("layers", self.layers or ())
        self._check_none_named("overrides", list(self.overrides))
        self._check_any(pl_module, self._targets, "Ask for a smaller `rank`, or leave `Factorize` out.")

    def _weights(self, pl_module: nn.Module) -> dict[str, nn.Parameter]:
        return {name: pl_module.get_parameter(f"{name}.weight") for name in self._targets}

    @override
    def _check_state_fits(self, pl_module: pl.LightningModule) -> None:
        self._check_same_layers(list(self._state.ranks), list(self._targets), "ranks")


def _check_rank(name: str, rank: Any) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int | float):
        raise TypeError(
            f"`{name}` is a share of a layer's channels (float) or a number (int), got {type(rank).__name__}."
        )
    if isinstance(rank, float) and not 0.0 < rank < 1.0:
        raise ValueError(
            f"`{name}` as a float is a share of a layer's channels, in (0, 1), got {rank}. For a number pass an int."
        )
    if rank <= 0:
        raise ValueError(f"`{name}` as a number is at least 1, got {rank}.")
