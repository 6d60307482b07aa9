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

from lightning_compress import MagnitudePruning, QuantizationAwareTraining, strip
from lightning_compress.errors import CompressionError
from lightning_compress.pruning.weights import prunable_weights
from lightning_compress.quantization import quantization_of
from tests.compatibility.runs import LIGHTNING_NOISE, SPARSITY, Run, assert_compressed, assert_ships, fit
from tests.compatibility.table import refused, works
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
    '`ModelCheckpoint` on a monitor, beside `OnnxExport(weights="best")`',
    "only what was saved under the full compression counts as best",
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
        self.zeros = sum(int((weight == 0).sum()) for weight in prunable_weights(self).values())

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
    assert module.zeros == round(SPARSITY * sum(weight.numel() for weight in prunable_weights(module).values()))
