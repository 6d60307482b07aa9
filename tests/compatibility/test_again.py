"""Modules, callbacks and checkpoints that are used again, after fits that were cut short or went on without us."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from benchmarks.kill_and_resume import is_equal
from lightning_compress import (
    KnowledgeDistillation,
    MagnitudePruning,
    OnnxExport,
    QuantizationAwareTraining,
    load_compressed_state,
    strip,
)
from lightning_compress.errors import CompressionError
from lightning_compress.quantization import quantization_of
from tests.compatibility.runs import LIGHTNING_NOISE
from tests.compatibility.table import refused, works
from tests.compatibility.test_resume import Noisy, shuffled
from tests.test_promises import Stateful
from tests.training import quiet_trainer
from tests.user_modules import Images, LayersOnSelf, loader

AREA = "Used again"

pytestmark = [
    pytest.mark.filterwarnings(
        *LIGHTNING_NOISE, "ignore:You defined a `validation_step` but", "ignore:Checkpoint directory"
    )
]

IMAGES = Images(16, seed=3).images


def four_bits(**settings: Any) -> QuantizationAwareTraining:
    return QuantizationAwareTraining(
        **{"weight_bits": 4, "activation_bits": 4, "edge_bits": 4, "freeze": 1.0, **settings}
    )


@works(AREA, "a module that was trained, resumed from an early checkpoint", "as a fresh module would be")
def test_step_sizes_of_another_fit_are_forgotten(tmp_path: Path) -> None:
    torch.manual_seed(0)
    used = LayersOnSelf()
    keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=4)
    quiet_trainer(tmp_path, [four_bits(start=0.5), keep], enable_checkpointing=True).fit(used, Stateful())
    fresh = LayersOnSelf()
    for module in (used, fresh):
        trainer = quiet_trainer(tmp_path, [four_bits(start=0.5)])
        trainer.fit(module, Stateful(), ckpt_path=tmp_path / "step=4.ckpt")
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    found, expected = quantization_of(used), quantization_of(fresh)
    assert found is not None
    assert expected is not None
    assert is_equal(found.state_dict(), expected.state_dict())
    assert any(name.startswith("weight of ") for name in found.steps.leaves)
    loaded = load_compressed_state(LayersOnSelf(), tmp_path / "end.ckpt")
    assert torch.equal(loaded.eval()(IMAGES), used.eval()(IMAGES))


def plain_checkpoint(folder: Path) -> Path:
    """Write a checkpoint of one epoch without any of our callbacks."""
    torch.manual_seed(0)
    trainer = quiet_trainer(folder, max_epochs=1)
    trainer.fit(LayersOnSelf(), loader())
    trainer.save_checkpoint(folder / "plain.ckpt")
    return folder / "plain.ckpt"


def pruned_and_rounded(folder: Path) -> LayersOnSelf:
    module = LayersOnSelf()
    quiet_trainer(folder, [MagnitudePruning(0.8, end=0.5), four_bits(start=0.5)]).fit(module, loader())
    return module


@works(AREA, "a module that was compressed, resumed from a checkpoint without our state", "as a fresh module would be")
def test_masks_of_another_fit_are_forgotten(tmp_path: Path) -> None:
    plain = plain_checkpoint(tmp_path)
    saved = []
    for module in (pruned_and_rounded(tmp_path), LayersOnSelf()):
        trainer = quiet_trainer(tmp_path, [MagnitudePruning(0.8, end=0.75), four_bits(start=0.75)], max_epochs=4)
        trainer.fit(module, Stateful(), ckpt_path=plain)
        trainer.save_checkpoint(tmp_path / "end.ckpt")
        saved.append(torch.load(tmp_path / "end.ckpt", weights_only=True))
    for key in ("state_dict", "lightning_compress", "optimizer_states"):
        assert is_equal(saved[0][key], saved[1][key]), key


@works(AREA, "a module that was compressed, tested from a checkpoint without our state", "in float, as it was trained")
@pytest.mark.parametrize("has_callbacks", [True, False])
def test_a_plain_checkpoint_is_tested_in_float(has_callbacks: bool, tmp_path: Path) -> None:
    plain = plain_checkpoint(tmp_path)
    callbacks = [MagnitudePruning(0.8, end=0.5), four_bits(start=0.5)] * has_callbacks
    trainer, module = quiet_trainer(tmp_path, callbacks), pruned_and_rounded(tmp_path)
    found = trainer.test(module, loader(), ckpt_path=plain, verbose=False)
    expected = LayersOnSelf.load_from_checkpoint(plain)
    assert found == quiet_trainer(tmp_path).test(expected, loader(), verbose=False)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    state = torch.load(tmp_path / "after.ckpt", weights_only=True)["lightning_compress"]
    assert (state["pruning"]["masks"], state["pruning"]["complete"]) == ({}, False)
    assert not state["quantization"]["is_quantizing"]


@works(AREA, "a module that was compressed, tested from a checkpoint with masks alone", "its ranges begin anew")
def test_of_a_checkpoint_with_masks_alone_the_ranges_begin_anew(tmp_path: Path) -> None:
    pruned = LayersOnSelf()
    trainer = quiet_trainer(tmp_path, [MagnitudePruning(0.8, end=0.5)])
    trainer.fit(pruned, loader())
    trainer.save_checkpoint(tmp_path / "pruned.ckpt")
    module, pruning, rounding = pruned_and_rounded(tmp_path), MagnitudePruning(0.8, end=0.5), four_bits(start=0.5)
    quiet_trainer(tmp_path, [pruning, rounding]).test(
        module, loader(), ckpt_path=tmp_path / "pruned.ckpt", verbose=False
    )
    assert pruning.complete
    assert not rounding.complete
    assert rounding.quantization.ranges.as_dict() == {}


@works(AREA, "a Trainer whose `max_epochs` is raised", "scales below 7 bits learn on")
def test_step_sizes_learn_on(tmp_path: Path) -> None:
    trainer, module = quiet_trainer(tmp_path, [four_bits(start=0.25)]), LayersOnSelf()
    trainer.fit(module, loader())
    quantization = quantization_of(module)
    assert quantization is not None
    before = {name: leaf.detach().clone() for name, leaf in quantization.steps.leaves.items()}
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, loader())
    assert before
    for name, leaf in quantization.steps.leaves.items():
        assert not torch.equal(leaf.detach(), before[name]), name


@works(AREA, "a pruned module, trained on without `MagnitudePruning`", "its checkpoint loads as it is, without masks")
def test_masks_that_no_longer_hold_are_forgotten(tmp_path: Path) -> None:
    module = LayersOnSelf()
    quiet_trainer(tmp_path, [MagnitudePruning(0.8, end=0.5)]).fit(module, loader())
    dense = quiet_trainer(tmp_path)
    dense.fit(module, loader())
    dense.save_checkpoint(tmp_path / "dense.ckpt")
    loaded = load_compressed_state(LayersOnSelf(), tmp_path / "dense.ckpt")
    assert torch.equal(loaded.eval()(IMAGES), module.eval()(IMAGES))


class BestInTheMiddle(LayersOnSelf):
    """Its third epoch is the best."""

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self(batch["image"])
        self.log("score", float(self.current_epoch == 2))


@works(AREA, '`OnnxExport(weights="best")`, resumed after the best checkpoint', "the same file")
def test_the_best_checkpoint_is_not_forgotten(tmp_path: Path) -> None:
    def fit(ckpt_path: Path | None = None) -> tuple[str, bytes]:
        torch.manual_seed(0)
        best = ModelCheckpoint(tmp_path / "best", "{epoch}", monitor="score", mode="max", save_on_train_epoch_end=False)
        every = ModelCheckpoint(tmp_path / "every", "{epoch}", save_top_k=-1, save_on_train_epoch_end=False)
        callbacks = [
            MagnitudePruning(0.8, end=0.2),
            QuantizationAwareTraining(start=0.2, freeze=0.9),
            OnnxExport(tmp_path / "model.onnx", weights="best", latency=False),
            best,
            every,
        ]
        trainer = quiet_trainer(tmp_path, callbacks, max_epochs=6, enable_checkpointing=True)
        trainer.fit(BestInTheMiddle(), loader(), loader(16, seed=1), ckpt_path=ckpt_path)
        return best.best_model_path, (tmp_path / "model.onnx").read_bytes()

    path, expected = fit()
    assert Path(path).name == "epoch=2.ckpt"
    assert fit(tmp_path / "every" / "epoch=3.ckpt") == (path, expected)


class FirstNumber(L.Callback):
    """Keeps the first random number of a fit."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.number = float(torch.rand(1))


