"""One model's quantization: prepared, calibrated, saved, loaded, refused."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.kill_and_resume import is_equal
from lightning_compress.errors import CompressionError
from lightning_compress.quantization import calibrate, prepare, quantization_of
from tests.small_networks import Residual, images, plain, quantized, warmed


def test_bits_of_every_layer_by_name() -> None:
    assert prepare(plain(), weight_bits=4, edge_bits=4).layer_bits == {"0": 4, "5": 4}
    assert prepare(plain(), weight_bits=4).layer_bits == {"0": 8, "5": 8}
    assert prepare(Residual(), exclude=["conv*"]).layer_bits == {"fc": 8}


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_weights_and_inner_activations_take_as_many_values_as_they_have_bits(bits: int) -> None:
    torch.manual_seed(0)
    model = warmed(plain())
    quantization = quantized(model, weight_bits=bits, activation_bits=bits, edge_bits=2)
    quantization.recorded = []
    model(images(64))
    recorded = dict(quantization.recorded)
    assert len(torch.unique(recorded["2"])) <= 2**bits
    assert len(torch.unique(recorded["2"])) > 2 ** (bits - 1)
    assert len(torch.unique(recorded["input_1"])) > 100


def test_calibration_leaves_modes_weights_and_phase() -> None:
    torch.manual_seed(0)
    model = warmed(plain())
    model.get_submodule("1").eval()
    quantization = prepare(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    told: list[str] = []
    calibrate(model, [images(seed=1), images(seed=2)], progress=told.append)
    assert [module.training for module in model.children()] == [True, False, True, True, True, True]
    assert (quantization.is_observing, quantization.is_quantizing) == (False, False)
    assert told == ["calibration batch 1", "calibration batch 2"]
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert quantization.ranges.unseen() == []


def test_calibration_restores_modes_when_a_batch_fails() -> None:
    model = plain()
    quantization = prepare(model)
    with pytest.raises(RuntimeError, match="channels"):
        calibrate(model, [torch.rand(1, 4, 8, 8)])
    assert all(module.training for module in model.modules())
    assert not quantization.is_observing


def test_the_state_travels_through_a_file() -> None:
    torch.manual_seed(0)
    model = warmed(plain())
    quantization = quantized(model)
    file = io.BytesIO()
    torch.save({"weights": model.state_dict(), "ours": quantization.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    other = plain().eval()
    other.load_state_dict(saved["weights"])
    loaded = prepare(other)
    loaded.load_state_dict(saved["ours"])
    assert loaded.is_quantizing
    assert torch.equal(other(images()), model(images()))


class Optional(nn.Module):
    """Runs its second layer only when asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)

    def forward(self, x: Tensor, deep: bool = False) -> Tensor:
        x = self.first(x)
        return self.second(x.relu()) if deep else x


def test_a_call_that_was_not_foreseen_is_taken_in_and_travels_too() -> None:
    torch.manual_seed(0)
    model = Optional().eval()
    quantization = prepare(model)
    assert list(quantization.layer_bits) == ["first"]
    calibrate(model, [torch.rand(8, 4)], forward=lambda batch: model(batch, deep=True))
    quantization.is_quantizing = True
    assert list(quantization.layer_bits) == ["first", "second"]
    other = Optional().eval()
    other.load_state_dict(model.state_dict())
    loaded = prepare(other)
    loaded.load_state_dict(quantization.state_dict())
    x = torch.rand(3, 4)
    assert torch.equal(other(x, deep=True), model(x, deep=True))
    assert len(other(x, deep=True).unique()) > 1


def test_layers_whose_input_was_never_observed_are_named() -> None:
    model = Residual()
    quantization = prepare(model)
    assert quantization.unreached_layers() == ["conv1", "conv2", "conv3", "fc"]
    calibrate(model, [images()])
    assert quantization.unreached_layers() == []


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"weight_bits": 9}, ValueError, "`weight_bits` must be from 1 to 8, got 9."),
        ({"activation_bits": 0}, ValueError, "`activation_bits` must be from 1 to 8, got 0."),
        ({"weight_bits": 8.0}, TypeError, "`weight_bits` must be an int from 1 to 8, got 8.0."),
        ({"activation_bits": True}, TypeError, "`activation_bits` must be an int from 1 to 8, got True."),
        (
            {"exclude": ["*"]},
            ValueError,
            "`Sequential` has no convolution or linear layer to quantize. "
            "Layers must exist before training, as children of the module; `exclude` must leave some.",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: Any, error: type[Exception], message: str) -> None:
    model = plain()
    with pytest.raises(error) as caught:
        prepare(model, **settings)
    assert str(caught.value) == message
    assert quantization_of(model) is None
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_model_is_prepared_once() -> None:
    model = plain()
    prepare(model)
    with pytest.raises(CompressionError) as caught:
        prepare(model)
    assert str(caught.value) == (
        "The model is prepared for quantization already. Use `strip(model)` to undo that first."
    )


def test_only_a_prepared_model_is_calibrated() -> None:
    with pytest.raises(CompressionError) as caught:
        calibrate(plain(), [])
    assert str(caught.value) == "Only a prepared model can be calibrated: call `prepare(model)` first."


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_named(value: float) -> None:
    model = plain()
    model.get_parameter("5.weight").data[0, 0] = value
    with pytest.raises(CompressionError) as caught:
        prepare(model)
    assert str(caught.value) == (
        "The weight of layer `5` is NaN or infinite and cannot be compressed. "
        "Start from a checkpoint from before the training diverged."
    )


def test_a_state_at_other_bits_is_refused() -> None:
    state = prepare(plain(), weight_bits=4).state_dict()
    with pytest.raises(CompressionError) as caught:
        prepare(plain()).load_state_dict(state)
    assert str(caught.value) == (
        "The checkpoint was written with weight_bits=4, this run has weight_bits=8. "
        "Use the same settings to go on with it, or `load_from_checkpoint` to begin a new run with its weights."
    )


def test_a_quantization_that_begins_anew_is_as_it_was_prepared() -> None:
    torch.manual_seed(0)
    first, last = nn.Linear(4, 4), nn.Linear(4, 4)
    net = nn.Sequential(first, nn.ReLU(), last)
    quantization = prepare(net, weight_bits=4, activation_bits=4, edge_bits=4)
    before = quantization.state_dict()
    calibrate(net, [torch.rand(8, 4)])
    quantization.is_quantizing = True
    quantization.learn()
    assert quantization.steps.leaves
    quantization.begin_anew()
    assert is_equal(quantization.state_dict(), before)
    x = torch.rand(8, 4)
    assert torch.equal(net(x), F.linear(F.linear(x, first.weight, first.bias).relu(), last.weight, last.bias))


def test_a_layer_whose_weight_a_function_is_given_is_not_unreached() -> None:
    class Borrowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[1] > 3:  # known only when it is called
                return F.linear(x, self.layer.weight)
            return x

    network = Borrowing()
    quantization = prepare(network)
    calibrate(network, [torch.rand(2, 4)])
    assert quantization.layer_bits == {"linear": 8}
    assert quantization.unreached_layers() == ["unused"]
