"""Only scores that were measured under the full compression count, for checkpoints and for early stopping."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor

from lightning_compress import MagnitudePruning, OnnxExport, QuantizationAwareTraining
from lightning_compress.callbacks.rankings import Rankings
from tests.compatibility.runs import LIGHTNING_NOISE
from tests.training import quiet_trainer
from tests.user_modules import LayersOnSelf, loader

pytestmark = [pytest.mark.filterwarnings(*LIGHTNING_NOISE, "ignore:Checkpoint directory")]

# Epochs have 8 batches. Pruning is complete after step 20, and rounding begins with the step after it.
HALF_OF_THE_THIRD_EPOCH = 20


def pruning() -> MagnitudePruning:
    return MagnitudePruning(0.8, end=HALF_OF_THE_THIRD_EPOCH)


def rounding() -> QuantizationAwareTraining:
    return QuantizationAwareTraining(start=HALF_OF_THE_THIRD_EPOCH)


COMPRESSORS: dict[str, Callable[[Path], list[L.Callback]]] = {
    "pruning": lambda folder: [pruning()],
    "rounding": lambda folder: [rounding()],
    "both": lambda folder: [pruning(), rounding()],
    "both, the other way round": lambda folder: [rounding(), pruning()],
    "both and a file of the last weights": lambda folder: [
        pruning(),
        rounding(),
        OnnxExport(folder / "model.onnx", latency=False),
    ],
}


class Scored(LayersOnSelf):
    """Logs scores that fall: 100 in the first epoch, then 99 and so on; in training by steps."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.log("step_score", 1000.0 - self.trainer.global_step, on_step=True)
        self.log("epoch_score", 100.0 - self.current_epoch, on_step=False, on_epoch=True)
        return self.loss(batch)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self(batch["image"])
        self.log("score", 100.0 - self.current_epoch)


def fit(folder: Path, *callbacks: L.Callback, **settings: Any) -> L.Trainer:
    torch.manual_seed(0)
    trainer = quiet_trainer(folder, callbacks, enable_checkpointing=True, max_epochs=6)
    trainer.fit(Scored(), loader(), loader(16, seed=1), **settings)
    return trainer


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.ckpt"))


@pytest.mark.parametrize("compressors", COMPRESSORS.values(), ids=COMPRESSORS)
def test_the_best_checkpoint_is_a_compressed_one_without_the_others_left(
    compressors: Callable[[Path], list[L.Callback]], tmp_path: Path
) -> None:
    keep = ModelCheckpoint(tmp_path, "{epoch}", monitor="score", mode="max", save_last=True)
    fit(tmp_path, *compressors(tmp_path), keep)
    assert Path(keep.best_model_path).name == "epoch=2.ckpt"
    assert keep.best_model_score == 98.0
    assert files(tmp_path) == ["epoch=2.ckpt", "last.ckpt"]


def test_of_all_checkpoints_none_is_deleted(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, "{epoch}", monitor="score", mode="max", save_top_k=-1)
    fit(tmp_path, pruning(), keep)
    assert Path(keep.best_model_path).name == "epoch=2.ckpt"
    assert files(tmp_path) == [f"epoch={epoch}.ckpt" for epoch in range(6)]


def test_what_was_best_stays_until_a_compressed_checkpoint_is_written(tmp_path: Path) -> None:
    class LooksAtTheFolder(L.Callback):
        found: list[str]

        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            self.found = self.found if trainer.global_step > HALF_OF_THE_THIRD_EPOCH + 1 else files(tmp_path)

    look, keep = LooksAtTheFolder(), ModelCheckpoint(tmp_path, "{epoch}", monitor="score", mode="max")
    fit(tmp_path, pruning(), rounding(), look, keep)
    assert look.found == ["epoch=0.ckpt"]


