from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import lightning as L
import onnx
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_compress import MagnitudePruning, OnnxExport, QuantizationAwareTraining
from lightning_compress.callbacks import onnx_export
from lightning_compress.callbacks.complete_weights import best_complete_checkpoint
from lightning_compress.callbacks.export_paths import check_writable
from lightning_compress.errors import CompressionError, MissingExtraError, ParityError
from lightning_compress.export.parts import UnexportableError
from lightning_compress.quantization.affine import integer_weight
from lightning_compress.report import RunReport
from tests.training import quiet_trainer
from tests.user_modules import LayersOnSelf, NetWithKeywords, loader

pytestmark = pytest.mark.filterwarnings(
    "ignore:The '.*dataloader' does not have many workers",
    "ignore:You defined a `validation_step` but have no",
    "ignore:Checkpoint directory .* exists and is not empty",
)


class StepsOfNet(LayersOnSelf):
    """Steps that call a network in the attribute `net`."""

    def __init__(self, net: nn.Module) -> None:
        L.LightningModule.__init__(self)
        self.net = net

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch["image"]), batch["label"])

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.net(batch["image"])


def test_a_run_leaves_a_file_a_report_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export = OnnxExport(tmp_path / "model.onnx", metric="val_acc")
    callbacks = [MagnitudePruning(0.5, start=0.6, end=0.8), QuantizationAwareTraining(start=0.6), export]
    torch.manual_seed(0)
    model = LayersOnSelf()
    trainer = quiet_trainer(tmp_path, callbacks)
    trainer.fit(model, loader(), loader(40, seed=1))

    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "report.json", "report.png"]
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    report = RunReport.from_dict(json.loads((tmp_path / "report.json").read_text()))
    assert report == export.report
    assert report.statistics is not None
    weights = [layer.weight for layer in (model.conv1, model.conv2, model.fc)]
    assert report.statistics.weight_parameters == sum(weight.numel() for weight in weights) == 72 + 576 + 32
    assert report.statistics.weight_nonzeros == sum(int(weight.count_nonzero()) for weight in weights) == 340
    assert report.statistics.macs == 72 * 64 + 576 * 64 + 32
    assert [layer.bits for layer in report.statistics.layers] == [8, 8, 8]
    assert report.sizes is not None
    assert report.sizes.onnx_bytes == (tmp_path / "model.onnx").stat().st_size
    assert report.latency is not None
    assert [(row.file, row.batch_size) for row in report.latency.rows] == [
        ("fp32", 1),
        ("this file", 1),
        ("fp32", 8),
        ("this file", 8),
    ]
    (metric,) = report.metrics
    assert metric.after == trainer.callback_metrics["val_acc"].item()
    assert metric.onnxruntime == pytest.approx(metric.after, abs=1 / 40)
    assert metric.before is not None
    assert report.float_ops == {}
    assert report.integer_ops == {"conv": 2, "add": 1, "pool": 1, "gemm": 1}
    assert "Unstructured zeros do not speed up ONNX Runtime" in report.to_text()


@pytest.mark.parametrize("callbacks", [[], [MagnitudePruning(0.5, end=0.5)]], ids=["not compressed", "only pruned"])
def test_a_float_network_becomes_a_float_file(callbacks: list[L.Callback], tmp_path: Path) -> None:
    export = OnnxExport(tmp_path / "model.onnx", latency=False)
    quiet_trainer(tmp_path, [*callbacks, export]).fit(LayersOnSelf(), loader(), loader(16, seed=1))
    assert export.result is not None
    assert export.result.parity.max_abs_diff < 1e-4
    assert export.result.parity.max_diff_steps is None
    kinds = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert "QuantizeLinear" not in kinds


def test_without_validation_the_training_batches_serve(tmp_path: Path) -> None:
    export = OnnxExport(tmp_path / "model.onnx", latency=False)
    quiet_trainer(tmp_path, [export]).fit(LayersOnSelf(), loader())
    assert export.result is not None
    assert export.result.parity.samples == 8


def test_the_live_module_goes_on_as_before(tmp_path: Path) -> None:
    model = LayersOnSelf()
    export = OnnxExport(tmp_path / "model.onnx", latency=False)
    quiet_trainer(tmp_path, [QuantizationAwareTraining(), export]).fit(model, loader(), loader(16, seed=1))
    assert model.training
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())
    before = model.fc.weight.clone()
    quiet_trainer(tmp_path, max_epochs=1).fit(model, loader())
    assert not torch.equal(model.fc.weight, before)


