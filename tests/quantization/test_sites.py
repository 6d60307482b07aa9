"""Where values are rounded: on learned grids, with the activation that the rounding takes over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.quantization import Quantization, calibrate, prepare


def learning(activation: nn.Module, bits: int = 4, **settings: Any) -> tuple[nn.Sequential, Quantization]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), activation, nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    quantization = prepare(net, activation_bits=bits, edge_bits=2, **settings)
    calibrate(net, [torch.randn(64, 4) * 4 for _ in range(3)])
    quantization.is_quantizing = True
    quantization.learn()
    return net, quantization


def value_at(net: nn.Module, quantization: Quantization, name: str, x: Tensor) -> Tensor:
    quantization.recorded = []
    net(x)
    found = dict(quantization.recorded)[name]
    quantization.recorded = None
    return found


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-1.5, 2.0), nn.Identity()])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_learned_grid_rounds_as_the_fixed_grid_of_the_same_scale(activation: nn.Module, symmetric: bool) -> None:
    net, quantization = learning(activation, symmetric=symmetric)
    x = torch.randn(32, 4) * 4
    index = next(index for index, grid in quantization.ranges.learned.items() if quantization.ranges.bits[index] == 4)
    name = quantization.ranges.names[index]
    found = value_at(net, quantization, name, x)
    quantization.ranges.load_state_dict(quantization.ranges.state_dict())  # without what was learned
    assert not quantization.ranges.learned
    expected = value_at(net, quantization, name, x)
    assert torch.equal(found, expected)
    assert len(set(found.flatten().tolist())) > 3


def test_no_gradient_passes_where_the_activation_clips() -> None:
    net, _ = learning(nn.ReLU6())
    x = (torch.randn(16, 4) * 8).requires_grad_()
    results: list[Tensor] = []
    net[0].register_forward_hook(lambda module, args, result: results.append(result))
    loss = net(x).square().sum()
    inside = results[0].detach()
    gradients = torch.autograd.grad(loss, results)
    is_clipped = (inside < 0.0) | (inside > 6.0)
    assert is_clipped.any()
    assert (gradients[0][is_clipped] == 0).all()
    assert (gradients[0] != 0).any()


def test_learned_steps_get_gradients_only_while_they_learn() -> None:
    net, quantization = learning(nn.ReLU())
    net(torch.randn(8, 4)).sum().backward()
    assert all(leaf.grad is not None for leaf in quantization.steps.leaves.values())
    quantization.stop_learning()
    net(torch.randn(8, 4)).sum().backward()
    assert all(leaf.grad is None for leaf in quantization.steps.leaves.values())


def test_a_plain_training_loop_learns_steps() -> None:
    net, quantization = learning(nn.ReLU(), bits=2, weight_bits=2)
    x = torch.randn(64, 4) * 4
    quantization.is_quantizing = False
    target = net(x).detach()
    quantization.is_quantizing = True
    before = {name: leaf.detach().clone() for name, leaf in quantization.steps.leaves.items()}
    losses = []
    for _ in range(300):  # the weights stay: only the steps learn
        loss = (net(x) - target).square().mean()
        loss.backward()
        losses.append(loss.item())
        quantization.update_steps()
    assert losses[-1] < 0.95 * losses[0]
    assert all(not torch.equal(before[name], leaf) for name, leaf in quantization.steps.leaves.items())


def test_the_learned_scale_of_the_input_reaches_the_integer_bias() -> None:
    _, quantization = learning(nn.ReLU())
    index = quantization.ranges.names.index("1")
    with torch.no_grad():
        quantization.ranges.learned[index].step.mul_(2)
    quantization.ranges.renew_learned()
    grid = quantization.ranges.grid(index)
    assert grid is not None
    assert quantization.ranges.parameters(index)[0].item() == grid.scale


@pytest.mark.usefixtures("nothing_compiled")
def test_a_compiled_network_learns_the_same_in_one_graph() -> None:
    net, quantization = learning(nn.ReLU6())
    x = torch.randn(8, 4)
    net(x).square().sum().backward()
    expected = {name: leaf.grad for name, leaf in quantization.steps.leaves.items()}
    for leaf in quantization.steps.leaves.values():
        leaf.grad = None
    torch.compile(net, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
    for name, leaf in quantization.steps.leaves.items():
        torch.testing.assert_close(leaf.grad, expected[name])