@works(AREA, "a seed set between a test from a checkpoint and a new fit", "holds")
def test_a_test_leaves_the_seed_alone(tmp_path: Path) -> None:
    module, keep = LayersOnSelf(), ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=8)
    trainer = quiet_trainer(tmp_path, [MagnitudePruning(0.8), keep], enable_checkpointing=True)
    trainer.fit(module, loader())
    numbers = []
    for seed in (1, 2):
        trainer.test(module, loader(), ckpt_path=tmp_path / "step=8.ckpt", verbose=False)
        torch.manual_seed(seed)
        first = FirstNumber()
        quiet_trainer(tmp_path, [MagnitudePruning(0.8), first]).fit(module, loader())
        numbers.append(first.number)
    assert numbers[0] != numbers[1]


class Configured(LayersOnSelf):
    """Makes a layer late, keeps something of its own in checkpoints, and leaves a layer out of them."""

    extra: str = ""

    def __init__(self) -> None:
        super().__init__()
        self.frozen: torch.nn.Linear | None = None

    def configure_model(self) -> None:
        if self.frozen is None:
            self.frozen = torch.nn.Linear(4, 4, bias=False)
            torch.nn.init.eye_(self.frozen.weight)
            self.strict_loading = False

    def forward(self, image: Tensor) -> Tensor:
        assert self.frozen is not None
        logits: Tensor = self.frozen(super().forward(image))
        return logits

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if "frozen" not in name}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [parameter for name, parameter in self.named_parameters() if "frozen" not in name]
        return torch.optim.SGD(trained, lr=0.05, momentum=0.9)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["extra"] = "mine"

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.extra = checkpoint["extra"]


