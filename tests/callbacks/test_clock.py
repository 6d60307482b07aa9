"""The one clock: what counts as a step, in every hook and after a resume."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_compress.callbacks.clock import completed_steps, total_steps

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),  # raised inside Lightning 2.6
]


class Automatic(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        loss: Tensor = self.layer(batch).sum()
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class TwoOptimizers(Automatic):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.zero_grad()
            self.manual_backward(self.layer(batch).sum())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD([self.layer.weight], lr=0.1), torch.optim.SGD([self.layer.bias], lr=0.1)]


class Watch(pl.Callback):
    """Writes the clock down in each hook."""

    def __init__(self) -> None:
        self.at_train_start = -1
        self.total: int | None = -1
        self.at_batch_start: list[int] = []
        self.at_batch_end: list[int] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.at_train_start = completed_steps(trainer)
        self.total = total_steps(trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.at_batch_start.append(completed_steps(trainer))

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.at_batch_end.append(completed_steps(trainer))


class SaveEachStep(pl.Callback):
    """Writes a checkpoint at the end of every batch, named by the clock."""

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir) / f"{completed_steps(trainer)}.ckpt")


class Stream(IterableDataset[Tensor]):
    """Ten samples of unknown number."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.ones(10, 2))


def batches(count: int) -> DataLoader[Tensor]:
    return DataLoader(torch.ones(count, 2), batch_size=1)  # type: ignore[arg-type]


def watched(
    model: pl.LightningModule, loader: DataLoader[Tensor], path: Path, resume: Path | None = None, **options: Any
) -> tuple[Watch, pl.Trainer]:
    watch = Watch()
    trainer = pl.Trainer(
        accelerator="cpu",
        callbacks=[watch, *options.pop("callbacks", [])],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=path,
        **{"enable_checkpointing": False, **options},
    )
    trainer.fit(model, loader, ckpt_path=resume)
    return watch, trainer


def test_a_step_is_an_optimizer_step(tmp_path: Path) -> None:
    watch, _ = watched(Automatic(), batches(3), tmp_path, max_epochs=2)
    assert watch.at_batch_start == [0, 1, 2, 3, 4, 5]
    assert watch.at_batch_end == [1, 2, 3, 4, 5, 6]
    assert watch.total == 6


def test_accumulated_batches_do_not_count(tmp_path: Path) -> None:
    watch, _ = watched(Automatic(), batches(5), tmp_path, max_epochs=2, accumulate_grad_batches=2)
    # Lightning steps on the last batch of an epoch as well: 3 steps in 5 batches.
    assert watch.at_batch_end == [0, 1, 1, 2, 3, 3, 4, 4, 5, 6]
    assert watch.total == 6


SCHEDULES = {
    # 5 batches an epoch; an epoch's last batch always steps.
    "later more": ({0: 1, 1: 4}, 5 + 2 + 2 + 2),
    "later two": ({0: 1, 1: 2}, 5 + 3 + 3 + 3),
    "later fewer": ({0: 4, 2: 1}, 2 + 2 + 5 + 5),
}


@pytest.mark.parametrize(("scheduling", "steps"), SCHEDULES.values(), ids=SCHEDULES)
def test_steps_under_a_schedule_of_accumulation_are_the_sum_over_the_epochs(
    tmp_path: Path, scheduling: dict[int, int], steps: int
) -> None:
    scheduler = GradientAccumulationScheduler(dict(scheduling))
    watch, _ = watched(Automatic(), batches(5), tmp_path, max_epochs=4, callbacks=[scheduler])
    assert watch.at_batch_end[-1] == watch.total == steps


def test_max_steps_end_a_run_with_a_schedule_of_accumulation(tmp_path: Path) -> None:
    scheduler = GradientAccumulationScheduler({0: 1, 1: 4})
    watch, _ = watched(Automatic(), batches(5), tmp_path, max_epochs=4, max_steps=8, callbacks=[scheduler])
    assert watch.at_batch_end[-1] == watch.total == 8