# The step whose checkpoint is best: the first one after the first score that was measured wholly under compression.
FIRST = {
    # of the validation after step 24
    "score": (25, 98.0),
    # of step 22, as masks and rounding are in force together from step 21 on
    "step_score": (22, 1000.0 - 21.0),
    # of the fourth epoch, steps 25 to 32
    "epoch_score": (33, 97.0),
}


@pytest.mark.parametrize(("monitor", "step", "score"), [(name, *first) for name, first in FIRST.items()], ids=FIRST)
def test_no_checkpoint_is_ranked_by_a_score_from_before(monitor: str, step: int, score: float, tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, "{step}", monitor=monitor, mode="max", every_n_train_steps=1)
    fit(tmp_path, pruning(), rounding(), keep)
    assert Path(keep.best_model_path).name == f"step={step}.ckpt"
    assert keep.best_model_score == score
    assert files(tmp_path) == [f"step={step}.ckpt"]


def test_a_score_that_is_never_measured_again_ranks_nothing(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, "{step}", monitor="score", mode="max", every_n_train_steps=1)
    torch.manual_seed(0)
    trainer = quiet_trainer(
        tmp_path, [pruning(), keep], enable_checkpointing=True, max_epochs=3, check_val_every_n_epoch=2
    )
    trainer.fit(Scored(), loader(), loader(16, seed=1))
    assert keep.best_model_path == ""
    assert len(files(tmp_path)) == 1


class Falls(Scored):
    """Its loss is 1, 2, 3 and stays 3."""

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self(batch["image"])
        self.log("loss", min(1.0 + self.current_epoch, 3.0))


@pytest.mark.parametrize("is_first", [True, False], ids=["before ours", "after ours"])
@pytest.mark.parametrize("on_train_epoch_end", [True, False])
def test_early_stopping_begins_to_wait_anew(is_first: bool, on_train_epoch_end: bool, tmp_path: Path) -> None:
    stop = EarlyStopping("loss", patience=2, check_on_train_epoch_end=on_train_epoch_end)
    callbacks = [stop, pruning(), rounding()] if is_first else [pruning(), rounding(), stop]
    trainer = quiet_trainer(tmp_path, callbacks, max_epochs=8)
    trainer.fit(Falls(), loader(), loader(16, seed=1))
    # The third epoch is the best under compression; without a new beginning it would be the second to be waited for.
    assert (float(stop.best_score), stop.stopped_epoch) == (3.0, 4)


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_scores_count_as_ever_after_a_resume(epoch: int, tmp_path: Path) -> None:
    def run(ckpt_path: Path | None = None) -> tuple[str, float, int]:
        every = ModelCheckpoint(tmp_path / "every", "{epoch}", save_top_k=-1, save_on_train_epoch_end=False)
        best = ModelCheckpoint(
            tmp_path / "best", "{epoch}", monitor="loss", save_on_train_epoch_end=False, enable_version_counter=False
        )
        stop = EarlyStopping("loss", patience=2, check_on_train_epoch_end=False)
        callbacks = [pruning(), rounding(), stop, best, every]
        trainer = quiet_trainer(tmp_path, callbacks, enable_checkpointing=True, max_epochs=8)
        trainer.fit(Falls(), loader(), loader(16, seed=1), ckpt_path=ckpt_path)
        return Path(best.best_model_path).name, float(stop.best_score), stop.stopped_epoch

    assert run() == ("epoch=2.ckpt", 3.0, 4)
    assert run(tmp_path / "every" / f"epoch={epoch}.ckpt") == ("epoch=2.ckpt", 3.0, 4)


def test_what_is_not_measured_travels_in_checkpoints_and_copies() -> None:
    rankings = Rankings()
    rankings.are_final, rankings.unmeasured = True, ["score"]
    loaded = Rankings()
    loaded.load(rankings.save())
    for found in (loaded, copy.deepcopy(rankings)):
        assert (found.are_final, found.unmeasured) == (True, ["score"])
    loaded.load({})
    assert (loaded.are_final, loaded.unmeasured) == (False, [])