@works("Loading", "`load_compressed_state` with `configure_model`, `strict_loading=False` and `on_load_checkpoint`")
def test_modules_with_loading_of_their_own(tmp_path: Path) -> None:
    module = Configured()
    trainer = quiet_trainer(tmp_path, [MagnitudePruning(0.8, end=0.5), QuantizationAwareTraining(start=0.5)])
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    loaded = load_compressed_state(Configured(), tmp_path / "end.ckpt")
    assert loaded.extra == "mine"
    assert torch.equal(loaded.eval()(IMAGES), module.eval()(IMAGES))


@works("Stopping and resuming", "`KnowledgeDistillation` or `OnnxExport` alone, with random numbers", "bit-identical")
@pytest.mark.parametrize("has_teacher", [False, True])
def test_random_numbers_go_on_without_pruning_and_rounding(has_teacher: bool, tmp_path: Path) -> None:
    def fit(folder: Path, seed: int, *more: L.Callback, ckpt_path: Path | None = None) -> LayersOnSelf:
        torch.manual_seed(3)
        ours = KnowledgeDistillation(LayersOnSelf(12)) if has_teacher else OnnxExport(folder / "m.onnx", latency=False)
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        module = Noisy()
        trainer = quiet_trainer(folder, [ours, *more], enable_checkpointing=bool(more))
        trainer.fit(module, shuffled(), loader(16, seed=1), ckpt_path=ckpt_path, weights_only=True)
        return module

    whole = fit(tmp_path, 0, ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_epochs=1))
    resumed = fit(tmp_path / "resumed", 9, ckpt_path=tmp_path / "step=8.ckpt")
    assert is_equal(dict(resumed.state_dict()), dict(whole.state_dict()))