@pytest.mark.parametrize("max_epochs", [-1, 1])
def test_max_steps_of_a_stream_with_a_schedule_of_accumulation_are_known(tmp_path: Path, max_epochs: int) -> None:
    scheduler = GradientAccumulationScheduler({0: 2, 1: 4})
    watch, _ = watched(
        Automatic(), DataLoader(Stream()), tmp_path, max_epochs=max_epochs, max_steps=3, callbacks=[scheduler]
    )
    assert watch.at_batch_end[-1] == watch.total == 3


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")
@pytest.mark.parametrize(("scheduling", "steps"), SCHEDULES.values(), ids=SCHEDULES)
def test_a_schedule_of_accumulation_is_counted_from_its_first_epoch_after_a_resume(
    tmp_path: Path, scheduling: dict[int, int], steps: int
) -> None:
    def scheduler() -> pl.Callback:
        return GradientAccumulationScheduler(dict(scheduling))

    keep = ModelCheckpoint(tmp_path, "first", save_on_train_epoch_end=True)
    first, _ = watched(
        Automatic(), batches(5), tmp_path, max_epochs=1, callbacks=[scheduler(), keep], enable_checkpointing=True
    )
    watch, _ = watched(
        Automatic(), batches(5), tmp_path, resume=tmp_path / "first.ckpt", max_epochs=4, callbacks=[scheduler()]
    )
    assert watch.at_train_start == first.at_batch_end[-1]
    assert watch.at_batch_end[-1] == watch.total == steps


def test_under_manual_optimization_a_step_is_a_batch_however_many_optimizers_step(tmp_path: Path) -> None:
    watch, trainer = watched(TwoOptimizers(), batches(3), tmp_path, max_epochs=2)
    assert watch.at_batch_start == [0, 1, 2, 3, 4, 5]
    assert watch.at_batch_end == [1, 2, 3, 4, 5, 6]
    assert watch.total == 6
    assert trainer.global_step == 12


def test_max_steps_of_two_optimizers_are_half_as_many_batches(tmp_path: Path) -> None:
    watch, _ = watched(TwoOptimizers(), batches(3), tmp_path, max_epochs=-1, max_steps=10)
    assert watch.at_batch_end[-1] == watch.total == 5


def test_max_epochs_end_a_manual_run_that_max_steps_do_not(tmp_path: Path) -> None:
    watch, _ = watched(TwoOptimizers(), batches(3), tmp_path, max_epochs=2, max_steps=100)
    assert watch.at_batch_end[-1] == watch.total == 6


def test_max_steps_of_a_stream_of_unknown_length_are_known(tmp_path: Path) -> None:
    watch, _ = watched(Automatic(), DataLoader(Stream()), tmp_path, max_epochs=1, max_steps=4)
    assert watch.at_batch_end[-1] == watch.total == 4


def test_max_steps_of_a_manual_stream_are_known(tmp_path: Path) -> None:
    watch, _ = watched(TwoOptimizers(), DataLoader(Stream()), tmp_path, max_epochs=1, max_steps=8)
    assert watch.at_batch_end[-1] == watch.total == 4


def test_a_stream_of_unknown_length_has_no_known_end(tmp_path: Path) -> None:
    watch, _ = watched(Automatic(), DataLoader(Stream()), tmp_path, max_epochs=1)
    assert watch.total is None


def test_endless_epochs_have_no_known_end(tmp_path: Path) -> None:
    watch, _ = watched(Automatic(), batches(3), tmp_path, max_epochs=-1, max_time={"seconds": 0.05})
    assert watch.total is None


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("model_class", [Automatic, TwoOptimizers])
def test_the_clock_goes_on_where_the_checkpoint_was_written(
    tmp_path: Path, model_class: type[Automatic], step: int
) -> None:
    watched(model_class(), batches(3), tmp_path, max_epochs=2, callbacks=[SaveEachStep()])
    watch, _ = watched(model_class(), batches(3), tmp_path, resume=tmp_path / f"{step}.ckpt", max_epochs=2)
    assert watch.at_train_start == step
    assert watch.at_batch_end == list(range(step + 1, 7))
    assert watch.total == 6
