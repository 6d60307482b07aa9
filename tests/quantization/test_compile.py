"""`torch.compile` of a network in quantization-aware training: one graph, the same values, few recompilations."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from lightning_compress.quantization import Quantization, prepare, quantization_of
from tests.small_networks import NETWORKS, images, quantized, warmed

pytestmark = pytest.mark.usefixtures("nothing_compiled")


@pytest.fixture(autouse=True)
def _nothing_counted() -> None:
    counters.clear()


def state_of(model: nn.Module) -> Quantization:
    quantization = quantization_of(model)
    assert quantization is not None
    return quantization


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


@pytest.mark.parametrize("name", ["residual", "pre_activation", "concatenated", "squeeze_excite"])
def test_a_quantized_network_compiles_to_one_graph_with_the_same_values(name: str) -> None:
    torch.manual_seed(0)
    model = warmed(NETWORKS[name]())
    quantized(model)
    model.train()
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = images()
    found, expected = compiled(x), plain(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    found.square().mean().backward()
    expected.square().mean().backward()
    # Eager code reads the mask of the gradient off the result: it is also zero where a value is rounded to a bound.
    assert (gradient(model) - gradient(plain)).norm() <= 0.02 * gradient(plain).norm()


def test_a_run_with_observations_compiles_twice_and_learns_its_ranges() -> None:
    torch.manual_seed(0)
    model = warmed(NETWORKS["residual"]())
    quantized(model)
    model.train()
    quantization = state_of(model)
    compiled = torch.compile(model, backend="aot_eager")
    before = quantization.ranges.as_dict()
    for step in range(12):
        quantization.is_observing = step % 4 == 0
        compiled(3.0 * images()).square().mean().backward()
        quantization.is_observing = False
        if step % 4 == 0:
            quantization.ranges.update()
    assert counters["graph_break"] == {}
    assert counters["stats"]["unique_graphs"] == 2  # observing or not
    assert quantization.ranges.as_dict()["x"][1] > 1.5 * before["x"][1]


def test_the_first_rounded_step_is_one_graph_too_with_ranges_of_its_own_batch() -> None:
    torch.manual_seed(0)
    # Without biases: those are rounded to a range's grid from the second step on.
    layers = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1, bias=False)]
    model = nn.Sequential(*layers)
    quantization = prepare(model)
    quantization.is_observing = quantization.is_quantizing = True
    plain = copy.deepcopy(model)
    x = images()
    found = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(found, plain(x), rtol=0, atol=1e-6)
    quantization.ranges.update()
    state_of(plain).ranges.update()
    assert quantization.ranges.as_dict() == state_of(plain).ranges.as_dict()
    assert not quantization.ranges.unseen()
