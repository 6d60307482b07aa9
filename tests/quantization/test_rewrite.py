"""Rewritten forwards: nothing changes before quantization starts, and then exactly the rounding comes in."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.quantization import prepare, quantization_of, strip
from lightning_compress.quantization import sites as sites_module
from lightning_compress.quantization.affine import fake_quantize, fake_quantize_, fake_quantize_weight
from lightning_compress.quantization.batchnorm import freeze_batchnorm_
from tests.small_networks import NETWORKS, PreActivation, Residual, images, quantized, warmed


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Run forward and backward in the model's mode, from the same random numbers."""
    torch.manual_seed(7)
    random.seed(7)
    model.zero_grad()
    model(x.clone()).square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("is_observing", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_before_quantization_starts_training_is_that_of_the_plain_model(name: str, is_observing: bool) -> None:
    torch.manual_seed(0)
    model = NETWORKS[name]()
    prepared = copy.deepcopy(model)
    prepare(prepared).is_observing = is_observing
    assert_equal(gradients(prepared, images()), gradients(model, images()))
    assert_equal(dict(prepared.state_dict()), dict(model.state_dict()))
    model.eval()
    prepared.eval()
    assert torch.equal(prepared(images()), model(images()))


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_reach_every_parameter(name: str) -> None:
    torch.manual_seed(0)
    model = NETWORKS[name]()
    quantized(model)
    model.train()
    found = gradients(model, images())
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert all(gradient.isfinite().all() for gradient in found.values())


class ByHand(nn.Module):
    """What `Residual` is in quantization-aware training, written down."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = strip(copy.deepcopy(model))
        quantization = quantization_of(model)
        assert quantization is not None
        self.ranges = quantization.ranges

    def rounded(self, x: Tensor, name: str) -> Tensor:
        grid = self.ranges.grid(self.ranges.names.index(name))
        assert grid is not None
        return fake_quantize(x, grid)

    def conv(self, layer: nn.Conv2d, x: Tensor) -> Tensor:
        return F.conv2d(x, fake_quantize_weight(layer.weight, 8), layer.bias, padding=layer.padding)

    def forward(self, x: Tensor) -> Tensor:
        net: Any = self.model
        x = self.rounded(x, "x")
        first = self.rounded(F.relu(net.bn1(self.conv(net.conv1, x))), "relu")
        second = self.rounded(net.bn2(self.conv(net.conv2, first)), "bn2")
        second = self.rounded(F.relu(second + first), "relu_1")
        third = self.rounded(self.conv(net.conv3, second), "conv3")
        third = self.rounded(F.relu(third + second), "relu_2")
        pooled = self.rounded(F.adaptive_avg_pool2d(third, 1), "adaptive_avg_pool2d")
        result = F.linear(pooled.flatten(1), fake_quantize_weight(net.fc.weight, 8), net.fc.bias)
        return self.rounded(result, "fc")


@pytest.mark.parametrize("inplace", [False, True])
def test_quantizing_equals_the_network_written_down_by_hand(inplace: bool) -> None:
    torch.manual_seed(0)
    model = warmed(Residual(inplace))
    quantized(model)
    model.train()
    by_hand = ByHand(model).train()
    x = images()
    expected, found = by_hand(x), model(x)
    # Biases are rounded to the 32-bit integers that ship, which is far below a step.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


class Sequence(nn.Module):
    """One thing after the other, each with more readers than one where asked."""

    def __init__(self, *steps: nn.Module, reads_twice: bool = False) -> None:
        super().__init__()
        self.steps = nn.ModuleList(steps)
        self.head = nn.Linear(8, 5)
        self.reads_twice = reads_twice

    def forward(self, x: Tensor) -> Any:
        for step in self.steps:
            before, x = x, step(x)
        if self.reads_twice:
            x = x + before
        return self.head(x.flatten(2).mean(2))


def stem() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))


IN_PLACE_NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "residual": lambda: Residual(inplace=True),
    "pre_activation": lambda: PreActivation(inplace=True),
    "hardswish_behind_a_convolution": lambda: Sequence(nn.Conv2d(3, 8, 1), nn.Hardswish(inplace=True)),
    "relu_with_other_readers": lambda: Sequence(nn.Conv2d(3, 8, 1), nn.ReLU(inplace=True), reads_twice=True),
    "dropout_in_a_child": lambda: Sequence(stem(), nn.Sequential(nn.Dropout(0.5, inplace=True), nn.Conv2d(8, 8, 1))),
    "dropout_behind_a_view": lambda: Sequence(
        stem(), nn.Sequential(nn.Flatten(2), nn.Dropout(0.5, inplace=True)), nn.Conv1d(8, 8, 1)
    ),
    "silu_behind_a_child": lambda: Sequence(stem(), nn.SiLU(inplace=True), nn.Conv2d(8, 8, 1)),
    "relu_of_a_view": lambda: Sequence(nn.Conv2d(3, 8, 1), nn.Flatten(2), nn.ReLU(inplace=True)),
}


@pytest.mark.parametrize("name", IN_PLACE_NETWORKS)
def test_rounding_in_place_changes_no_gradient(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = IN_PLACE_NETWORKS[name]()
    quantized(model)
    model.train()
    found = gradients(model, images())
    in_place = fake_quantize_
    monkeypatch.setattr(sites_module, "fake_quantize_", lambda x, grid, clamp: in_place(x * 1.0, grid, clamp))
    assert_equal(found, gradients(model, images()))


def test_the_caller_may_overwrite_the_result() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    quantized(model)
    expected = model(images()) * 2.0
    result = model(images())
    result *= 2.0
    result.sum().backward()
    assert torch.equal(result, expected)


def test_untraced_code_may_overwrite_what_its_layers_return() -> None:
    class Star(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.relu = nn.ReLU(inplace=True)

        def forward(self, *values: Tensor) -> Any:
            return self.relu(self.conv(values[0]))

    torch.manual_seed(0)
    model = Star()
    quantized(model)
    result = model(images())
    result.sum().backward()
    assert result.detach().min().item() == 0.0
    assert model.conv.weight.grad is not None


def test_a_forward_hook_keeps_what_the_layer_returned() -> None:
    torch.manual_seed(0)
    model = warmed(Residual())
    quantized(model)
    model.train()
    kept: list[Tensor] = []
    model.get_submodule("bn1").register_forward_hook(lambda module, args, output: kept.append(output.detach()))
    model(images())
    # The ReLU after it, which the rounding takes over, must not reach into the kept value.
    assert kept[0].min().item() < -0.1
    assert len(torch.unique(kept[0])) > 1000


@pytest.mark.parametrize("inplace", [False, True])
def test_a_hook_on_an_activation_that_the_rounding_takes_over_fires(inplace: bool) -> None:
    torch.manual_seed(0)
    model = warmed(Residual(inplace))
    quantized(model)
    model.train()
    expected = model(images())
    kept: list[Tensor] = []
    model.get_submodule("relu").register_forward_hook(lambda module, args, output: kept.append(output.detach()))
    found = model(images())
    found.sum().backward()
    assert torch.equal(found, expected)
    assert [value.min().item() for value in kept] == [0.0, 0.0, 0.0]
    assert len(torch.unique(kept[0])) > 1000


def test_hooks_on_children_and_on_the_model_fire() -> None:
    torch.manual_seed(0)
    model = warmed(NETWORKS["shuffled"]())
    quantized(model)
    fired: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, args, output, name=name: fired.append(name))
    model(images())
    assert fired == ["conv.0", "conv.1", "conv.2", "conv", "grouped", "fc", ""]


class Auxiliary(nn.Module):
    """Dropout by mode, and a second head while training."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.auxiliary = nn.Linear(8, 5)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.norm(self.conv(x))).mean((2, 3))
        if self.training:
            extra = self.auxiliary(x)
            return self.head(F.dropout(x, 0.5, self.training)), extra
        return self.head(F.dropout(x, 0.5, self.training))


def test_each_mode_runs_its_own_code_on_the_same_grids() -> None:
    torch.manual_seed(0)
    model = warmed(Auxiliary())
    quantization = quantized(model)
    seen: dict[bool, list[str]] = {}
    for training in (True, False):
        model.train(training)
        quantization.recorded = []
        result = model(images())
        seen[training] = [name for name, _ in quantization.recorded]
        assert isinstance(result, tuple) == training
    quantization.recorded = None
    assert seen[True] == seen[False] == ["x", "relu", "mean", "head"]


def test_dropout_drops_in_train_mode_alone() -> None:
    torch.manual_seed(0)
    model = warmed(Auxiliary())
    quantized(model)
    freeze_batchnorm_(model.train())
    assert not torch.equal(model(images())[0], model(images())[0])
    model.eval()
    assert torch.equal(model(images()), model(images()))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_frozen_norm_in_training_gives_what_evaluation_gives(name: str) -> None:
    torch.manual_seed(0)
    model = warmed(NETWORKS[name]())
    quantized(model)
    for module in model.modules():
        module.training = not isinstance(module, nn.Dropout)
    freeze_batchnorm_(model)
    before = {name: value.clone() for name, value in model.named_buffers()}
    found = model(images())
    found.sum().backward()
    assert_equal(dict(model.named_buffers()), before)
    for norm in [module for module in model.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]:
        assert norm.weight.grad is not None
        assert norm.bias.grad is not None
        assert float(norm.weight.grad.abs().max()) > 0.0
    assert torch.equal(found, model.eval()(images()))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_copy_computes_the_same_and_is_independent(name: str, copied: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    model = warmed(NETWORKS[name]())
    quantization = quantized(model)
    expected = model(images())
    other = copied(model)
    other_quantization = quantization_of(other)
    assert other_quantization is not None
    assert other_quantization is not quantization
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    quantization.is_quantizing = False
    assert torch.equal(other(images()), expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_strip_leaves_no_trace(name: str) -> None:
    torch.manual_seed(0)
    model = warmed(NETWORKS[name]()).eval()
    expected, attributes = model(images()), [set(vars(module)) for module in model.modules()]
    quantized(model)
    assert not torch.equal(model(images()), expected)
    assert strip(model) is model
    assert quantization_of(model) is None
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert torch.equal(model(images()), expected)


def test_a_quantizer_that_saw_nothing_starts_from_the_first_batch() -> None:
    torch.manual_seed(0)
    model = NETWORKS["plain"]()
    quantization = prepare(model)
    quantization.is_observing = quantization.is_quantizing = True
    assert len(torch.unique(model(images())[:, 0])) > 1
    quantization.ranges.update()
    assert quantization.ranges.unseen() == []


def test_a_child_that_overwrites_its_input_does_so_for_other_readers_too() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 1)
            self.branch = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1))

        def forward(self, x: Tensor) -> Any:
            x = self.stem(x)
            return self.branch(x) + x

    torch.manual_seed(0)
    model = Branches()
    prepared = copy.deepcopy(model)
    quantization = prepare(prepared)
    quantization.is_observing = True
    assert_equal(gradients(prepared, images()), gradients(model, images()))
    quantization.ranges.update()
    quantization.is_quantizing = True
    assert set(gradients(prepared, images())) == {name for name, _ in model.named_parameters()}
