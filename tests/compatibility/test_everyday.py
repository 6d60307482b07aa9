"""Lightning's own callbacks and flags, beside all of ours."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import pytorch_lightning
import torch
from lightning.pytorch import callbacks as lightning_callbacks
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from benchmarks.kill_and_resume import is_equal
from lightning_compress import MagnitudePruning, QuantizationAwareTraining, strip
from lightning_compress.errors import CompressionError
from lightning_compress.quantization import quantization_of
from lightning_compress.selection import plain_weights
from tests.compatibility.runs import (
    LIGHTNING_NOISE,
    SPARSITY,
    Run,
    assert_compressed,
    assert_ships,
    callbacks_of,
    fit,
    outputs_of,
)
from tests.compatibility.table import refused, works
from tests.test_promises import Stateful
from tests.training import all_callbacks, quiet_trainer
from tests.user_modules import Images, LayersOnSelf, ManualOptimization, NetWithKeywords, TwoNetworks, loader

pytestmark = [
    pytest.mark.filterwarnings(*LIGHTNING_NOISE),
    pytest.mark.filterwarnings(
        "ignore:.*StochasticWeightAveraging",
        "ignore:.*lr_scheduler",
        "ignore:.*configure_model",
        "ignore:The provided params to be frozen already exist",
        "ignore:You are trying to `self.log",
        "ignore:Nothing but zeros was observed",
        "ignore:The .grad attribute of a Tensor that is not a leaf",
    ),
]

LAST_GOOD = b"the last good file"

CALLBACKS: dict[str, Callable[[], L.Callback]] = {
    "`WeightAveraging`": lambda: lightning_callbacks.WeightAveraging(),
    "`EMAWeightAveraging`": lambda: lightning_callbacks.EMAWeightAveraging(decay=0.8),
    "`StochasticWeightAveraging`": lambda: lightning_callbacks.StochasticWeightAveraging(0.01, swa_epoch_start=0.75),
    "`EarlyStopping`": lambda: lightning_callbacks.EarlyStopping("val_loss", patience=9),
    "`GradientAccumulationScheduler`": lambda: lightning_callbacks.GradientAccumulationScheduler({0: 1, 1: 2}),
    "`Timer`": lambda: lightning_callbacks.Timer(),
}


@pytest.mark.parametrize("is_first", [True, False], ids=["before ours", "after ours"])
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=works("Lightning's callbacks", f"{name}, before and after ours")) for name in CALLBACKS],
)
def test_a_callback_of_lightning_before_and_after_ours(name: str, is_first: bool, tmp_path: Path) -> None:
    callback = (CALLBACKS[name](),)
    run = fit(tmp_path, first=callback if is_first else (), last=() if is_first else callback, max_epochs=4)
    assert_compressed(run)


class SavesEachEpoch(L.Callback):
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir) / f"{trainer.current_epoch}.ckpt")


ACCUMULATION = {
    # Of 8 batches an epoch.
    "later more": ({0: 1, 1: 4}, 8 + 2 + 2 + 2),
    "later two": ({0: 1, 1: 2}, 8 + 4 + 4 + 4),
    "later fewer": ({0: 4, 2: 1}, 2 + 2 + 8 + 8),
}


class FirstSteps(L.Callback):
    """Writes down after how many steps a batch first met the full sparsity, rounding and frozen batch norms."""

    def __init__(self) -> None:
        self.end: list[int] = []
        self.start: list[int] = []
        self.freeze: list[int] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        _, pruning, rounding, *_ = callbacks_of(trainer)
        assert isinstance(pruning, MagnitudePruning)
        assert isinstance(rounding, QuantizationAwareTraining)
        self.end += [trainer.global_step] * pruning.complete
        self.start += [trainer.global_step] * rounding.complete
        self.freeze += [trainer.global_step] * (not pl_module.get_submodule("bn1").training)


@pytest.mark.parametrize(("scheduling", "steps"), ACCUMULATION.values(), ids=ACCUMULATION)
@works("Lightning's callbacks", "`GradientAccumulationScheduler`: shares of the run", "of the steps of all epochs")
def test_shares_under_scheduled_accumulation(scheduling: dict[int, int], steps: int, tmp_path: Path) -> None:
    watch = FirstSteps()
    scheduler = lightning_callbacks.GradientAccumulationScheduler(dict(scheduling))
    run = fit(tmp_path, last=(scheduler, watch), max_epochs=4)
    assert_compressed(run)
    assert run.trainer.global_step == steps
    assert watch.end[0] == watch.start[0] == round(0.5 * steps)
    assert watch.freeze[0] == round(0.75 * steps)


@pytest.mark.parametrize("scheduling", [scheduling for scheduling, _ in ACCUMULATION.values()], ids=ACCUMULATION)
@works("Stopping and resuming", "`GradientAccumulationScheduler`, resumed inside an epoch", "bit-identical")
def test_scheduled_accumulation_is_resumed(scheduling: dict[int, int], tmp_path: Path) -> None:
    def run(folder: Path, *more: L.Callback, **settings: Any) -> Run:
        scheduler = lightning_callbacks.GradientAccumulationScheduler(dict(scheduling))
        return fit(folder, last=(scheduler, *more), max_epochs=4, data=(Stateful(), loader(16, seed=1)), **settings)

    keep = lightning_callbacks.ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=5)
    whole = run(tmp_path, keep, enable_checkpointing=True)
    for path in sorted(tmp_path.glob("*.ckpt")):
        resumed = run(tmp_path / path.stem, ckpt_path=path)
        assert_compressed(resumed)
        assert is_equal(dict(resumed.module.state_dict()), dict(whole.module.state_dict())), path.stem


@pytest.mark.parametrize("is_first", [True, False], ids=["before ours", "after ours"])
@works("Lightning's callbacks", "averaged weights in checkpoints", "they are under the masks, as the trained ones are")
def test_averages_in_checkpoints_are_under_the_masks(is_first: bool, tmp_path: Path) -> None:
    average = (lightning_callbacks.EMAWeightAveraging(decay=0.9),)
    fit(
        tmp_path,
        first=average if is_first else (),
        last=(*(() if is_first else average), SavesEachEpoch()),
        max_epochs=4,
    )
    saved = torch.load(tmp_path / "3.ckpt", weights_only=True)
    for weights in (saved["state_dict"], saved["current_model_state"]):
        pruned = [weights[f"{name}.weight"] for name in ("conv1", "conv2", "fc")]
        zeros = sum(int((weight == 0).sum()) for weight in pruned)
        assert zeros == round(0.8 * sum(weight.numel() for weight in pruned))
    assert not torch.equal(saved["state_dict"]["fc.weight"], saved["current_model_state"]["fc.weight"])


@works(
    "Lightning's callbacks",
    "`StochasticWeightAveraging`: its last epoch, which renews batch-norm statistics",
    "it does not count as a part of the run; statistics and ranges are renewed under the averaged weights",
)
def test_statistics_are_renewed_for_stochastically_averaged_weights(tmp_path: Path) -> None:
    callback = lightning_callbacks.StochasticWeightAveraging(0.01, swa_epoch_start=0.75)
    run = fit(tmp_path, last=(callback,), max_epochs=4)
    network = strip(copy.deepcopy(run.module))
    expected = copy.deepcopy(network)
    for norm in (expected.bn1, expected.bn2):
        assert isinstance(norm, nn.BatchNorm2d)
        norm.reset_running_stats()
        norm.momentum = None
    expected.train()
    with torch.no_grad():
        for batch in loader():
            expected(batch["image"])
    # The network's own statistics were gathered on rounded weights.
    for name in ("bn1.running_mean", "bn1.running_var", "bn2.running_mean", "bn2.running_var"):
        torch.testing.assert_close(network.state_dict()[name], expected.state_dict()[name], rtol=0.05, atol=0.05)
    assert run.quantization._freeze_step == 24  # three quarters of the 32 steps that train


class WithRate(LayersOnSelf):
    def __init__(self) -> None:
        super().__init__()
        self.lr = 0.05

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


@pytest.mark.parametrize("is_first", [True, False], ids=["before ours", "after ours"])
@works(
    "Lightning's callbacks",
    "`LearningRateFinder`, before and after ours",
    "it searches with the distillation term, in float",
)
def test_the_learning_rate_finder(is_first: bool, tmp_path: Path) -> None:
    finder = (lightning_callbacks.LearningRateFinder(num_training_steps=40),)
    run = fit(tmp_path, WithRate(), first=finder if is_first else (), last=() if is_first else finder)
    assert isinstance(run.module, WithRate)
    assert run.module.lr != 0.05
    assert_compressed(run)


class Resizable(L.LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.batch_size = 2

    def train_dataloader(self) -> Any:
        return DataLoader(Images(64), batch_size=self.batch_size)

    def val_dataloader(self) -> Any:
        return DataLoader(Images(16, seed=1), batch_size=self.batch_size)


@pytest.mark.parametrize("is_first", [True, False], ids=["before ours", "after ours"])
@works("Lightning's callbacks", "`BatchSizeFinder`, before and after ours")
def test_the_batch_size_finder(is_first: bool, tmp_path: Path) -> None:
    finder = (lightning_callbacks.BatchSizeFinder(steps_per_trial=1, max_trials=3),)
    data = Resizable()
    run = fit(tmp_path, first=finder if is_first else (), last=() if is_first else finder, data=data)
    assert data.batch_size > 2
    assert run.trainer.global_step == 2 * 64 / data.batch_size
    assert_compressed(run)


class WithBackbone(TwoNetworks):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = self.encoder

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05, momentum=0.9)


@works("Lightning's callbacks", "`BackboneFinetuning`", "what is still frozen is pruned and rounded with the rest")
def test_a_backbone_that_is_unfrozen_later(tmp_path: Path) -> None:
    run = fit(tmp_path, WithBackbone(), last=(lightning_callbacks.BackboneFinetuning(1),), max_epochs=4)
    assert_compressed(run)


@works(
    "Lightning's callbacks",
    '`ModelCheckpoint` on a monitor, and `OnnxExport(weights="best")`',
    "only what was measured and saved under the full compression counts as best",
)
def test_only_compressed_checkpoints_count_as_best(tmp_path: Path) -> None:
    keep = lightning_callbacks.ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=2)
    torch.manual_seed(0)
    module = LayersOnSelf()
    callbacks = [*all_callbacks(tmp_path, weights="best"), keep]
    trainer = quiet_trainer(tmp_path, callbacks, max_epochs=4, enable_checkpointing=True)
    trainer.fit(module, loader(), loader(16, seed=1))
    for path in keep.best_k_models:
        states = torch.load(path, weights_only=True)["lightning_compress"]
        assert states["pruning"]["complete"]
        assert states["quantization"]["is_quantizing"]
    best = LayersOnSelf.load_from_checkpoint(keep.best_model_path)
    module.load_state_dict(best.state_dict())
    assert_ships(module, tmp_path / "model.onnx")


SETTINGS: dict[str, dict[str, Any]] = {
    "`accumulate_grad_batches`": {"accumulate_grad_batches": 3},
    "`max_steps`": {"max_steps": 10, "max_epochs": None},
    "`limit_train_batches`, `limit_val_batches`": {"limit_train_batches": 3, "limit_val_batches": 1},
    "`overfit_batches`": {"overfit_batches": 4},
    "`num_sanity_val_steps`": {"num_sanity_val_steps": 2},
    "`reload_dataloaders_every_n_epochs`": {"reload_dataloaders_every_n_epochs": 1},
    "`gradient_clip_val`": {"gradient_clip_val": 0.5},
    "`detect_anomaly`": {"detect_anomaly": True},
    "`val_check_interval` inside an epoch": {"val_check_interval": 2},
    "`inference_mode=False`": {"inference_mode": False},
    "`barebones`": {
        "barebones": True,
        "logger": None,
        "enable_checkpointing": None,
        "enable_progress_bar": None,
        "enable_model_summary": None,
        "num_sanity_val_steps": None,
    },
}


@pytest.mark.filterwarnings("ignore:You have turned on `Trainer.detect_anomaly", "ignore:You requested to overfit")
@pytest.mark.parametrize("name", [pytest.param(name, marks=works("Flags of the Trainer", name)) for name in SETTINGS])
def test_a_flag_of_the_trainer(name: str, tmp_path: Path) -> None:
    assert_compressed(fit(tmp_path, **SETTINGS[name]))


@works("Flags of the Trainer", "`limit_val_batches=0`, or no validation", "training batches verify the file")
def test_a_run_without_validation(tmp_path: Path) -> None:
    assert_compressed(fit(tmp_path, limit_val_batches=0))


@works("Flags of the Trainer", "`fast_dev_run`", "nothing is written over a real file")
def test_a_dry_run_leaves_files_alone(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("the last good file")
    run = fit(tmp_path, fast_dev_run=True)
    assert run.trainer.global_step == 1
    assert (tmp_path / "model.onnx").read_text() == "the last good file"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx"]


def in_steps(folder: Path) -> list[L.Callback]:
    """Return the callbacks with moments in optimizer steps instead of shares of the run."""
    teacher, _, _, export = all_callbacks(folder)
    return [teacher, MagnitudePruning(0.8, start=0, end=4), QuantizationAwareTraining(start=4, freeze=6), export]


@works("Flags of the Trainer", "`max_time` with moments in optimizer steps")
def test_a_run_that_ends_by_the_clock(tmp_path: Path) -> None:
    torch.manual_seed(0)
    trainer = quiet_trainer(tmp_path, in_steps(tmp_path), max_time={"seconds": 3}, max_epochs=-1)
    module = LayersOnSelf()
    trainer.fit(module, loader(), loader(16, seed=1))
    assert_compressed(Run(module, trainer, tmp_path))


def assert_last_good_file_stays(run: Run) -> None:
    """What lay at the path is as it was, and the incomplete network lies beside it."""
    target = run.folder / "model.incomplete.onnx"
    assert (run.folder / "model.onnx").read_bytes() == LAST_GOOD
    assert (run.folder / "report.json").read_bytes() == LAST_GOOD
    assert run.export.result is not None
    assert run.export.result.path == target
    assert run.export.report is not None
    assert "before the full compression was reached" in run.export.report.notes[0]
    assert (run.folder / "report.incomplete.json").exists()
    images = Images(16, seed=3).images
    with torch.no_grad():
        expected = copy.deepcopy(run.module).eval()(images)
    torch.testing.assert_close(outputs_of(target, images), expected, atol=1e-4, rtol=1e-4)


def put_last_good_files(folder: Path) -> None:
    for name in ("model.onnx", "report.json"):
        (folder / name).write_bytes(LAST_GOOD)


@pytest.mark.filterwarnings("default:The fit ended after")
@works(
    "Lightning's callbacks",
    "`EarlyStopping` that stops before the full compression",
    "the last good file stays, the network goes to `NAME.incomplete.onnx`, one warning tells how to finish",
)
def test_a_run_that_is_stopped_before_its_full_compression(tmp_path: Path) -> None:
    put_last_good_files(tmp_path)
    stop = lightning_callbacks.EarlyStopping("val_loss", patience=1, min_delta=100.0)
    keep = lightning_callbacks.ModelCheckpoint(tmp_path / "kept", "{step}")
    with pytest.warns(UserWarning, match="The fit ended") as caught:
        run = fit(tmp_path, last=(stop, keep), max_epochs=8, enable_checkpointing=True)
    assert [str(warning.message) for warning in caught if "fit ended" in str(warning.message)] == [
        "The fit ended after 16 optimizer steps, before the full compression was reached: `MagnitudePruning` was at a "
        "sparsity of 0.7000, and the full 0.8000 was due after step 32; `QuantizationAwareTraining` left the model in "
        f"float, as rounding was due after step 32. The incomplete network goes to {tmp_path / 'model.incomplete.onnx'}"
        f"; {tmp_path / 'model.onnx'} is left as it is. Resume the run to finish, or choose earlier moments."
    ]
    assert_last_good_file_stays(run)
    assert_compressed(fit(tmp_path, max_epochs=8, ckpt_path=tmp_path / "kept" / "step=16.ckpt"))


@works("Lightning's callbacks", "`EarlyStopping` that stops after the full compression", "it waits anew from there on")
def test_a_run_that_is_stopped_after_its_full_compression(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = LayersOnSelf()
    stop = lightning_callbacks.EarlyStopping("val_loss", patience=2, min_delta=100.0)
    trainer = quiet_trainer(tmp_path, [*in_steps(tmp_path), stop], max_epochs=8)
    trainer.fit(module, loader(), loader(16, seed=1))
    assert stop.stopped_epoch == 2
    assert_compressed(Run(module, trainer, tmp_path))


@pytest.mark.filterwarnings("default:The fit ended after")
@works(
    "Flags of the Trainer",
    "`max_time` that ends a run before the shares it was given",
    "as under `EarlyStopping`: the last good file stays",
)
def test_a_run_that_ends_by_the_clock_before_its_full_compression(tmp_path: Path) -> None:
    put_last_good_files(tmp_path)
    with pytest.warns(
        UserWarning, match="before the full compression was reached: `MagnitudePruning` was at"
    ) as caught:
        run = fit(tmp_path, max_epochs=100_000, max_time={"seconds": 1})
    assert sum("fit ended" in str(warning.message) for warning in caught) == 1
    assert_last_good_file_stays(run)


class Stream(IterableDataset[dict[str, Tensor]]):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        images = Images(64)
        return (images[index] for index in range(len(images)))


ENDLESS: dict[str, dict[str, Any]] = {
    "max_time": {"max_time": {"seconds": 30}, "max_epochs": -1},
    "epochs": {"max_epochs": 2},
}


@refused(
    "Flags of the Trainer",
    "shares of a run without a known end: `max_epochs=-1`, or a loader without length",
    "give moments in optimizer steps, or `max_steps`",
)
@pytest.mark.parametrize("settings", ENDLESS.values(), ids=ENDLESS)
def test_shares_of_an_endless_run_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"this run has no known end\. Pass `start` as an int"):
        fit(tmp_path, data=(DataLoader(Stream(), batch_size=8), loader(16, seed=1)), **settings)


@works("Data", "iterable datasets without length, with `max_steps`")
def test_a_stream_without_a_length(tmp_path: Path) -> None:
    data = (DataLoader(Stream(), batch_size=8), loader(16, seed=1))
    assert_compressed(fit(tmp_path, data=data, max_steps=12, max_epochs=None))


class Gan(LayersOnSelf):
    """Two optimizers by hand; the discriminator is the network."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        generator, discriminator = self.optimizers()  # type: ignore[attr-defined]
        made = self.generator(torch.randn(len(batch["image"]), 8)).view(-1, 1, 8, 8)
        self.toggle_optimizer(generator)
        generator.zero_grad()
        self.manual_backward(-self(made)[:, 0].mean())
        generator.step()
        self.untoggle_optimizer(generator)
        self.toggle_optimizer(discriminator)
        discriminator.zero_grad()
        self.manual_backward(self(made.detach())[:, 0].mean() + F.cross_entropy(self(batch["image"]), batch["label"]))
        discriminator.step()
        self.untoggle_optimizer(discriminator)

    def configure_optimizers(self) -> Any:
        network = [parameter for name, parameter in self.named_parameters() if not name.startswith("generator")]
        return torch.optim.Adam(self.generator.parameters(), 1e-3), torch.optim.Adam(network, 1e-3)


