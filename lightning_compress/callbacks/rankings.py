"""What is ranked by scores, checkpoints and epochs without improvement: it begins anew at the full compression."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info


class Rankings:
    """Lets only scores count that were measured under the full compression.

    When it is reached, checkpoints from before it get the worst score there is. So they never count as best, and their
    `ModelCheckpoint` deletes them as it deletes others: when it has written better ones, of which it keeps
    ``save_top_k``. `EarlyStopping` begins to wait anew.

    A score may be older than the full compression and the checkpoint that it ranks younger: that of a validation
    before, or a mean over an epoch in which it was reached. So what is ranked by a score begins anew once more when the
    first one is there that was measured wholly after.

    Attributes:
        are_final: Whether the full compression has been reached.
        unmeasured: Names of the scores that were not measured since.
    """

    def __init__(self) -> None:
        self.are_final = False
        self.unmeasured: list[str] = []
        self._step = self._epoch = -1

    def after_batch(self, trainer: pl.Trainer, is_complete: bool) -> None:
        """Take note of the end of a training batch; call it as often as you like.

        Args:
            trainer: A Trainer in ``on_train_batch_end``.
            is_complete: Whether the full compression is in force.
        """
        if not is_complete:
            self.are_final, self.unmeasured = False, []
            return
        if not self.are_final:
            self.are_final, self._step, self._epoch = True, trainer.global_step, trainer.current_epoch
            self.unmeasured = sorted({ranking.monitor for ranking in _rankings(trainer) if ranking.monitor is not None})
            if self.unmeasured:
                rank_zero_info("The full compression is reached: scores from before it no longer count.")
            self._begin_anew(trainer, self.unmeasured)
        elif trainer.global_step != self._step:
            self._take_in_measured(trainer)

    def after_epoch(self, trainer: pl.Trainer) -> None:
        """Take note of the means over an epoch of training; those of the epoch it was reached in are of both sides."""
        if trainer.current_epoch != self._epoch:
            self._take_in_measured(trainer)

    def before_validation(self, trainer: pl.Trainer) -> None:
        """Take note that a validation begins: what it measures will count."""
        if self._counts(trainer):
            self._begin_anew(trainer, self.unmeasured)

    def after_validation(self, trainer: pl.Trainer) -> None:
        """Take note of what a validation has measured."""
        if self._counts(trainer):
            measured = self._measured(trainer)
            self.unmeasured = [name for name in self.unmeasured if name not in measured]

    def after_training(self, trainer: pl.Trainer) -> None:
        """Let nothing count that was never measured."""
        self._begin_anew(trainer, self.unmeasured)

    def save(self) -> dict[str, Any]:
        """Return the state as plain Python types."""
        return {"reached": self.are_final, "epoch": self._epoch, "unmeasured": self.unmeasured}

    def load(self, saved: dict[str, Any]) -> None:
        """Take over what `save` returned; an empty dict is a new run."""
        self.are_final = saved.get("reached", False)
        self.unmeasured = list(saved.get("unmeasured", ()))
        self._step, self._epoch = -1, saved.get("epoch", -1)

    @staticmethod
    def _counts(trainer: pl.Trainer) -> bool:
        return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking

    def _measured(self, trainer: pl.Trainer) -> list[str]:
        if not self.unmeasured or not trainer._results:
            return []  # reading metrics may wait for the device
        # `callback_metrics` also has what other loops and earlier epochs left.
        now = trainer._logger_connector.metrics["callback"]
        return [name for name in self.unmeasured if name in now]

    def _take_in_measured(self, trainer: pl.Trainer) -> None:
        measured = self._measured(trainer)
        self._begin_anew(trainer, measured)
        self.unmeasured = [name for name in self.unmeasured if name not in measured]

    @staticmethod
    def _begin_anew(trainer: pl.Trainer, monitors: Collection[str]) -> None:
        for ranking in _rankings(trainer):
            if ranking.monitor not in monitors:
                continue
            worst = torch.tensor(torch.inf if ranking.mode == "min" else -torch.inf)
            if isinstance(ranking, EarlyStopping):
                ranking.best_score, ranking.wait_count = worst, 0
            else:
                ranking.best_k_models, ranking.kth_value = dict.fromkeys(ranking.best_k_models, worst), worst
                ranking.best_model_path, ranking.best_model_score = "", None


def _rankings(trainer: pl.Trainer) -> list[ModelCheckpoint | EarlyStopping]:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, ModelCheckpoint | EarlyStopping)]
