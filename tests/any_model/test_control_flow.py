"""Forwards without a graph: control flow on shapes, on modes and on values."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.errors import ExportError
from lightning_compress.export import export_onnx
from lightning_compress.quantization import calibrate, prepare, strip
from tests.any_model.inputs import random_values
from tests.any_model.journey import Example, check, loss_of

IMAGE = random_values(3, 8, 8)


class PadsOddSizes(nn.Module):
    """Looks at the size of its input, which a whole-network trace cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Any:
        if x.shape[-1] % 3:
            x = F.pad(x, (0, 3 - x.shape[-1] % 3))
        if x.dim() != 4:
            raise ValueError(f"Expected images, got {x.dim()} dimensions.")
        return F.relu(self.norm(self.conv(x)))


class AuxiliaryHead(nn.Module):
    """A second head while it trains, dropout by the functional with its flag, drop path by its own random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.auxiliary, self.head = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.body(x).mean((2, 3))
        if self.training:
            keep = torch.empty(x.shape[0], 1).bernoulli_(0.9)
            return self.head(F.dropout(x, 0.1, self.training) * keep), self.auxiliary(x)
        return self.head(x)


class Experts(nn.Module):
    """Every sample goes to the expert that its values choose."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(2)])

    def forward(self, x: Tensor) -> Any:
        choice = (x.mean(1) > x.mean()).long()
        result = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            chosen = choice == index
            if chosen.any():
                result[chosen] = expert(x[chosen])
        return result


class RoutedNetwork(nn.Module):
    """Control flow on values in the middle, plain layers around."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.experts = Experts()
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.experts(self.features(x).mean((2, 3))))


class CountsItsCalls(nn.Module):
    """Keeps a count and its last result on itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.calls = 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        self.features = F.relu(self.conv(x))
        return self.last(self.features)


def padded() -> nn.Module:
    """A block that looks at sizes between two layers."""
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), PadsOddSizes(), nn.Conv2d(8, 4, 1))


EXAMPLES = {
    "on sizes": Example(padded, random_values(3, 9, 9), {"conv": (3, 3)}),
    "on the mode": Example(AuxiliaryHead, IMAGE, {"conv": (1, 1), "gemm": (1, 1)}),
    "attributes set on the way": Example(CountsItsCalls, IMAGE, {"conv": (2, 2)}),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_control_flow_without_values_comes_all_the_way(name: str, tmp_path: Path) -> None:
    check(EXAMPLES[name], tmp_path)


def test_control_flow_on_values_trains_with_rounding_around_and_inside_it() -> None:
    torch.manual_seed(0)
    model = RoutedNetwork()
    quantization = prepare(model)
    quantization.is_observing = True
    plain = copy.deepcopy(model)
    for seed in range(3):
        loss_of(model, IMAGE(8, seed))
        quantization.ranges.update()
    quantization.is_quantizing = True
    loss_of(model, IMAGE(8, 0)).backward()  # type: ignore[no-untyped-call]
    loss_of(plain, IMAGE(8, 0)).backward()  # type: ignore[no-untyped-call]
    assert [parameter.grad is None for parameter in model.parameters()] == [
        parameter.grad is None for parameter in plain.parameters()
    ]
    assert quantization.layer_bits.keys() == {
        *("features.0", "head"),
        *(f"experts.experts.{expert}.{layer}" for expert in (0, 1) for layer in (0, 2)),
    }
    assert list(quantization.untraceable) == ["experts"]
    assert quantization.ranges.unseen() == []


def test_an_export_names_what_it_cannot_follow_and_the_part_around_it_works(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = RoutedNetwork()
    quantization = prepare(model)
    quantization.is_observing = True
    for seed in range(3):
        loss_of(model, IMAGE(8, seed))
        quantization.ranges.update()
    quantization.is_quantizing = True
    quantization.is_observing = False
    with pytest.raises(ExportError, match="`experts`"):
        export_onnx(model, IMAGE(8, 0), tmp_path / "model.onnx")
    result = export_onnx(model.features, IMAGE(8, 0), tmp_path / "features.onnx", verify_inputs=[IMAGE(5, 1)])
    assert result.audit.counts() == {"conv": (1, 1)}


def test_a_forward_that_was_set_on_a_module_itself_is_what_runs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    plain, linear = copy.deepcopy(model), nn.Linear.forward
    for network in (model, plain):
        network[1].forward = lambda x, layer=network[1]: linear(layer, x) * 2
        network[2].forward = lambda x, block=network[2]: block.get_submodule("0")(x) + 1
    quantization = prepare(model)
    x = torch.randn(3, 4)
    assert torch.equal(model(x), plain(x))
    calibrate(model, [x])
    assert list(quantization.layer_bits) == ["0", "2.0"]
    quantization.is_quantizing = True
    assert 0 < (model(x) - plain(x)).norm() < 0.05 * plain(x).norm()
    own = model[1].forward
    assert strip(model).get_submodule("1").forward is own


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_a_compiled_part_stays_as_it_is() -> None:
    class Scales(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    x = torch.randn(3, 4)
    compiled: nn.Module = torch.jit.trace(Scales(), x)  # type: ignore[no-untyped-call]
    model = nn.Sequential(nn.Linear(4, 4), compiled, nn.Linear(4, 4))
    expected = model(x)
    quantization = prepare(model)
    calibrate(model, [x])
    assert torch.equal(model(x), expected)
    quantization.is_quantizing = True
    assert 0 < (model(x) - expected).norm() < 0.05 * expected.norm()