@refused(
    AREA,
    "a checkpoint without ranges, resumed with `QuantizationAwareTraining` after its `freeze`",
    "choose a later `freeze`",
)
def test_rounding_that_could_never_observe(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1)
    quiet_trainer(tmp_path, [keep], max_epochs=4, enable_checkpointing=True).fit(LayersOnSelf(), loader())
    rounding = QuantizationAwareTraining(start=0.0, freeze=0.5)
    with pytest.raises(CompressionError) as caught:
        quiet_trainer(tmp_path, [rounding], max_epochs=5).fit(
            LayersOnSelf(), loader(), ckpt_path=tmp_path / "step=32.ckpt"
        )
    assert str(caught.value) == (
        "The run goes on at optimizer step 32, after `freeze=0.5` (step 20), and the checkpoint holds no ranges: "
        "nothing could be quantized. Choose a later `freeze`, or resume from a checkpoint that was written with "
        "`QuantizationAwareTraining`."
    )


@works(AREA, "a finished pruning run, made longer", "what was pruned stays pruned")
def test_a_longer_run_keeps_what_was_pruned(tmp_path: Path) -> None:
    module, keep = LayersOnSelf(), ModelCheckpoint(tmp_path, "{step}", save_top_k=-1)
    quiet_trainer(tmp_path, [MagnitudePruning(0.8, end=0.6), keep], max_epochs=4, enable_checkpointing=True).fit(
        module, loader()
    )
    gone = {name: value == 0 for name, value in module.state_dict().items() if name.endswith("weight")}
    longer, pruning = LayersOnSelf(), MagnitudePruning(0.8, end=0.6)
    quiet_trainer(tmp_path, [pruning], max_epochs=8).fit(longer, loader(), ckpt_path=tmp_path / "step=32.ckpt")
    assert pruning.complete
    for name in ("conv1.weight", "conv2.weight", "fc.weight"):
        assert not longer.state_dict()[name][gone[name]].any(), name


@works(AREA, "a part that was stripped, then a new fit")
def test_a_part_that_was_stripped(tmp_path: Path) -> None:
    class Whole(LayersOnSelf):
        def __init__(self) -> None:
            L.LightningModule.__init__(self)
            self.net = LayersOnSelf()

        def forward(self, image: Tensor) -> Tensor:
            logits: Tensor = self.net(image)
            return logits

    module = Whole()
    for _ in range(2):
        rounding = QuantizationAwareTraining(start=0.5, module="net")
        quiet_trainer(tmp_path, [rounding]).fit(module, loader())
        assert rounding.complete
        strip(module.net)


@works(AREA, "an `OnnxExport` for a second module", "tells of the second run alone")
def test_the_history_is_that_of_one_run(tmp_path: Path) -> None:
    export = OnnxExport(tmp_path / "model.onnx", latency=False)
    for _ in range(2):
        quiet_trainer(tmp_path, [export]).fit(LayersOnSelf(), loader(), loader(16))
    steps = [step for step, _ in export.history.series("train_loss")]
    assert steps == sorted(set(steps))


class SilentValidation(LayersOnSelf):
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("nothing", 0.0)


@works("Export", "a validation step that does not call the network", "inputs are those of training steps")
def test_validation_without_the_network(tmp_path: Path) -> None:
    export = OnnxExport(tmp_path / "model.onnx", latency=False)
    quiet_trainer(tmp_path, [export]).fit(SilentValidation(), loader(), loader(16))
    assert export.result is not None
    assert export.result.parity.samples >= 8
