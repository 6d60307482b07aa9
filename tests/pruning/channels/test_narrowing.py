from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_compress.errors import CompressionError
from lightning_compress.pruning.channels.narrowing import narrow_


def test_a_linear_layer_keeps_rows_and_columns() -> None:
    layer = nn.Linear(3, 2)
    layer.weight.data = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    layer.bias.data = torch.tensor([7.0, 8.0])
    narrow_(nn.ModuleDict({"fc": layer}), {"fc": {"out": [1], "in": [0, 2]}})
    assert layer.weight.tolist() == [[4.0, 6.0]]
    assert layer.bias.tolist() == [8.0]
    assert (layer.in_features, layer.out_features) == (2, 1)


def test_a_grouped_convolution_keeps_channels_of_each_group() -> None:
    layer = nn.Conv1d(4, 4, 1, groups=2, bias=False)
    layer.weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]]).unsqueeze(2)
    narrow_(nn.ModuleDict({"conv": layer}), {"conv": {"in": [1, 2], "out": [0, 3]}})
    # Group 0 keeps input 1 and output 0, group 1 keeps input 2 (its first) and output 3 (its last).
    assert layer.weight.flatten().tolist() == [2.0, 7.0]
    assert layer(torch.tensor([[[10.0], [1.0]]])).flatten().tolist() == [20.0, 7.0]


def test_a_depthwise_convolution_stays_depthwise() -> None:
    layer = nn.Conv2d(4, 4, 3, groups=4)
    narrow_(nn.ModuleDict({"conv": layer}), {"conv": {"both": [0, 3]}})
    assert (layer.in_channels, layer.out_channels, layer.groups, tuple(layer.weight.shape)) == (2, 2, 2, (2, 1, 3, 3))


def test_a_batch_norm_keeps_its_statistics() -> None:
    norm = nn.BatchNorm1d(3)
    norm.running_mean = torch.tensor([1.0, 2.0, 3.0])
    narrow_(nn.ModuleDict({"norm": norm}), {"norm": {"both": [0, 2]}})
    assert norm.running_mean.tolist() == [1.0, 3.0]
    assert "running_mean" in dict(norm.named_buffers())
    assert norm.num_features == 2


def test_frozen_parameters_stay_frozen() -> None:
    layer = nn.Linear(2, 2).requires_grad_(False)
    narrow_(nn.ModuleDict({"fc": layer}), {"fc": {"out": [1]}})
    assert not layer.weight.requires_grad


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"other": {"out": [0]}},
            "The record of channels is that of another architecture: `ModuleDict` has no `other`",
        ),
        (
            {"fc": {"out": [0, 5]}},
            "The record of channels is that of another architecture: it keeps channel 5 of `fc`, which has 2",
        ),
        ({"fc": {"out": []}}, "The record keeps no channel of `fc`"),
    ],
)
def test_a_record_of_another_architecture_is_refused(record: dict[str, dict[str, list[int]]], message: str) -> None:
    with pytest.raises(CompressionError, match=message):
        narrow_(nn.ModuleDict({"fc": nn.Linear(2, 2)}), record)
