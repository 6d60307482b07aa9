"""Activations of every kind between layers that run in integers, and gates made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.any_model.inputs import random_values
from tests.any_model.journey import Example, check

IMAGE = random_values(3, 8, 8)

Activation = Callable[[Tensor], Tensor]


class Activated(nn.Module):
    """Each activation behind a batch norm, and again behind a residual sum."""

    def __init__(self, activations: Sequence[Activation]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.convs = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in activations])
        self.norms = nn.ModuleList([nn.BatchNorm2d(8) for _ in activations])
        self.modules_among_them = nn.ModuleList([item for item in activations if isinstance(item, nn.Module)])
        self.activations = list(activations)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        for conv, norm, activation in zip(self.convs, self.norms, self.activations, strict=True):
            x = activation(activation(norm(conv(x))) + x)
        return self.last(x)


ACTIVATIONS: dict[str, Callable[[], list[Activation]]] = {
    "that clip": lambda: [nn.ReLU(), nn.ReLU6(inplace=True), nn.Hardtanh(), F.relu],
    "that clip, by methods": lambda: [
        lambda x: x.clamp(0.0, 4.0),
        lambda x: torch.clamp(x, min=-1.0),
        lambda x: x.relu(),
    ],
    "with a slope": lambda: [nn.LeakyReLU(0.1, inplace=True), nn.PReLU(), nn.PReLU(8), nn.ELU()],
    "of mobile networks": lambda: [nn.Hardswish(), nn.Hardsigmoid(), nn.SiLU(inplace=True), F.hardswish],
    "that are smooth": lambda: [nn.GELU(), nn.GELU("tanh"), nn.Mish(), nn.Softplus(), torch.tanh],
    "by hand": lambda: [
        lambda x: x * torch.sigmoid(x),
        lambda x: x * F.relu6(x + 3.0) / 6.0,
        lambda x: 0.1 * F.relu(x) ** 2,
        lambda x: torch.where(x > 0, x, 0.1 * x),
    ],
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_layers_around_activations_run_in_integers(name: str, tmp_path: Path) -> None:
    activations = ACTIVATIONS[name]
    n_convolutions = 2 + len(activations())
    check(Example(lambda: Activated(activations()), IMAGE, {"conv": (n_convolutions, n_convolutions)}), tmp_path)


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
    "squeeze and excite": Example(lambda: SqueezeExcite(nn.Sigmoid()), IMAGE, {"conv": (4, 4)}, {"mul": 1}),
    "squeeze and excite by a hard sigmoid": Example(
        lambda: SqueezeExcite(nn.Hardsigmoid()), IMAGE, {"conv": (4, 4)}, {"mul": 1}
    ),
    "squeeze and excite by linear layers": Example(
        LinearSqueezeExcite, IMAGE, {"conv": (2, 2), "gemm": (2, 2)}, {"mul": 1, "pool": 1}
    ),
    "gated linear units": Example(
        GatedLinearUnit, random_values(6), {"gemm": (5, 5)}, {"mul": 1, "add": 1}, least_snr_db=15.0
    ),
}


@pytest.mark.parametrize("name", GATES)
def test_gates_run_in_integers(name: str, tmp_path: Path) -> None:
    check(GATES[name], tmp_path)
