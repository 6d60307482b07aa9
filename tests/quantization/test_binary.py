"""Binary weights and activations: signs by hand, through training, pruning, export and archive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from onnx import TensorProto
from torch import nn

from lightning_compress import MagnitudePruning, OnnxExport, QuantizationAwareTraining, load_compressed, save_compressed
from lightning_compress.export import export_onnx
from lightning_compress.quantization.binary import binary_activation, binary_scales, binary_weight
from lightning_compress.quantization.weights import WeightQuantizer
from tests.compatibility.runs import LIGHTNING_NOISE, outputs_of
from tests.small_networks import Residual, images, quantized, warmed
from tests.training import quiet_trainer
from tests.user_modules import Images, LayersOnSelf, loader

pytestmark = [pytest.mark.filterwarnings(*LIGHTNING_NOISE)]


def test_signs_and_the_mean_magnitude_by_hand() -> None:
    weight = torch.tensor([[0.5, -1.0, 0.0, 1.5], [0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    assert binary_scales(weight).tolist() == [1.0, 1.0]
    rounded = binary_weight(weight)
    assert rounded.tolist() == [[1.0, -1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]]
    (3.0 * rounded).sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    assert weight.grad.tolist() == [[3.0, 3.0, 3.0, 0.0], [3.0, 3.0, 3.0, 3.0]]


def test_no_other_magnitude_is_nearer() -> None:
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    for row, scale in zip(weight, binary_scales(weight), strict=True):
        errors = {factor: float((row - factor * scale * row.sign()).square().sum()) for factor in (0.95, 1.0, 1.05)}
        assert min(errors, key=lambda factor: errors[factor]) == 1.0


@pytest.mark.parametrize("axis", [0, 1])
def test_what_ships_is_what_is_computed(axis: int) -> None:
    weight = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(0))
    quantizer = WeightQuantizer(bits=1, axis=axis)
    integers, scales = quantizer.integers(weight)
    assert set(integers.flatten().tolist()) == {-1, 1}
    assert scales.shape == (weight.shape[axis],)
    values = integers.float() * scales[:, None, None]
    assert torch.equal(values if axis == 0 else values.transpose(0, 1), quantizer.rounded(weight))


def test_the_file_runs_in_integers_and_stores_two_bits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = warmed(Residual())
    quantized(model, weight_bits=1, edge_bits=8)
    result = export_onnx(
        model, images(), tmp_path / "model.onnx", verify_inputs=[images(32, seed) for seed in range(3)]
    )
    kinds = {tensor.data_type for tensor in onnx.load(result.path).graph.initializer if len(tensor.dims) == 4}
    assert TensorProto.INT2 in kinds
    assert all(integer == whole for integer, whole in result.audit.counts().values())
    size = save_compressed(model, tmp_path / "model.lcz")
    inner = [tensor for tensor in size.tensors if tensor.n_values == 2]
    assert inner
    for tensor in inner:  # one bit a weight, a magnitude an output channel, and what tells of them
        n_weights = torch.Size(tensor.shape).numel()
        assert tensor.coded_bits < n_weights + 64 * tensor.shape[0] + 8 * 30
    weights = load_compressed(tmp_path / "model.lcz")
    for tensor in inner:
        rounded = weights[tensor.name].flatten(1)
        assert torch.equal(rounded.abs().amin(1), rounded.abs().amax(1))


class Large(LayersOnSelf):
    """Its learning rate throws weights far out."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=2.0)


