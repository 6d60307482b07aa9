"""Norms: batch norm in every position and state, the others, and networks without any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.any_model.inputs import random_values
from tests.any_model.journey import Example, check

IMAGE = random_values(3, 8, 8)


class PreActivation(nn.Module):
    """Norm and activation before each convolution, the sum bare (He et al. 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm1, self.norm2, self.norm3 = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        residual = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return self.fc(F.adaptive_avg_pool2d(F.relu(self.norm3(x + residual)), 1).flatten(1))


class Dense(nn.Module):
    """Norms that read concatenations (Huang et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norm1, self.norm2 = nn.BatchNorm2d(4), nn.BatchNorm2d(8)
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        first = self.stem(x)
        second = torch.cat([first, self.conv1(torch.relu(self.norm1(first)))], 1)
        return torch.cat([second, self.conv2(torch.relu(self.norm2(second)))], 1)


class Fixup(nn.Module):
    """No norm: scalar scales and biases that are learned (Zhang et al. 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bias1, self.bias2 = nn.Parameter(torch.full((1,), 0.1)), nn.Parameter(torch.zeros(1))
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.conv1(x + self.bias1))
        return F.relu(self.conv2(x) * self.scale + self.bias2 + x)


class LayerNormMixer(nn.Module):
    """Linear layers over the positions, then over the channels, each behind a layer norm (Tolstikhin et al. 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 2, stride=2)
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.tokens = nn.Sequential(nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 16))
        self.channels = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8))

    def forward(self, x: Tensor) -> Any:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class LayerNorm2d(nn.Module):
    """A layer norm over the channels of images, written out as in ConvNeXt."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Any:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class ConvNeXtBlock(nn.Module):
    """A depthwise convolution, an inverted bottleneck of linear layers, and a learned scale per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 2, stride=2), LayerNorm2d(8))
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.LayerNorm(8)
        self.wide, self.narrow = nn.Linear(8, 16), nn.Linear(16, 8)
        self.gamma = nn.Parameter(torch.full((8,), 0.5))

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.gamma * self.narrow(F.gelu(self.wide(y)))
        return x + y.permute(0, 3, 1, 2)


class NormOverTokens(nn.Module):
    """A linear layer over tokens with a batch norm over all of them (Graham et al. 2021, LeViT)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        return self.last(F.relu(self.norm(x.flatten(0, 1)).reshape_as(x)))


def blocks(*norms: nn.Module, bias: bool = False) -> nn.Module:
    """Return a convolution before each of ``norms`` over eight channels, and one behind the last."""
    layers: list[nn.Module] = []
    for norm in norms:
        layers += [nn.Conv2d(8 if layers else 3, 8, 3, padding=1, bias=bias), norm, nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(8, 4, 3))


def norm_first() -> nn.Module:
    """A batch norm on the inputs, in place of their preprocessing."""
    return nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))


def hard_gammas() -> nn.Module:
    """Gammas that are negative, zero, and tiny."""
    norm = nn.BatchNorm2d(8)
    norm.weight.data[:4] = torch.tensor([-1.0, 0.0, 1e-6, -1e-6])
    norm.bias.data.uniform_(-0.5, 0.5)
    return blocks(norm, bias=True)


def normless_mlp() -> nn.Module:
    """Linear layers and activations alone."""
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


TWO = {"conv": (2, 2)}
# A batch norm that follows no layer of its own counts as a convolution: one weight for each channel.
EXAMPLES = {
    "batch norms": Example(
        lambda: blocks(nn.BatchNorm2d(8), nn.SyncBatchNorm(8), nn.BatchNorm2d(8, affine=False)), IMAGE, {"conv": (4, 4)}
    ),
    "gammas near zero": Example(hard_gammas, IMAGE, TWO),
    "batch norm first": Example(norm_first, IMAGE, {"conv": (3, 3)}),
    "pre-activation": Example(PreActivation, IMAGE, {"conv": (5, 5), "gemm": (1, 1)}),
    "dense": Example(Dense, IMAGE, {"conv": (5, 5)}, {"concat": 2}),
    "batch norm over tokens": Example(NormOverTokens, random_values(5, 6), {"matmul": (2, 2)}),
    "norms of single samples": Example(
        lambda: blocks(nn.GroupNorm(4, 8), nn.InstanceNorm2d(8, affine=True), nn.LocalResponseNorm(2)),
        IMAGE,
        {"conv": (4, 4)},
    ),
    "layer norm": Example(LayerNormMixer, IMAGE, {"conv": (1, 1), "matmul": (4, 4)}, {"add": 2}),
    "layer norm by hand": Example(ConvNeXtBlock, IMAGE, {"conv": (2, 2), "matmul": (2, 2)}),
    "rms norm": Example(
        lambda: nn.Sequential(nn.Linear(6, 8), nn.RMSNorm(8), nn.SiLU(), nn.Linear(8, 4)),
        random_values(6),
        {"gemm": (2, 2)},
    ),
    "learned scalars": Example(Fixup, IMAGE, TWO),
    "no norm": Example(normless_mlp, random_values(6), {"gemm": (3, 3)}),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_layers_around_norms_run_in_integers(name: str, tmp_path: Path) -> None:
    check(EXAMPLES[name], tmp_path)


def test_statistics_of_the_batch_cannot_be_folded_and_stay_in_float(tmp_path: Path) -> None:
    journey = check(Example(lambda: blocks(nn.BatchNorm2d(8, track_running_stats=False)), IMAGE, TWO), tmp_path)
    assert "1" in journey.floats
