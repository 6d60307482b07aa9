"""Pooling, resampling, and everything that only moves values: shuffles, splits, concatenations."""

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

IMAGE = random_values(3, 9, 9)


def between(*modules: nn.Module, channels: int = 8) -> nn.Module:
    """Return ``modules`` between two convolutions; the second reads ``channels``."""
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), *modules, nn.Conv2d(channels, 4, 1))


class Interpolated(nn.Module):
    """A feature pyramid: the coarse map is enlarged and added to the fine one."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.last = nn.Conv2d(8, 4, 1)
        self.mode = mode

    def forward(self, x: Tensor) -> Any:
        fine = F.relu(self.fine(x))
        coarse = F.relu(self.coarse(fine))
        corners = None if self.mode == "nearest" else False
        return self.last(fine + F.interpolate(coarse, size=fine.shape[-2:], mode=self.mode, align_corners=corners))


class SegNet(nn.Module):
    """Pooling that keeps where its maxima were, and unpooling to those places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = (nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1))

    def forward(self, x: Tensor) -> Any:
        x, places = F.max_pool2d(F.relu(self.first(x)), 3, return_indices=True)
        return self.last(F.max_unpool2d(F.relu(self.second(x)), places, [3, 3]))


class ChannelShuffle(nn.Module):
    """Half of the channels goes through a branch, then all are shuffled (Ma et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.branch = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.ReLU())
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Any:
        kept, changed = self.stem(x).chunk(2, dim=1)
        x = torch.cat((kept, self.branch(changed)), dim=1)
        batch, channels, height, width = x.size()
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).contiguous()
        return self.last(x.view(batch, -1, height, width))


class SplitAndConcat(nn.Module):
    """Parts that went different ways meet again on one grid."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 1)
        self.small, self.large = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Any:
        first, second, third = torch.split(F.relu(self.stem(x)), [4, 4, 4], dim=1)
        return self.last(torch.cat([F.relu(self.small(first)), second, self.large(third)], 1))


class Focus(nn.Module):
    """Every other pixel as a channel of its own, by slices (YOLOv5's stem)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.first(x))[..., :8, :8]
        parts = [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]]
        return self.last(torch.cat(parts, 1))


class PyramidPooling(nn.Module):
    """Maxima over growing windows, side by side (SPPF)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(16, 4, 1)
        self.pool = nn.MaxPool2d(5, stride=1, padding=2)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.first(x))
        once = self.pool(x)
        twice = self.pool(once)
        return self.last(torch.cat((x, once, twice, self.pool(twice)), 1))


class Shifted(nn.Module):
    """Windows that roll, pad, stack and unfold."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        x = torch.stack([x.roll(1, dims=1), F.pad(x[:, :-1], (0, 0, 1, 0)), x.flip(1)], dim=1)
        return self.last(x.amax(1).repeat(1, 2, 1))


TWO = {"conv": (2, 2)}
EXAMPLES = {
    "pools": Example(
        lambda: between(
            nn.MaxPool2d(2, ceil_mode=True),
            nn.AvgPool2d(3, 1, padding=1, count_include_pad=False),
            nn.AdaptiveAvgPool2d(3),
            nn.AdaptiveMaxPool2d(1),
        ),
        IMAGE,
        TWO,
    ),
    "spatial pyramid": Example(PyramidPooling, IMAGE, TWO, {"concat": 1}),
    "unpooling": Example(SegNet, IMAGE, {"conv": (3, 3)}),
    "pixel shuffle and unshuffle": Example(
        lambda: between(nn.PixelUnshuffle(3), nn.ChannelShuffle(2), nn.PixelShuffle(6), channels=2), IMAGE, TWO
    ),
    "upsampling": Example(lambda: between(nn.Upsample(scale_factor=2, mode="bilinear")), IMAGE, TWO),
    "nearest interpolation": Example(lambda: Interpolated("nearest"), IMAGE, {"conv": (3, 3)}, {"add": 1}),
    "bilinear interpolation": Example(lambda: Interpolated("bilinear"), IMAGE, {"conv": (3, 3)}, {"add": 1}),
    "paddings": Example(
        lambda: between(nn.ReflectionPad2d(1), nn.ReplicationPad2d(1), nn.ConstantPad2d(1, 0.5)), IMAGE, TWO
    ),
    "channel shuffle": Example(ChannelShuffle, IMAGE, {"conv": (4, 4)}, {"concat": 1}),
    "split and concatenate": Example(SplitAndConcat, IMAGE, {"conv": (4, 4)}, {"concat": 1}),
    "slices": Example(Focus, IMAGE, TWO, {"concat": 1}),
    "rolled and stacked": Example(Shifted, random_values(5, 6), {"matmul": (2, 2)}),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_layers_around_moved_values_run_in_integers(name: str, tmp_path: Path) -> None:
    check(EXAMPLES[name], tmp_path)


@pytest.mark.parametrize("counts_padding", [False, True])
def test_average_pools_with_ceil_mode_divide_by_what_lies_in_the_window(counts_padding: bool, tmp_path: Path) -> None:
    pools = [
        nn.AvgPool2d(2, ceil_mode=True, count_include_pad=counts_padding),
        nn.AvgPool2d(3, 2, padding=1, ceil_mode=True, count_include_pad=counts_padding),
    ]
    journey = check(Example(lambda: between(*pools), random_values(3, 11, 11), TWO), tmp_path)
    assert journey.result.parity.max_diff_steps is not None
    assert journey.result.parity.max_diff_steps <= 1.0


def test_what_is_concatenated_lies_on_one_grid(tmp_path: Path) -> None:
    path = check(EXAMPLES["split and concatenate"], tmp_path).result.path
    graph = onnx.load(path).graph
    producers = {output: node for node in graph.node for output in node.output}
    (concat,) = [node for node in graph.node if node.op_type == "Concat"]
    (reader,) = [node for node in graph.node if concat.output[0] in node.input]
    values = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
    scales = [values[producers[name].input[1]] for name in concat.input] + [values[reader.input[1]]]
    assert len({float(scale) for scale in scales}) == 1