def test_weights_behind_the_signs_stay_near_and_pruned_ones_zero(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Large()
    with torch.no_grad():
        module.conv2.weight.mul_(20)
    callbacks = [
        MagnitudePruning(0.5, end=0.3),
        QuantizationAwareTraining(weight_bits=1, start=0.4, overrides={"conv2": {"weight_bits": 1}}),
        OnnxExport(tmp_path / "model.onnx", latency=False),
    ]
    trainer = quiet_trainer(tmp_path, callbacks)
    trainer.fit(module, loader(), loader(16, seed=1))
    weight = module.conv2.weight
    assert float(weight.detach().abs().max()) <= 1.0
    assert bool((weight == 0).any())
    found = Images(16, seed=3).images
    with torch.no_grad():
        torch.testing.assert_close(outputs_of(tmp_path / "model.onnx", found), module.eval()(found), rtol=0, atol=0.05)


class Decaying(LayersOnSelf):
    """Its learning rate ends at zero: signs that flip after batch norms are frozen would shift their inputs."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        n_steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def test_a_network_with_few_channels_learns_with_signs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Decaying(16)
    trainer = quiet_trainer(tmp_path, [QuantizationAwareTraining(weight_bits=1, edge_bits=8)], max_epochs=12)
    trainer.fit(module, loader(256, 16), loader(64, seed=1))
    assert float(trainer.callback_metrics["val_acc"]) > 0.8
    names = {name for name, bits in _bits(module).items() if bits == 1}
    assert names == {"conv2"}


def _bits(module: nn.Module) -> dict[str, int]:
    from lightning_compress.quantization import quantization_of

    state = quantization_of(module)
    assert state is not None
    return state.layer_bits


def test_signs_of_activations_by_hand() -> None:
    x = torch.tensor([-2.0, -0.5, 1e-6, 1e-4, 0.5, 2.0], requires_grad=True)
    signs = binary_activation(x)
    assert signs.tolist() == [-1.0, -1.0, 0.0, 1.0, 1.0, 1.0]
    (3.0 * signs).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 3.0, 3.0, 3.0, 3.0, 0.0]
    behind_relu = binary_activation(x, clamp=(0.0, 6.0))
    assert behind_relu.tolist() == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    x.grad = None
    behind_relu.sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad.tolist() == [0.0, 0.0, 1.0, 1.0, 1.0, 0.0]  # type: ignore[attr-defined]


class Signs(nn.Module):
    """A network as of the paper's: every layer but the last reads what a hard tangent has bounded, or a ReLU."""

    def __init__(self, activation: type[nn.Module]) -> None:
        super().__init__()
        self.conv1, self.norm1, self.act1 = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), activation()
        self.conv2, self.pool = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.MaxPool2d(2)
        self.norm2, self.act2 = nn.BatchNorm2d(16), activation()
        self.fc = nn.Linear(16 * 9, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act1(self.norm1(self.conv1(x)))
        x = self.act2(self.norm2(self.pool(self.conv2(x))))
        return self.fc(x.flatten(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("activation", [nn.Hardtanh, nn.ReLU, nn.Identity])
def test_a_fully_binary_file_runs_in_integers_and_computes_what_was_trained(
    tmp_path: Path, activation: type[nn.Module]
) -> None:
    torch.manual_seed(0)
    model = warmed(Signs(activation))
    state = quantized(model, weight_bits=1, activation_bits=1, edge_bits=1)
    result = export_onnx(
        model, images(), tmp_path / "model.onnx", verify_inputs=[images(32, seed) for seed in range(3)]
    )
    assert result.parity.top1_agreement == 1.0
    audit = result.audit.counts()
    assert all(integer == whole for kind, (integer, whole) in audit.items() if kind in ("Conv", "Gemm")), audit
    state.recorded = []
    model(images(32, 5))
    found = {name: set(value.flatten().tolist()) for name, value in state.recorded}
    inner = [values for values in found.values() if values <= {-1.0, 0.0, 1.0}]
    assert len(inner) == 2  # what conv2 and fc read; the input and the result have 8 bits


def test_a_fully_binary_network_learns_and_is_resumed_to_the_bit(tmp_path: Path) -> None:
    def fit(folder: Path, ckpt: Path | None = None, *callbacks: Any) -> tuple[Any, Any]:
        torch.manual_seed(0)
        module = Decaying(16)
        rounding = QuantizationAwareTraining(weight_bits=1, activation_bits=1, edge_bits=8, start=0.2)
        trainer = quiet_trainer(folder, [rounding, *callbacks], max_epochs=12, enable_checkpointing=bool(callbacks))
        trainer.fit(module, loader(256, 16), loader(64, seed=1), ckpt_path=ckpt)
        return module, float(trainer.callback_metrics["val_acc"])

    kept = ModelCheckpoint(tmp_path / "kept", filename="{epoch}", save_top_k=-1, enable_version_counter=False)
    whole, accuracy = fit(tmp_path / "whole", None, kept)
    assert accuracy > 0.7
    again, _ = fit(tmp_path / "again", tmp_path / "kept" / "epoch=6.ckpt")
    torch.testing.assert_close(again.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_compiled_signs_are_the_same() -> None:
    torch.manual_seed(0)
    model = warmed(Signs(nn.Hardtanh))
    quantized(model, weight_bits=1, activation_bits=1)
    expected = model(images())
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(images()), expected, rtol=0, atol=1e-5)


def test_probabilities_of_attention_keep_eight_bits() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return self.out(nn.functional.scaled_dot_product_attention(q, k, v))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model = Attending()
    state = quantized(model, [torch.randn(4, 5, 8)], weight_bits=8, activation_bits=1)
    state.recorded = []
    model(torch.randn(2, 5, 8))
    values = {name: value for name, value in state.recorded if name.endswith(("probabilities", "value"))}
    probabilities, value = (values[name] for name in sorted(values))
    assert len(set(probabilities.flatten().tolist())) > 10
    assert set(value.flatten().tolist()) <= {-1.0, 0.0, 1.0}


class Sigmoids(LayersOnSelf):
    """A network whose second layer reads what is positive."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = torch.sigmoid(self.bn1(self.conv1(image)))
        return self.fc(self.relu(self.bn2(self.conv2(x))).mean((2, 3)))  # type: ignore[no-any-return]


def test_values_of_one_sign_are_told(tmp_path: Path) -> None:
    rounding = QuantizationAwareTraining(weight_bits=8, activation_bits=1, edge_bits=1)
    with pytest.warns(UserWarning, match="are all alike, as every one that was observed has the same sign"):
        quiet_trainer(tmp_path, [rounding]).fit(Sigmoids(), loader(), loader(16, seed=1))