class KeepsResults(nn.Module):
    """Keeps what it computed on itself, in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 4))

    def forward(self, image: Tensor) -> Any:
        self.results = [self.body(image)]
        return self.results[0]


class HoldsKeepsResults(StepsOfNet):
    """Trains it."""

    def __init__(self) -> None:
        super().__init__(KeepsResults())


def test_a_network_that_keeps_results_on_itself_is_copied_and_exported(tmp_path: Path) -> None:
    export = OnnxExport(tmp_path / "model.onnx", latency=False)
    trainer = quiet_trainer(tmp_path, [QuantizationAwareTraining(start=0.3), export], max_epochs=1)
    trainer.fit(HoldsKeepsResults(), loader())
    assert export.result is not None
    assert export.result.audit.counts() == {"conv": (1, 1), "gemm": (1, 1)}


def test_a_dry_run_writes_nothing_over_a_real_file(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("precious")
    quiet_trainer(tmp_path, [OnnxExport(path)], fast_dev_run=True).fit(LayersOnSelf(), loader(), loader(16))
    assert path.read_text() == "precious"


class WorseAndWorse(LayersOnSelf):
    """Logs a score that is best before compression begins."""

    def on_validation_epoch_end(self) -> None:
        self.log("score", 1.0 / (1 + self.current_epoch))


def test_the_best_weights_are_those_of_a_compressed_checkpoint(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path / "kept", "{epoch}", monitor="score", mode="max", save_top_k=1)
    export = OnnxExport(tmp_path / "model.onnx", weights="best", latency=False)
    torch.manual_seed(0)
    model = WorseAndWorse()
    # Fully compressed from the second half of epoch 1 on; the scores fall from epoch to epoch.
    callbacks = [MagnitudePruning(0.5, end=0.3), QuantizationAwareTraining(start=0.3), export, keep]
    trainer = quiet_trainer(tmp_path, callbacks, max_epochs=4, enable_checkpointing=True)
    trainer.fit(model, loader(), loader(16, seed=1))
    assert best_complete_checkpoint(trainer) == tmp_path / "kept" / "epoch=1.ckpt"
    chosen = LayersOnSelf()
    chosen.load_state_dict(torch.load(tmp_path / "kept" / "epoch=1.ckpt", weights_only=True)["state_dict"])
    integers, _ = integer_weight(chosen.fc.weight, bits=8)
    last, _ = integer_weight(model.fc.weight, bits=8)
    stored = [
        onnx.numpy_helper.to_array(tensor).tolist()
        for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer
        if list(tensor.dims) == [4, 8]
    ]
    assert stored == [integers.tolist()]
    assert not torch.equal(integers, last)


def test_without_a_compressed_checkpoint_the_last_weights_are_exported(tmp_path: Path) -> None:
    export = OnnxExport(tmp_path / "model.onnx", weights="best", latency=False)
    trainer = quiet_trainer(tmp_path, [QuantizationAwareTraining(), export])
    with pytest.warns(UserWarning, match="^No checkpoint of the Trainer's `ModelCheckpoint` had reached the full"):
        trainer.fit(LayersOnSelf(), loader(), loader(16, seed=1))
    assert export.result is not None


@pytest.mark.parametrize("error", [ParityError("differs at `conv1`"), KeyboardInterrupt()])
def test_a_failed_export_keeps_the_trained_weights(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(onnx_export, "export_onnx", fail)
    model = LayersOnSelf()
    trainer = quiet_trainer(tmp_path, [QuantizationAwareTraining(), OnnxExport(tmp_path / "model.onnx")])
    with (
        pytest.warns(UserWarning, match=re.escape(f"the trained weights are kept in {tmp_path / 'model.onnx.ckpt'}.")),
        pytest.raises((ParityError, SystemExit, KeyboardInterrupt)),
    ):
        trainer.fit(model, loader(), loader(16, seed=1))
    kept = LayersOnSelf.load_from_checkpoint(tmp_path / "model.onnx.ckpt")
    for name, value in model.state_dict().items():
        assert torch.equal(kept.state_dict()[name], value), name
    assert "quantization" in torch.load(tmp_path / "model.onnx.ckpt", weights_only=True)["lightning_compress"]


def test_a_path_that_is_a_folder_is_refused_before_the_training(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, [OnnxExport(tmp_path)])
    with pytest.raises(ValueError, match="cannot write") as caught:
        trainer.fit(LayersOnSelf(), loader())
    assert str(caught.value) == (
        f"`OnnxExport` cannot write {tmp_path}: {tmp_path} is a folder. Choose a path in a folder you may write to."
    )
    assert trainer.global_step == 0


@pytest.mark.parametrize("name", ["report.json", "report.png"])
def test_a_report_that_cannot_be_written_is_refused_before_the_training(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    trainer = quiet_trainer(tmp_path, [OnnxExport(tmp_path / "model.onnx")])
    with pytest.raises(ValueError, match="cannot write") as caught:
        trainer.fit(LayersOnSelf(), loader())
    assert str(caught.value) == (
        f"`OnnxExport` cannot write {tmp_path / name}: {tmp_path / name} is a folder. "
        "Choose a path in a folder you may write to."
    )
    assert trainer.global_step == 0


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write") as caught:
        check_writable(tmp_path / "file" / "model.onnx", "OnnxExport")
    assert str(caught.value).endswith("Choose a path in a folder you may write to.")


def test_unknown_weights_are_refused() -> None:
    with pytest.raises(
        ValueError, match='^`weights` must be "last" or "best", got "first".$'.replace('"first"', "'first'")
    ):
        OnnxExport("model.onnx", weights="first")  # type: ignore[arg-type]


def test_a_missing_runtime_is_told_before_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    trainer = quiet_trainer(tmp_path, [OnnxExport(tmp_path / "model.onnx")])
    with pytest.raises(MissingExtraError) as caught:
        trainer.fit(LayersOnSelf(), loader())
    assert str(caught.value) == (
        "ONNX Runtime is needed to verify the exported file and is not installed. "
        "Install it with `pip install onnxruntime`."
    )
    assert trainer.global_step == 0


class StepsWithoutANetwork(NetWithKeywords):
    """Uses two halves of its network apart, and never the network."""

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        features = self.net.pool(self.net.features(batch["image"]))
        return nn.functional.cross_entropy(self.net.head(features.flatten(1)), batch["label"])

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=8)


def test_steps_that_call_no_network_are_told_how_to_point_at_one(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, [OnnxExport(tmp_path / "model.onnx")])
    with (
        pytest.warns(UserWarning, match="The export failed; the trained weights are kept in"),
        pytest.raises(CompressionError) as caught,
    ):
        trainer.fit(StepsWithoutANetwork(), loader(), loader(16, seed=1))
    assert str(caught.value) == (
        "Neither the training nor the validation steps of `StepsWithoutANetwork` called a network that can be "
        "exported, so `OnnxExport` has no inputs to export it with. Call `self(...)` in them, or name the network "
        'with `OnnxExport(..., module="...")`.'
    )


def test_one_submodule_alone_can_be_exported(tmp_path: Path) -> None:
    export = OnnxExport(tmp_path / "model.onnx", module="net.features", latency=False)
    quiet_trainer(tmp_path, [export]).fit(StepsWithoutANetwork(), loader(), loader(16, seed=1))
    assert export.result is not None
    assert export.result.input_names == ("input",)


def test_the_history_survives_a_resume(tmp_path: Path) -> None:
    export = OnnxExport(tmp_path / "model.onnx", latency=False)
    trainer = quiet_trainer(tmp_path, [export], max_epochs=1)
    trainer.fit(LayersOnSelf(), loader(), loader(16, seed=1))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    again = OnnxExport(tmp_path / "model.onnx", latency=False)
    quiet_trainer(tmp_path, [again], max_epochs=2).fit(
        LayersOnSelf(), loader(), loader(16, seed=1), ckpt_path=tmp_path / "end.ckpt", weights_only=True
    )
    steps = [step for step, _ in again.history.series("train_loss")]
    assert steps == list(range(1, 17))
    assert again.history.series("train_loss")[:8] == export.history.series("train_loss")


class Decides(nn.Module):
    """Decides by its values, after a part that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))

    def forward(self, image: Tensor) -> Any:
        logits = self.encoder(image)
        return -logits if logits.sum() > 1e6 else logits


class HoldsDecides(StepsOfNet):
    """Calls a child that cannot be exported as a whole."""

    def __init__(self) -> None:
        super().__init__(Decides())


def test_a_part_is_offered_by_its_name_in_the_users_module(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, [OnnxExport(tmp_path / "model.onnx")], max_epochs=1)
    with (
        pytest.warns(UserWarning, match="The export failed; the trained weights are kept in"),
        pytest.raises(UnexportableError) as caught,
    ):
        trainer.fit(HoldsDecides(), loader(16), loader(16, seed=1))
    assert str(caught.value).endswith(
        '`OnnxExport(..., module="net.encoder")`, or `export_onnx(model.net.encoder, ...)`.'
    )
    callback = OnnxExport(tmp_path / "model.onnx", module=caught.value.part, latency=False)
    quiet_trainer(tmp_path, [callback], max_epochs=1).fit(HoldsDecides(), loader(16), loader(16, seed=1))
    assert callback.result is not None
    assert callback.result.path.exists()
