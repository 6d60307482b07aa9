"""Runs that are killed and resumed; `benchmarks/kill_and_resume.py` kills many more."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from benchmarks.kill_and_resume import KillPoint, Reference, is_equal, killed_and_resumed, run_to_the_end
from lightning_compress import load_compressed_state
from lightning_compress.errors import CompressionError
from tests.compatibility.runs import LIGHTNING_NOISE
from tests.compatibility.table import refused, works
from tests.test_promises import Stateful, resumable
from tests.training import quiet_trainer
from tests.user_modules import Images, LayersOnSelf, loader

pytestmark = [pytest.mark.filterwarnings(*LIGHTNING_NOISE)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return run_to_the_end(tmp_path_factory.mktemp("whole") / "run")


POINTS = [
    KillPoint("pruning", 13, 0.4),
    KillPoint("quantized", 33, 0.7),
    KillPoint("frozen", 47, 0.1),
    KillPoint("export", 48, 0.5),
]


@works(
    "Stopping and resuming",
    "SIGKILL in every phase, resumed from a checkpoint inside an epoch or at its end",
    "weights, masks, ranges, optimizer and schedule state, history, metrics and the ONNX file are bit-identical",
)
@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.phase)
def test_a_killed_run_is_resumed_to_the_bit(point: KillPoint, reference: Reference, tmp_path: Path) -> None:
    row = killed_and_resumed(tmp_path / "run", point, reference)
    assert row["differences"] == ""
    assert row["killed after"] != "its end"
    assert row["resumed from step"] > 0
    assert row["file after the kill"] == "old" or point.phase == "export"


def test_the_comparison_sees_one_bit_and_one_type() -> None:
    state = {"a": [torch.tensor([1.0, 2.0]), {"b": 1}]}
    assert is_equal(state, {"a": [torch.tensor([1.0, 2.0]), {"b": 1}]})
    assert not is_equal(state, {"a": [torch.tensor([1.0, 2.0000002]), {"b": 1}]})
    assert not is_equal(state, {"a": [torch.tensor([1.0, 2.0]), {"b": 1.0}]})
    assert not is_equal(state, {"a": [torch.tensor([1.0, 2.0]), {"b": 1, "c": 2}]})
    assert not is_equal(state, {"a": [torch.tensor([1.0, 2.0])]})


class Noisy(LayersOnSelf):
    """Draws from every generator of random numbers that a step may use."""

    def forward(self, image: Tensor) -> Tensor:
        if self.training:
            image = F.dropout(image, 0.2) + 0.01 * float(np.random.rand()) + 0.01 * random.random()
        return super().forward(image)


class OneCycle(Noisy):
    """Asks for the length of the run, for which Lightning makes the loaders before it reads the checkpoint."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def shuffled() -> DataLoader[dict[str, Tensor]]:
    return DataLoader(Images(64), batch_size=8, shuffle=True)


def run(
    folder: Path,
    kind: type[LayersOnSelf] = Noisy,
    train: Any = None,
    *,
    seed: int = 0,
    keep: ModelCheckpoint | None = None,
    ckpt_path: Path | None = None,
    validation: bool = True,
) -> tuple[LayersOnSelf, L.Trainer]:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    module = kind()
    callbacks = [*resumable(folder), *([] if keep is None else [keep])]
    trainer = quiet_trainer(folder, callbacks, enable_checkpointing=keep is not None)
    train = shuffled() if train is None else train
    trainer.fit(module, train, loader(16, seed=1) if validation else None, ckpt_path=ckpt_path, weights_only=True)
    return module, trainer


def assert_same(found: L.Trainer, expected: L.Trainer) -> None:
    """The same weights and the same state of the optimizer."""
    assert is_equal(dict(found.lightning_module.state_dict()), dict(expected.lightning_module.state_dict()))
    assert is_equal(found.optimizers[0].state_dict(), expected.optimizers[0].state_dict())
    assert found.global_step == expected.global_step == 16


MOMENTS: dict[str, dict[str, Any]] = {
    "after training": {"every_n_epochs": 1, "save_on_train_epoch_end": True},
    "after validation": {"every_n_epochs": 1, "save_on_train_epoch_end": False},
    "in the last step": {"every_n_train_steps": 8},
}


@works(
    "Stopping and resuming",
    "dropout, Python's and numpy's random numbers, shuffling loaders, resumed at an epoch's end",
    "the state of all generators is in the checkpoint",
)
@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS)
def test_random_numbers_go_on_after_an_epoch(moment: dict[str, Any], tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, **moment)
    _, whole = run(tmp_path, keep=keep)
    _, resumed = run(tmp_path / "resumed", seed=5, ckpt_path=tmp_path / "step=8.ckpt")
    assert_same(resumed, whole)