@works("Optimization", "several optimizers by hand, as of a GAN", "a step is a training batch")
def test_a_small_gan(tmp_path: Path) -> None:
    run = fit(tmp_path, Gan())
    assert run.trainer.global_step == 32
    assert_compressed(run)
    assert run.quantization.quantization.unreached_layers() == []


@works("Optimization", "manual optimization")
def test_manual_optimization(tmp_path: Path) -> None:
    assert_compressed(fit(tmp_path, ManualOptimization()))


class TwiceABatch(ManualOptimization):
    """Two steps in every training batch."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor | None:
        super().training_step(batch, batch_idx)
        return super().training_step(batch, batch_idx)


class EveryFourthBatch(ManualOptimization):
    """Accumulates the gradients of four batches."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor | None:
        optimizer: Any = self.optimizers()
        self.manual_backward(self.loss(batch) / 4)
        if batch_idx % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
        return None


class SecondOptimizerRarely(Gan):
    """Its first batch is like any other; from the second on one of two optimizers rests."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        if batch_idx == 0:
            return super().training_step(batch, batch_idx)
        _, discriminator = self.optimizers()  # type: ignore[attr-defined]
        discriminator.zero_grad()
        self.manual_backward(self.loss(batch))
        discriminator.step()
        return None


PACES: dict[str, tuple[type[LayersOnSelf], int, str]] = {
    "two a batch": (TwiceABatch, 1, "After 1 of them the optimizers have made 2 steps instead of 1."),
    "every fourth batch": (EveryFourthBatch, 1, "After 1 of them the optimizers have made 0 steps instead of 1."),
    "one of two": (SecondOptimizerRarely, 2, "After 2 of them the optimizers have made 3 steps instead of 4."),
}


@pytest.mark.parametrize(("kind", "batches", "sentence"), PACES.values(), ids=PACES)
@refused(
    "Optimization",
    "manual optimization with `max_steps` and shares of the run, where an optimizer does not step once a batch",
    "after the first batch that shows it: give moments in training batches, or `max_epochs`",
)
def test_manual_steps_at_another_pace_are_refused(
    kind: type[LayersOnSelf], batches: int, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(CompressionError) as caught:
        fit(tmp_path, kind(), max_steps=16, max_epochs=-1)
    assert str(caught.value) == (
        "`MagnitudePruning` has shares of the run (end=0.5), whose length was taken from `max_steps=16` with one step "
        f"of each optimizer in a training batch. {sentence} Pass the moments as ints (training batches), or end the "
        "run by `max_epochs` instead of `max_steps`."
    )


LENGTHS: dict[str, dict[str, Any]] = {
    "max_epochs": {"max_epochs": 2},
    "max_epochs before max_steps": {"max_epochs": 2, "max_steps": 33},
}


@works("Optimization", "two steps a batch by hand, with `max_epochs`, or moments in training batches")
@pytest.mark.parametrize("settings", LENGTHS.values(), ids=LENGTHS)
def test_manual_steps_at_another_pace(settings: dict[str, Any], tmp_path: Path) -> None:
    assert_compressed(fit(tmp_path, TwiceABatch(), **settings))


@works("Optimization", "two steps a batch by hand, with `max_epochs`, or moments in training batches")
def test_manual_steps_at_another_pace_with_moments_in_batches(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, trainer = TwiceABatch(), quiet_trainer(tmp_path, in_steps(tmp_path), max_steps=16, max_epochs=-1)
    trainer.fit(module, loader(), loader(16, seed=1))
    assert_compressed(Run(module, trainer, tmp_path))


@works("Modules", "a second fit by the same Trainer, by another, and of another module with the same callbacks")
def test_callbacks_are_used_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, callbacks = LayersOnSelf(), all_callbacks(tmp_path)
    data = loader(), loader(16, seed=1)
    trainer = quiet_trainer(tmp_path, callbacks)
    trainer.fit(module, *data)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, *data)
    assert_compressed(Run(module, trainer, tmp_path))
    another = quiet_trainer(tmp_path, callbacks)
    another.fit(module, *data)
    assert_compressed(Run(module, another, tmp_path))
    other, third = LayersOnSelf(), quiet_trainer(tmp_path, callbacks)
    third.fit(other, *data)
    assert_compressed(Run(other, third, tmp_path))


@works("Modules", "a second fit with other bits", "the module is prepared anew")
def test_a_second_fit_with_other_bits(tmp_path: Path) -> None:
    run = fit(tmp_path)
    quantization = QuantizationAwareTraining(weight_bits=4, activation_bits=4, start=0.5)
    trainer = quiet_trainer(tmp_path, [quantization])
    trainer.fit(run.module, loader(), loader(16, seed=1))
    found = quantization_of(run.module)
    assert found is quantization.quantization
    assert set(found.layer_bits.values()) == {4, 8}


@works("Modules", "`deepcopy` and `pickle` of the trained module")
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["copy", "pickle"]
)
def test_a_copy_of_the_trained_module_computes_the_same(copied: Callable[[Any], Any], tmp_path: Path) -> None:
    module = fit(tmp_path).module.eval()
    twin, images = copied(module), Images(8, seed=3).images
    with torch.no_grad():
        assert torch.equal(twin(images), module(images))
        assert not torch.equal(strip(twin)(images), module(images))


class LateLayers(LayersOnSelf):
    def __init__(self) -> None:
        L.LightningModule.__init__(self)

    def make(self) -> None:
        if not hasattr(self, "fc"):
            for name, child in LayersOnSelf().named_children():
                setattr(self, name, child)


class InSetup(LateLayers):
    def setup(self, stage: str) -> None:
        self.make()


class InConfigureModel(LateLayers):
    def configure_model(self) -> None:
        self.make()


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(InSetup, marks=works("Modules", "layers made in the module's `setup`")),
        pytest.param(InConfigureModel, marks=works("Modules", "layers made in `configure_model`")),
    ],
)
def test_layers_that_are_made_late(kind: type[LateLayers], tmp_path: Path) -> None:
    run = fit(tmp_path, kind())
    assert_compressed(run)
    run.trainer.save_checkpoint(tmp_path / "end.ckpt")
    again = quiet_trainer(tmp_path, all_callbacks(tmp_path)[1:3])
    fresh = kind()
    found = again.test(fresh, loader(), ckpt_path=tmp_path / "end.ckpt", verbose=False)
    assert found == run.trainer.test(run.module, loader(), verbose=False)


class BringsItsCallbacks(LayersOnSelf):
    folder = Path()

    def configure_callbacks(self) -> list[L.Callback]:
        return all_callbacks(self.folder)


@works("Modules", "callbacks from `configure_callbacks`")
def test_callbacks_that_the_module_brings(tmp_path: Path) -> None:
    module = BringsItsCallbacks()
    module.folder = tmp_path
    trainer = quiet_trainer(tmp_path)
    trainer.fit(module, loader(), loader(16, seed=1))
    assert_compressed(Run(module, trainer, tmp_path))


class CompiledPart(NetWithKeywords):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(self.net, backend="eager")  # type: ignore[assignment]


def compiled_in_place(module: L.LightningModule) -> L.LightningModule:
    module.compile(backend="eager")
    return module


COMPILED: dict[str, Callable[[], Any]] = {
    "`torch.compile(module)`": lambda: torch.compile(LayersOnSelf(), backend="eager"),
    "`module.compile()`": lambda: compiled_in_place(LayersOnSelf()),
    "`self.net = torch.compile(...)`": CompiledPart,
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=works("Modules", f"{name} before the fit")) for name in COMPILED]
)
@pytest.mark.usefixtures("nothing_compiled")
def test_a_module_that_was_compiled_before(name: str, tmp_path: Path) -> None:
    run = fit(tmp_path, COMPILED[name]())
    assert_compressed(run)
    before = quantization_of(run.module)
    fit(tmp_path, COMPILED[name]())
    assert before is not None
    strip(run.module)
    assert quantization_of(run.module) is None


@refused("Packages", "a Trainer of `pytorch_lightning`", "import `lightning.pytorch` instead")
@pytest.mark.parametrize("position", range(4))
def test_a_trainer_of_the_other_package_is_refused(position: int, tmp_path: Path) -> None:
    class Module(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 4)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.fc(batch["image"].flatten(1)).sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    callback: Any = all_callbacks(tmp_path)[position]
    trainer = pytorch_lightning.Trainer(
        max_epochs=1, callbacks=[callback], logger=False, accelerator="cpu", enable_checkpointing=False
    )
    with pytest.raises(CompressionError) as caught:
        trainer.fit(Module(), loader())
    assert str(caught.value) == (
        f"`{type(callback).__name__}` belongs to the package `lightning`, and this Trainer comes from "
        "`pytorch_lightning`, whose classes are others of the same names. Write `import lightning.pytorch as pl` "
        "instead of `import pytorch_lightning as pl`, for the Trainer and for the LightningModule."
    )


class SwapsWeights(torch.optim.SGD):
    """Has other weights for evaluation than for training, as schedule-free optimizers."""

    def eval(self) -> None:
        self._move(0.001)

    def train(self) -> None:
        self._move(-0.001)

    @torch.no_grad()
    def _move(self, distance: float) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.add_(distance)


class ScheduleFree(LayersOnSelf):
    """Swaps where such an optimizer asks for it, and counts the zeros that validation sees."""

    zeros = 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return SwapsWeights(self.parameters(), lr=0.05, momentum=0.9)

    def on_validation_start(self) -> None:
        self.optimizers().optimizer.eval()  # type: ignore[union-attr]

    def on_validation_epoch_end(self) -> None:
        self.zeros = sum(int((weight == 0).sum()) for weight in plain_weights(self).values())

    def on_validation_end(self) -> None:
        self.optimizers().optimizer.train()  # type: ignore[union-attr]


@works(
    "Optimization",
    "optimizers that swap the weights for evaluation (schedule-free)",
    "the masks hold in both; what the optimizer makes one from the other of is masked at every update of the masks",
)
def test_weights_that_are_swapped_for_evaluation_are_masked(tmp_path: Path) -> None:
    run = fit(tmp_path, module := ScheduleFree())
    assert_compressed(run)
    assert module.zeros == round(SPARSITY * sum(weight.numel() for weight in plain_weights(module).values()))
