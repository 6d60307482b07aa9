"""What `FilterSharing` and `Factorize` have in common: layers for which smaller ones will stand, and their company."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from typing_extensions import override

from lightning_compress.callbacks.channel_pruning import ChannelPruning
from lightning_compress.callbacks.checkpoint import attach_state, attached_state
from lightning_compress.callbacks.clustering import WeightClustering
from lightning_compress.callbacks.compressor import Compressor
from lightning_compress.callbacks.gradual import GradualCompressor
from lightning_compress.callbacks.pruning import MagnitudePruning
from lightning_compress.callbacks.trainers import brings_back_weights_alone, has_late_layers
from lightning_compress.errors import CompressionError
from lightning_compress.selection import match_names
from lightning_compress.settings import plain


class DecompositionState(Protocol):
    """What is known of the decomposed weights of one model, and travels in its checkpoints."""

    settings: dict[str, Any]

    @property
    def decided(self) -> bool:
        """Whether it is decided what the weights become."""

    @property
    def complete(self) -> bool:
        """Whether the weights have their final form."""

    def clear(self) -> None:
        """Forget all."""

    def save(self) -> dict[str, Any]:
        """Return the state as tensors and plain types."""

    def load(self, saved: Mapping[str, Any]) -> None:
        """Take over what `save` returned."""


class DecomposingCompressor(GradualCompressor):
    """A compressor that brings weights gradually into a form for which `compact` puts smaller layers.

    Args:
        start: When the weights begin to change: a share of the run (float) or optimizer steps (int).
        end: When they have their form: a share of the run (float) or optimizer steps (int).
        exclude: Patterns of layer names to leave out.
        update_every: Optimizer steps between two updates.
    """

    state_key: ClassVar[str]
    """Where the state lies in a checkpoint."""

    refused: ClassVar[Mapping[type[Compressor], str]] = {
        MagnitudePruning: "single zeros would not last in weights that are tied or of low rank",
        WeightClustering: "the values that weights share would be moved apart again",
        ChannelPruning: "the channels that one removes are among those that the other replaces",
    }
    """Callbacks that cannot work in the same fit, and why."""

    def __init__(self, start: int | float, end: int | float, exclude: Sequence[str], update_every: int | None) -> None:
        start, end, update_every = plain((start, end, update_every))
        super().__init__(1.0, start, end, update_every)
        self.exclude = plain(exclude)
        self._left_alone: dict[str, str] = {}

    @property
    @abstractmethod
    def _its_state(self) -> DecompositionState:
        """The state of the module that is trained."""

    @abstractmethod
    def _take_state(self, pl_module: pl.LightningModule) -> None:
        """Take the state that a module carries, or a new one."""

    @property
    @abstractmethod
    def _chosen_layers(self) -> Sequence[str]:
        """The names of the layers that are decomposed."""

    @abstractmethod
    def _select_layers(self, pl_module: pl.LightningModule) -> None:
        """Decide which layers are decomposed."""

    @property
    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """What a checkpoint must agree on; a schedule may change, as when a run is made longer."""

    @abstractmethod
    def _check_state_fits(self, pl_module: pl.LightningModule) -> None:
        """Check that a state that was loaded is that of the layers that this run decomposes."""

    @property
    def left_alone(self) -> dict[str, str]:
        """Why layers stay as they are, by the layer's name."""
        return dict(self._left_alone)

    @property
    @override
    def complete(self) -> bool:
        """Whether the weights have the form for which smaller layers stand."""
        return self._its_state.complete

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._check_company(trainer)
        # The state belongs to the module: a second fit finds it, a deep copy of the module has its own.
        self._take_state(pl_module)
        self._its_state.settings = self._settings
        attach_state(pl_module, self.state_key, self._its_state.save, self._its_state.load)
        if stage == "fit" and not has_late_layers(pl_module):  # else only `on_fit_start` can tell
            self._select_layers(pl_module)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._select_layers(pl_module)
        super().on_fit_start(trainer, pl_module)
        frozen = [name for name in self._chosen_layers if not pl_module.get_parameter(f"{name}.weight").requires_grad]
        if frozen:
            rank_zero_warn(
                f"`{type(self).__name__}` changes frozen layers, which no gradient can repair: "
                f"{', '.join(f'`{name}`' for name in frozen[:5])}. Leave them out with `exclude`, or unfreeze them."
            )

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_end(trainer, pl_module)
        if brings_back_weights_alone(trainer):
            rank_zero_warn(
                f"Processes that are spawned end with the fit and bring back the weights alone, not what "
                f"`{type(self).__name__}` knows of them. Load a checkpoint with `load_compressed_state(model, path)` "
                'before `compact`, or use `strategy="ddp"`.'
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        step = self._last_step
        if step == 0:
            self._its_state.clear()  # a new run follows its schedule from the beginning
        self._check_state_fits(pl_module)
        overdue = not self._its_state.decided if step < self._rise.end_step else not self.complete
        if step >= self._rise.begin_step and overdue:
            self._update(trainer, pl_module, step)

    def _check_company(self, trainer: pl.Trainer) -> None:
        own = type(self).__name__
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            other = type(callback).__name__
            reason = next((why for kind, why in self.refused.items() if isinstance(callback, kind)), "")
            if isinstance(callback, DecomposingCompressor) and type(callback) is not type(self):
                reason = "each would undo the form that the other gives to the weights"
            if reason:
                raise CompressionError(
                    f"`{own}` and `{other}` do not work in one fit: {reason}. Fit with `{own}`, take the small module "
                    f"by `compact(model)`, and use `{other}` in a second fit on it; or leave one of them out."
                )

    def _overridden(self, names: Sequence[str], value: Any, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Return a value for each layer: that of the last pattern that matches, else ``value``."""
        values = dict.fromkeys(names, value)
        for pattern, other in overrides.items():
            values |= dict.fromkeys(match_names(names, [pattern], "overrides"), other)
        return values

    def _check_none_named(self, argument: str, patterns: Sequence[str]) -> None:
        """Check that no layer that is left alone is asked for by its very name."""
        for name in patterns:
            if name in self._left_alone:
                raise ValueError(
                    f"`{argument}` names `{name}`, which `{type(self).__name__}` cannot replace: it "
                    f"{self._left_alone[name]}. Take it out of `{argument}`."
                )

    def _check_any(self, pl_module: pl.LightningModule, found: Mapping[str, Any], way_out: str) -> None:
        if not found:
            reasons = "; ".join(f"`{name}` {reason}" for name, reason in list(self._left_alone.items())[:3])
            raise CompressionError(
                f"`{type(pl_module).__name__}` has no layer that `{type(self).__name__}` could replace"
                f"{f' ({reasons})' if reasons else ''}. {way_out}"
            )

    def _check_same_layers(self, found: Sequence[str], ours: Sequence[str], form: str) -> None:
        if found and list(found) != list(ours):
            raise CompressionError(
                f"The checkpoint holds {form} of the layers {sorted(found)}, but this run has {sorted(ours)}. Resume "
                "with the model and the `exclude` of the run that wrote it."
            )


def kept_state(pl_module: nn.Module, key: str, kind: type[Any]) -> Any:
    """Return the state that a module carries under a key, or a new one.

    Example:
        >>> kept_state(pl.LightningModule(), "factors", dict)
        {}
    """
    found = attached_state(pl_module, key, kind) if isinstance(pl_module, pl.LightningModule) else None
    return kind() if found is None else found