@works(
    "Stopping and resuming",
    "the same inside an epoch, with a loader that knows its position (`state_dict`)",
    "also where `configure_optimizers` asks for `estimated_stepping_batches`",
)
@pytest.mark.parametrize("kind", [Noisy, OneCycle])
def test_a_stateful_loader_goes_on_inside_an_epoch(kind: type[LayersOnSelf], tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    _, whole = run(tmp_path, kind, Stateful(), keep=keep)
    for step in (2, 5, 8, 11, 14):
        _, resumed = run(tmp_path / f"{step}", kind, Stateful(), seed=5, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert_same(resumed, whole)


@works("Stopping and resuming", "`save_last=True` and `fit(ckpt_path='last')` in a new Trainer")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_new_trainer_finds_the_last_checkpoint(tmp_path: Path) -> None:
    _, whole = run(tmp_path / "whole")
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    module = Noisy()
    keep = ModelCheckpoint(tmp_path, save_last=True)
    first = quiet_trainer(tmp_path, [*resumable(tmp_path), keep, StopsAfterAnEpoch()], enable_checkpointing=True)
    with pytest.raises(ZeroDivisionError):
        first.fit(module, shuffled(), loader(16, seed=1))
    again = ModelCheckpoint(tmp_path, save_last=True)
    resumed = quiet_trainer(tmp_path, [*resumable(tmp_path), again], enable_checkpointing=True)
    resumed.fit(Noisy(), shuffled(), loader(16, seed=1), ckpt_path="last", weights_only=True)
    assert_same(resumed, whole)


class StopsAfterAnEpoch(L.Callback):
    """Ends the program as a kill would, before the second epoch."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 1:
            raise ZeroDivisionError


class Fails(Noisy):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step == 11:
            raise ZeroDivisionError


KEPT_ON_AN_ERROR: dict[str, Callable[[Path], L.Callback]] = {
    "ModelCheckpoint(save_on_exception=True)": lambda folder: ModelCheckpoint(
        folder, "failed", save_on_exception=True, save_top_k=0
    ),
    "OnExceptionCheckpoint": lambda folder: OnExceptionCheckpoint(folder, "failed"),
}


@works(
    "Stopping and resuming",
    "a checkpoint written on an exception (`save_on_exception=True`, `OnExceptionCheckpoint`)",
    "holds the random numbers too, except of several processes; Lightning goes on after the batch that failed",
)
@pytest.mark.filterwarnings("ignore:`?.fit.ckpt_path=")  # Lightning looks for a last checkpoint of its own
@pytest.mark.parametrize("make", KEPT_ON_AN_ERROR.values(), ids=KEPT_ON_AN_ERROR)
def test_a_checkpoint_written_on_an_error_holds_the_random_numbers(
    make: Callable[[Path], L.Callback], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    trainer = quiet_trainer(tmp_path, [*resumable(tmp_path), make(tmp_path)], enable_checkpointing=True)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(Fails(), Stateful(), loader(16, seed=1))
    state = torch.get_rng_state()
    saved = next(tmp_path.glob("*.ckpt"))
    (found,) = torch.load(saved, weights_only=True)["lightning_compress"]["random"]["processes"]
    assert torch.equal(found["torch"], state)
    _, resumed = run(tmp_path / "resumed", Noisy, Stateful(), seed=5, ckpt_path=saved)
    assert resumed.global_step > 11


@works(
    "Stopping and resuming",
    "a run that had ended, as after a kill in the export",
    "validation gives the inputs; the file and the report are those of the run that was not stopped",
)
def test_a_run_that_had_ended_is_only_exported(tmp_path: Path) -> None:
    _, whole = run(tmp_path, keep=ModelCheckpoint(tmp_path, save_last=True))
    (tmp_path / "resumed").mkdir()
    _, resumed = run(tmp_path / "resumed", seed=5, ckpt_path=tmp_path / "last.ckpt")
    assert_same(resumed, whole)
    for name in ("model.onnx", "report.json"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / name).read_bytes()


@refused(
    "Stopping and resuming",
    "a run that had ended, without a validation loader",
    "give one, or call `export_onnx` with example inputs; the weights are kept",
)
@pytest.mark.filterwarnings("ignore:The export failed", "ignore:You defined a `validation_step` but")
def test_a_run_that_had_ended_without_validation(tmp_path: Path) -> None:
    whole, _ = run(tmp_path, keep=ModelCheckpoint(tmp_path, save_last=True), validation=False)
    (tmp_path / "resumed").mkdir()
    with pytest.raises(CompressionError) as caught:
        run(tmp_path / "resumed", seed=5, ckpt_path=tmp_path / "last.ckpt", validation=False)
    assert str(caught.value) == (
        "The run had ended before it was resumed, so no step is left that `OnnxExport` could take inputs from. Resume "
        "it with a validation dataloader, or write the file with `export_onnx(model, example_inputs, path)`."
    )
    kept = LayersOnSelf.load_from_checkpoint(tmp_path / "resumed" / "model.onnx.ckpt")
    assert is_equal(dict(kept.state_dict()), dict(whole.state_dict()))


@works(
    "Stopping and resuming",
    "`save_weights_only=True`",
    "holds masks and ranges too, for `load_compressed_state`; Lightning resumes from whole checkpoints alone",
)
def test_a_checkpoint_of_weights_alone_starts_a_new_run(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_epochs=1, save_weights_only=True)
    whole, _ = run(tmp_path, keep=keep)
    saved = torch.load(tmp_path / "step=16.ckpt", weights_only=True)
    assert set(saved["lightning_compress"]) >= {"pruning", "quantization"}
    assert "optimizer_states" not in saved
    fresh = load_compressed_state(Noisy(), tmp_path / "step=16.ckpt")
    image = torch.rand(8, 1, 8, 8)
    assert torch.equal(fresh.eval()(image), whole.eval()(image))
