"""Reduced precision in training; the file is that of the same weights in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import onnx
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from lightning_compress import KnowledgeDistillation, QuantizationAwareTraining, export_onnx, load_compressed_state
from lightning_compress.quantization import calibrate, prepare
from lightning_compress.quantization.affine import fake_quantize
from tests.compatibility.runs import LIGHTNING_NOISE, assert_compressed, fit, outputs_of
from tests.compatibility.table import untested, works
from tests.training import all_callbacks, quiet_trainer
from tests.user_modules import Images, LayersOnSelf, NetWithKeywords, loader

AREA = "Precision"

pytestmark = [
    pytest.mark.filterwarnings(*LIGHTNING_NOISE),
    pytest.mark.filterwarnings("ignore:.*GradScaler", "ignore:.*lr_scheduler"),
]

NOTES = {
    "32-true": "",
    "bf16-mixed": "rounding computes in float32",
    "16-mixed": "with the GradScaler; rounding computes in float32",
    "bf16-true": "the file has float32 where it is not integer",
    "16-true": "the file has float32 where it is not integer",
}


def settings(precision: str) -> dict[str, Any]:
    """Return the Trainer's settings; on the CPU it would take bfloat16 instead of ``16-mixed``, so as its plugin."""
    if precision == "16-mixed":
        return {"plugins": [MixedPrecision("16-mixed", device="cpu", scaler=torch.amp.GradScaler("cpu"))]}
    return {"precision": precision}


PRECISIONS: list[Any] = [
    pytest.param(name, marks=works(AREA, f'`precision="{name}"` on the CPU', note)) for name, note in NOTES.items()
]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", [LayersOnSelf, NetWithKeywords])
def test_a_precision_of_the_trainer(precision: Any, kind: type[LayersOnSelf], tmp_path: Path) -> None:
    run = fit(tmp_path, kind(), **settings(precision))
    assert_compressed(run)
    proto = onnx.load(tmp_path / "model.onnx")
    kinds = {tensor.data_type for tensor in proto.graph.initializer}
    kinds |= {value.type.tensor_type.elem_type for value in (*proto.graph.input, *proto.graph.output)}
    assert not kinds & {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE}


@works(AREA, "the exported file", "that of the trained weights in float32, whatever the precision was")
@pytest.mark.parametrize("precision", NOTES)
def test_the_file_is_that_of_the_weights_in_float32(precision: Any, tmp_path: Path) -> None:
    run = fit(tmp_path, **settings(precision))
    run.trainer.save_checkpoint(tmp_path / "end.ckpt")
    images = Images(64, seed=2).images
    export_onnx(load_compressed_state(LayersOnSelf(), tmp_path / "end.ckpt"), (images,), tmp_path / "again.onnx")
    found, expected = outputs_of(tmp_path / "model.onnx", images), outputs_of(tmp_path / "again.onnx", images)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("precision", NOTES)
def test_four_bits_learn_their_steps_in_any_precision(precision: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, callback = LayersOnSelf(), QuantizationAwareTraining(weight_bits=4, activation_bits=4, start=0.25)
    export = all_callbacks(tmp_path)[-1]
    quiet_trainer(tmp_path, [callback, export], max_epochs=4, **settings(precision)).fit(
        module, loader(), loader(16, seed=1)
    )
    steps = callback.quantization.steps.leaves
    assert steps
    assert all(leaf.dtype == torch.float32 and leaf.isfinite().all() for leaf in steps.values())


def test_rounding_computes_in_float32_inside_autocast() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 8))
    quantization = prepare(network)
    calibrate(network, [torch.randn(32, 16) for _ in range(4)])
    quantization.is_quantizing = True
    x = torch.randn(32, 16)
    unrounded: list[Tensor] = []
    handle = network[0].register_forward_hook(lambda module, args, output: unrounded.append(output.detach()))
    recorded: list[tuple[str, Tensor]] = []
    quantization.recorded = recorded
    with torch.autocast("cpu", torch.bfloat16):
        network(x)
    handle.remove()
    assert unrounded[0].dtype == torch.bfloat16
    name, rounded = recorded[1]
    grid = quantization.ranges.grid(quantization.ranges.names.index(name))
    assert grid is not None
    expected = fake_quantize(unrounded[0].float().relu(), grid).to(torch.bfloat16)
    assert torch.equal(rounded.to(torch.bfloat16), expected)


class FirstLoss(L.Callback):
    value: float = 0.0

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == 1:
            self.value = float(trainer.callback_metrics["compress/distillation_loss"])


@works(AREA, "distillation under the GradScaler, with gradient clipping", "the same first step within half precision")
def test_distillation_under_a_gradient_scaler(tmp_path: Path) -> None:
    weights: dict[str, Tensor] = {}
    losses: dict[str, float] = {}
    for precision in ("32-true", "16-mixed"):
        torch.manual_seed(0)
        teacher, module, first = LayersOnSelf(12), LayersOnSelf(), FirstLoss()
        trainer = quiet_trainer(
            tmp_path,
            [KnowledgeDistillation(teacher, temperature=4.0, weight=0.7), first],
            max_steps=3,
            gradient_clip_val=0.1,
            **settings(precision),
        )
        before = module.fc.weight.detach().clone()
        trainer.fit(module, loader(), loader(16, seed=1))
        weights[precision] = module.fc.weight.detach() - before
        losses[precision] = first.value
    assert losses["16-mixed"] == pytest.approx(losses["32-true"], rel=1e-2)
    assert (weights["16-mixed"] - weights["32-true"]).norm() < 0.02 * weights["32-true"].norm()


@untested(AREA, "any precision on a GPU, `transformer-engine`, `bitsandbytes`", "needs a GPU")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", NOTES)
def test_a_precision_on_a_gpu(precision: Any, tmp_path: Path) -> None:
    assert_compressed(fit(tmp_path, precision=precision, accelerator="gpu", devices=1))
