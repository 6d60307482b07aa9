"""Convolutions of every kind: of one and three dimensions, transposed, functional, with forwards of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.any_model.inputs import random_values
from tests.any_model.journey import Example, check

IMAGE = random_values(3, 8, 8)


def sequence() -> nn.Module:
    """Keyword spotting: convolutions over time, the second depthwise."""
    return nn.Sequential(
        nn.Conv1d(4, 8, 5, stride=2, bias=False),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Conv1d(8, 8, 3, padding=1, groups=8),
        nn.BatchNorm1d(8),
        nn.ReLU6(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


def volume() -> nn.Module:
    """Medical volumes: convolutions and pooling in three dimensions."""
    return nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1, bias=False),
        nn.BatchNorm3d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool3d(2),
        nn.Conv3d(4, 6, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 8, 3),
    )


def padded() -> nn.Module:
    """Paddings by name and by mode, dilation."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding="same"),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect"),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=2, dilation=2, padding_mode="circular"),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, padding="valid"),
    )


class UNet(nn.Module):
    """Down by a stride, up by a transposed convolution, and the skip beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.down = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Any:
        skip = F.relu(self.stem(x))
        up = F.relu(self.norm(self.up(self.down(skip))))
        return self.head(torch.cat([skip, up], 1))


class SamePadding(nn.Conv2d):
    """A convolution that pads its input with a child of its own, as many ports of TensorFlow models do."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, groups=groups, bias=False)
        self.static_padding = nn.ZeroPad2d((0, kernel_size - stride, 0, kernel_size - stride))

    def forward(self, x: Tensor) -> Tensor:
        x = self.static_padding(x)
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class DynamicSamePadding(nn.Conv2d):
    """A convolution that computes its padding from the size of its input."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        bottom = max((-(-height // self.stride[0]) - 1) * self.stride[0] + self.kernel_size[0] - height, 0)
        right = max((-(-width // self.stride[1]) - 1) * self.stride[1] + self.kernel_size[1] - width, 0)
        x = F.pad(x, (right // 2, right - right // 2, bottom // 2, bottom - bottom // 2))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class StandardizedWeight(nn.Conv2d):
    """Weight standardization (Qiao et al. 2019): the weight is computed at each call."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class CausalConvolution(nn.Conv1d):
    """Pads the past only, and leaves the rest to its base class."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, (self.kernel_size[0] - 1, 0)))


class FunctionalLayers(nn.Module):
    """Weights as bare parameters of the module that uses them."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 3, 3, 3) * 0.2)
        self.kernel_bias = nn.Parameter(torch.zeros(6))
        self.matrix = nn.Parameter(torch.randn(5, 6) * 0.4)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(F.conv2d(x, self.kernel, self.kernel_bias, padding=1))
        return F.linear(x.mean((2, 3)), self.matrix)


def same_padding() -> nn.Module:
    """A depthwise-separable block of an EfficientNet port."""
    return nn.Sequential(
        SamePadding(3, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        SamePadding(8, 8, 3, groups=8),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 1),
    )


EXAMPLES = {
    "one dimension": Example(sequence, random_values(4, 32), {"conv": (2, 2), "gemm": (1, 1)}),
    "three dimensions": Example(volume, random_values(1, 8, 8, 8), {"conv": (2, 2), "gemm": (1, 1)}),
    "paddings": Example(padded, IMAGE, {"conv": (4, 4)}),
    "own padding": Example(same_padding, IMAGE, {"conv": (3, 3)}),
    "padding from the size": Example(
        lambda: nn.Sequential(DynamicSamePadding(3, 6, 3, stride=2), nn.ReLU(), DynamicSamePadding(6, 4, 3)),
        IMAGE,
        {"conv": (2, 2)},
    ),
    "standardized weight": Example(
        lambda: nn.Sequential(StandardizedWeight(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), StandardizedWeight(8, 4, 3)),
        IMAGE,
        {"conv": (2, 2)},
    ),
    "causal": Example(
        lambda: nn.Sequential(CausalConvolution(4, 8, 3), nn.ReLU(), CausalConvolution(8, 4, 3, dilation=1)),
        random_values(4, 16),
        {"conv": (2, 2)},
    ),
    "functional": Example(FunctionalLayers, IMAGE, {"conv": (1, 1), "gemm": (1, 1)}),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_convolutions_run_in_integers(name: str, tmp_path: Path) -> None:
    check(EXAMPLES[name], tmp_path)


TRANSPOSED = {
    "with a norm and a skip": (Example(UNet, IMAGE, {"conv": (3, 4)}), 1),
    "one dimension": (
        Example(
            lambda: nn.Sequential(
                nn.Conv1d(4, 8, 3, stride=2, padding=1),
                nn.ReLU(),
                nn.ConvTranspose1d(8, 8, 3, stride=2, padding=1, output_padding=1, groups=4),
                nn.ReLU(),
                nn.ConvTranspose1d(8, 4, 1),
            ),
            random_values(4, 16),
            {"conv": (1, 3)},
        ),
        2,
    ),
}


@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposed_convolutions_are_stored_in_integers(name: str, tmp_path: Path) -> None:
    # ONNX Runtime has no integer kernel for them on a CPU: what counts is what the file holds.
    example, n_transposed = TRANSPOSED[name]
    journey = check(example, tmp_path)
    assert journey.floats == {}
    weights = [item for item in onnx.load(journey.result.path).graph.initializer if len(item.dims) > 2]
    assert [item.data_type for item in weights] == [onnx.TensorProto.INT8] * example.layers["conv"][1]
    transposed = [row for row in journey.result.audit.floats() if "ConvTranspose" in row.name]
    assert len(transposed) == n_transposed
