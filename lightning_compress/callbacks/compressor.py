"""What the callbacks that compress weights have in common: they begin, and they are complete."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightning_compress.callbacks.checkpoint import attach_state, attached_state
from lightning_compress.callbacks.clock import Pace, completed_steps, set_accumulation
from lightning_compress.callbacks.rankings import Rankings

STATE_KEY = "completion"
"""Where it lies in a checkpoint whether all was complete: ``checkpoint["lightning_compress"]["completion"]``."""


class Compressor(pl.Callback):
    """A callback that compresses the weights of a module during a fit, until it is complete.

    The scores of checkpoints and of early stopping count from the moment on at which every compressor of the Trainer
    is complete. A subclass that overrides one of the hooks below calls that of this class too: in ``setup`` and
    ``on_train_start`` first, in ``on_train_batch_end`` last.
    """

    def __init__(self) -> None:
        super().__init__()
        self._rankings = Rankings()
        self._pace = Pace()

    @property
    @abstractmethod
    def complete(self) -> bool:
        """Whether the module has the full compression."""

    @property
    @abstractmethod
    def has_begun(self) -> bool:
        """Whether a weight has been changed yet."""

    @property
    @abstractmethod
    def moments(self) -> dict[str, float]:
        """The moments of the run that it was given, by the names of its arguments."""

    @abstractmethod
    def shortfall(self, pl_module: pl.LightningModule) -> str:
        """Return, for a sentence, what was reached instead of the full compression and when that would have been."""

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._rankings = attached_state(pl_module, STATE_KEY, Rankings) or Rankings()
            attach_state(pl_module, STATE_KEY, self._rankings.save, self._rankings.load)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if completed_steps(trainer) == 0:
            self._rankings.load({})  # a new run
        self._pace.begin(trainer)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        set_accumulation(trainer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._pace.check(trainer, type(self).__name__, self.moments)
        self._rankings.after_batch(trainer, is_complete(trainer))

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._rankings.after_epoch(trainer)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._rankings.before_validation(trainer)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._rankings.after_validation(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._rankings.after_training(trainer)
        has_exporter = any(isinstance(callback, Exporter) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        incomplete = [compressor for compressor in compressors(trainer) if not compressor.complete]
        if incomplete[:1] == [self] and not has_exporter:
            rank_zero_warn(f"{ended_early(trainer)} Resume the run to finish, or choose earlier moments.")


class Exporter(pl.Callback):
    """A callback that writes the network when the fit ends, and tells then what is missing of its compression."""


def ended_early(trainer: pl.Trainer) -> str:
    """Return the sentence that tells what is missing at the end of a fit, of all compressors together."""
    incomplete = [compressor for compressor in compressors(trainer) if not compressor.complete]
    reached = "; ".join(compressor.shortfall(trainer.lightning_module) for compressor in incomplete)
    return (
        f"The fit ended after {completed_steps(trainer)} optimizer steps, before the full compression was reached: "
        f"{reached}."
    )


def compressors(trainer: pl.Trainer) -> list[Compressor]:
    """Return the callbacks of ``trainer`` that compress weights.

    Example:
        >>> compressors(pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu"))
        []
    """
    return [item for item in trainer.callbacks if isinstance(item, Compressor)]  # type: ignore[attr-defined]


def is_complete(trainer: pl.Trainer) -> bool:
    """Tell whether every compressor of ``trainer`` is complete."""
    return all(compressor.complete for compressor in compressors(trainer))


def has_begun(trainer: pl.Trainer) -> bool:
    """Tell whether a compressor of ``trainer`` has changed a weight yet."""
    return any(compressor.has_begun for compressor in compressors(trainer))
