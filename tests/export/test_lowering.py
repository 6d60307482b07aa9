"""The lowered copy computes with integers what the model computes with rounded floats."""

from __future__ import annotations

import copy
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from lightning_compress.export import export_onnx
from lightning_compress.export.lowering import grid_of, lower, room_for_bias
from lightning_compress.quantization import prepare, quantization_of
from tests.small_networks import NETWORKS, Residual, images, plain, quantized, warmed


def share_off_by_half_a_step(ours: Tensor, theirs: Tensor, step: float) -> float:
    return float(((ours - theirs).abs() > step / 2).float().mean())


@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(8, 8), (4, 4), (3, 3), (2, 8)])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_lowered_copy_computes_what_the_model_computes(name: str, weight_bits: int, activation_bits: int) -> None:
    torch.manual_seed(0)
    model = warmed(NETWORKS[name]())
    quantized(model, weight_bits=weight_bits, activation_bits=activation_bits)
    with torch.no_grad():
        expected, found = model(images(64, 9)), lower(model)(images(64, 9))
    grid = grid_of(found)
    assert grid is not None
    assert share_off_by_half_a_step(found, expected, grid.scale) < 0.01
    assert len(expected.unique()) > 10


@pytest.mark.parametrize("name", NETWORKS)
def test_every_weight_is_int8_and_every_bias_int32(name: str) -> None:
    torch.manual_seed(0)
    model = warmed(NETWORKS[name]())
    quantization = quantized(model)
    lowered = lower(model)
    lowered(images())
    weights = {
        name: [
            buffer.dtype
            for key, buffer in lowered.get_submodule(name).named_buffers()
            if key.endswith(("weight", "bias"))
        ]
        for name in quantization.layer_bits
    }
    assert weights == {name: [torch.int8, torch.int32] for name in quantization.layer_bits}


def test_no_float_weight_is_in_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = warmed(Residual())
    quantized(model)
    export_onnx(model, images(), tmp_path / "model.onnx")
    initializers = onnx.load(tmp_path / "model.onnx").graph.initializer
    matrices = {tensor.name: tensor.data_type for tensor in initializers if len(tensor.dims) > 1}
    assert matrices == dict.fromkeys(
        ("conv1.weight", "conv2.weight", "conv3.weight", "fc.weight"), onnx.TensorProto.INT8
    )


def test_a_layer_without_bias_stays_without() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4, bias=False))
    quantized(model)
    lowered = lower(model)
    assert torch.equal(lowered(images()), model(images()))
    assert [buffer.dtype for key, buffer in lowered.named_buffers() if key.endswith("_bias")] == []


def test_the_folded_integers_are_those_of_the_layer_up_to_sign() -> None:
    torch.manual_seed(0)
    model = warmed(plain())
    quantized(model)
    lowered = lower(model)
    lowered(images())
    conv, norm = model[0], model[1]  # type: ignore[index]
    integers = next(buffer for key, buffer in lowered[0].named_buffers() if key.endswith("weight"))  # type: ignore[index]
    expected = (conv.weight / (conv.weight.abs().amax((1, 2, 3), keepdim=True) / 127)).round()
    assert torch.equal(integers.float(), expected * norm.weight.sign().view(-1, 1, 1, 1))


def test_lowering_leaves_the_model_alone() -> None:
    torch.manual_seed(0)
    model = warmed(Residual())
    quantized(model)
    model.train()
    before = copy.deepcopy(model)
    lower(model)(images())
    assert [vars(module).keys() for module in model.modules()] == [vars(module).keys() for module in before.modules()]
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before.state_dict()[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(images()), before(images()))


@pytest.mark.parametrize("is_prepared", [False, True])
def test_a_model_that_is_not_quantizing_is_copied_as_it_is(is_prepared: bool) -> None:
    torch.manual_seed(0)
    model = warmed(plain()).eval()
    for _ in range(is_prepared):
        prepare(model)
    lowered = lower(model.double())
    assert quantization_of(lowered) is None
    assert not any("forward" in vars(module) for module in lowered.modules())
    torch.testing.assert_close(lowered(images()), model(images().double()).float(), rtol=1e-5, atol=1e-5)


def test_a_result_that_a_forward_left_on_the_module_is_no_hindrance() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)
            self.last = torch.empty(0)

        def forward(self, x: Tensor) -> Tensor:
            self.last = self.layer(x)
            return self.last

    torch.manual_seed(0)
    model, x = Keeps(), torch.rand(4, 3)
    quantized(model, [x])
    expected = model(x)
    assert model.last.grad_fn is not None
    assert torch.equal(lower(model)(x), expected)
    assert model.last is expected


def test_names_are_those_of_the_places_in_the_order_they_run() -> None:
    torch.manual_seed(0)
    model = warmed(plain())
    quantized(model)
    names: list[str] = []
    lower(model, names)(images())
    assert names == ["input_1", "2", "_3", "_4", "5"]


def test_biases_that_fit_leave_weights_alone() -> None:
    integers, scales = torch.tensor([[3, -7]], dtype=torch.int8), torch.tensor([0.5])
    found = room_for_bias(integers, scales, torch.tensor([1000.0]), 0.25)
    assert (found[0] is integers, found[1] is scales) == (True, True)


@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e-20, 1e-12])
def test_a_bias_that_does_not_fit_coarsens_its_channel_alone(scale: float) -> None:
    integers, scales = torch.tensor([[100, -50], [100, -50]], dtype=torch.int8), torch.tensor([0.5, scale])
    found, new_scales = room_for_bias(integers, scales, torch.tensor([1.0, -40.0]), 0.25)
    assert (found[0].tolist(), new_scales[0].item()) == ([100, -50], 0.5)
    bias = round(-40.0 / (new_scales[1].item() * 0.25))
    assert -(2**31) < bias < -(2**29)
    assert bias * new_scales[1].item() * 0.25 == pytest.approx(-40.0, rel=1e-6)
    # What the weights of the channel add is kept as far as the new scale shows it.
    kept, was = found[1].double() * new_scales[1].double(), integers[1].double() * scales[1].double()
    assert float((kept - was).abs().max()) <= new_scales[1].item() / 2


@pytest.mark.parametrize("gamma", [0.0, 1e-30, 1e-12, -1e-9])
def test_a_channel_whose_gamma_is_almost_zero_is_its_beta(gamma: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    warmed(model)
    model.get_parameter("1.weight").data[2] = gamma
    model.get_parameter("1.bias").data[2] = 0.75
    quantized(model)
    with torch.no_grad():
        expected, found = model(images()), lower(model)(images())
    grid = grid_of(found)
    assert grid is not None
    assert share_off_by_half_a_step(found, expected, grid.scale) == 0.0
    assert float((found[:, 2] - 0.75).abs().max()) <= grid.scale / 2 + 1e-6
