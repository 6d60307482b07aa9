"""Activations of every kind between layers that run in integers, and gates made of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.any_model.inputs import random_values
from tests.any_model.journey import Example, check

IMAGE = random_values(3, 8, 8)


class Activated(nn.Module):
    """An activation behind a batch norm, and another behind a residual sum."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.conv3 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.activation = activation

    def forward(self, x: Tensor) -> Any:
        x = self.activation(self.norm(self.conv1(x)))
        return self.conv3(self.activation(self.conv2(x) + x))


ACTIVATIONS: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "relu": nn.ReLU,
    "relu6": lambda: nn.ReLU6(inplace=True),
    "prelu": nn.PReLU,
    "prelu per channel": lambda: nn.PReLU(8),
    "leaky relu": lambda: nn.LeakyReLU(0.1, inplace=True),
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
    "silu": lambda: nn.SiLU(inplace=True),
    "gelu": nn.GELU,
    "gelu with tanh": lambda: nn.GELU("tanh"),
    "elu": nn.ELU,
    "mish": nn.Mish,
    "softplus": nn.Softplus,
    "tanh": lambda: torch.tanh,
    "clamp": lambda: lambda x: x.clamp(0.0, 4.0),
    "hard clamp": lambda: lambda x: torch.clamp(x, min=-1.0, max=1.0),
    "swish by hand": lambda: lambda x: x * torch.sigmoid(x),
    "hard swish by hand": lambda: lambda x: x * F.relu6(x + 3.0) / 6.0,
    "squared relu": lambda: lambda x: F.relu(x) ** 2,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_layers_around_an_activation_run_in_integers(name: str, tmp_path: Path) -> None:
    example = Example(lambda: Activated(ACTIVATIONS[name]()), IMAGE, {"conv": (3, 3)}, {"add": (1, 1)})
    check(example, tmp_path)


class SqueezeExcite(nn.Module):
    """Channels weighted by a gate of their means (Hu et al. 2018)."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.gate = gate
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Any:
        x = F.hardswish(self.norm(self.conv(x)))
        gate = self.gate(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.last(x * gate)


class LinearSqueezeExcite(nn.Module):
    """The same by linear layers, with a view in between."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.gate = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 8), nn.Sigmoid())
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Any:
        x = F.silu(self.conv(x))
        batch, channels = x.shape[:2]
        gate = self.gate(self.pool(x).view(batch, channels)).view(batch, channels, 1, 1)
        return self.last(x * gate.expand_as(x))


class GatedLinearUnit(nn.Module):
    """Half of the features gates the other (Dauphin et al. 2017; Shazeer 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(6, 16), nn.Linear(8, 12)
        self.gate, self.up, self.down = nn.Linear(6, 10), nn.Linear(6, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Any:
        x = x + F.glu(self.narrow(F.glu(self.wide(x), -1)), -1)
        return self.down(F.silu(self.gate(x)) * self.up(x))


GATES = {
    "squeeze and excite": Example(
        lambda: SqueezeExcite(nn.Sigmoid()), IMAGE, {"conv": (4, 4)}, {"mul": (1, 1), "pool": (1, 1)}
    ),
    "squeeze and excite by a hard sigmoid": Example(
        lambda: SqueezeExcite(nn.Hardsigmoid()), IMAGE, {"conv": (4, 4)}, {"pool": (1, 1)}
    ),
    "squeeze and excite by linear layers": Example(
        LinearSqueezeExcite, IMAGE, {"conv": (2, 2), "gemm": (2, 2)}, {"mul": (1, 1), "pool": (1, 1)}
    ),
    "gated linear units": Example(GatedLinearUnit, random_values(6), {"gemm": (5, 5)}),
}


@pytest.mark.parametrize("name", GATES)
def test_gates_run_in_integers(name: str, tmp_path: Path) -> None:
    check(GATES[name], tmp_path)
