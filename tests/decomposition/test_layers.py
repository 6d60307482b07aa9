"""Small layers compute what the layers compute that they stand for."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.decomposition import compact_
from lightning_compress.decomposition.candidates import candidates
from lightning_compress.decomposition.filter_groups import Over, dim_of, draw_together_, stacked
from lightning_compress.decomposition.layers import GroupSum, factor_layers, factor_macs, shared_layer
from lightning_compress.decomposition.low_rank import Scheme, as_matrix, as_weight, best_basis, projected
from lightning_compress.errors import CompressionError
from lightning_compress.report import model_statistics

GROUPS = [[0, 3], [1, 4], [2]]
"""Of five channels, neither in order nor all of one size."""

SHARED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 5), (3, 5)),
    "linear over a sequence, without bias": (lambda: nn.Linear(5, 5, bias=False), (3, 7, 5)),
    "conv1d": (lambda: nn.Conv1d(5, 5, 3, stride=2, padding=1), (3, 5, 9)),
    "conv2d": (lambda: nn.Conv2d(5, 5, (3, 2), padding="same", dilation=2), (3, 5, 8, 7)),
    "conv2d without a batch": (lambda: nn.Conv2d(5, 5, 3, padding=1, padding_mode="reflect"), (5, 8, 7)),
    "conv3d": (lambda: nn.Conv3d(5, 5, 2, bias=False), (2, 5, 4, 4, 4)),
}


@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.parametrize("over", ["inputs", "outputs"])
def test_one_filter_for_a_group_computes_what_tied_filters_do(kind: str, over: Over) -> None:
    torch.manual_seed(0)
    make, shape = SHARED[kind]
    layer, x = make().double(), torch.randn(shape).double()
    weight = layer.get_parameter("weight")
    draw_together_(weight.detach(), dim_of(over), stacked(GROUPS))
    small = shared_layer(layer, over, GROUPS)
    torch.testing.assert_close(small(x), layer(x), rtol=0, atol=1e-10)
    one = next(parameter for parameter in small.parameters() if parameter.dim() > 1)
    assert one.shape[dim_of(over)] == 3
    assert one.numel() == weight.numel() * 3 // 5


def test_channels_in_order_are_summed_without_being_moved() -> None:
    summed = GroupSum([[0, 1], [2, 3]], -3)
    assert summed.order is None
    assert summed(torch.arange(4.0).view(1, 4, 1, 1)).flatten().tolist() == [1.0, 5.0]
    assert GroupSum([[0, 3], [1, 2]], -1)(torch.arange(4.0)).tolist() == [3.0, 3.0]
    assert summed.state_dict() == {}


FACTORS: dict[str, tuple[Callable[[], nn.Module], Scheme, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 8), "channel", (3, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 8, 3, stride=2, padding=1, bias=False), "channel", (3, 4, 9)),
    "conv2d by channel": (lambda: nn.Conv2d(4, 8, 3, stride=2, padding=(1, 0), dilation=2), "channel", (3, 4, 9, 8)),
    "conv2d in space": (
        lambda: nn.Conv2d(4, 8, (3, 5), stride=(2, 3), padding=(1, 2), dilation=(1, 2)),
        "spatial",
        (3, 4, 9, 17),
    ),
    "conv2d in space, same": (lambda: nn.Conv2d(4, 8, (5, 3), padding="same", bias=False), "spatial", (3, 4, 9, 8)),
    "conv2d in space, circular": (
        lambda: nn.Conv2d(4, 8, 3, padding=(1, 2), padding_mode="circular"),
        "spatial",
        (4, 9, 8),
    ),
    "conv3d": (lambda: nn.Conv3d(2, 8, 2), "channel", (2, 2, 4, 4, 4)),
}


@pytest.mark.parametrize("kind", FACTORS)
def test_two_factors_compute_what_a_weight_of_their_rank_does(kind: str) -> None:
    torch.manual_seed(0)
    make, scheme, shape = FACTORS[kind]
    layer, x = make().double(), torch.randn(shape).double()
    weight = layer.get_parameter("weight")
    matrix = as_matrix(weight.detach(), scheme)
    weight.data = as_weight(projected(matrix, best_basis(matrix, 3)), weight.shape, scheme).contiguous()
    small = factor_layers(layer, scheme, 3)
    torch.testing.assert_close(small(x), layer(x), rtol=0, atol=1e-8)


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
def test_the_cost_that_decides_is_the_one_that_is_counted(scheme: Scheme) -> None:
    layer, x = nn.Conv2d(4, 8, 3, stride=2, padding=1), torch.zeros(1, 4, 16, 16)
    positions = 8 * 8
    factors, whole = factor_macs(layer, scheme, 3)
    assert model_statistics(layer, (x,)).macs == whole * positions
    assert model_statistics(factor_layers(layer, scheme, 3), (x,)).macs == factors * positions


def test_frozen_layers_and_modes_stay() -> None:
    layer = nn.Linear(4, 4).eval()
    layer.weight.requires_grad_(False)
    small = factor_layers(layer, "channel", 2)
    assert [parameter.requires_grad for parameter in small.parameters()] == [False, False, True]
    assert not small[1].training


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.attention = nn.MultiheadAttention(4, 2)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8)
        self.scaled = Scaled(4, 4)
        self.inner = nn.Sequential(OrderedDict(reading=Reading(), other=nn.Linear(4, 4)))
        self.plain = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        weights: Tensor = self.plain(x) + self.deep()
        return weights if self.plain.training else self.plain.forward(weights)

    def deep(self) -> Any:
        inner: Any = self.inner
        return inner.reading.deep.weight


class Reading(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.read, self.deep, self.called = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.called(x).view(-1, self.read.in_features)
        return found


class Scaled(nn.Linear):
    pass


def test_layers_that_others_cannot_stand_for_are_left_alone() -> None:
    found, reasons = candidates(Tied(), [])
    assert list(found) == ["inner.reading.called", "inner.other", "plain"]
    reads = "has its `weight` read in the forward of a `TransformerEncoderLayer`"
    joint = "is a `NonDynamicallyQuantizableLinear`, whose forward may be its own"
    assert reasons == {
        "first": "shares its weight with another layer",
        "second": "shares its weight with another layer",
        "attention.out_proj": joint,
        "encoder.self_attn.out_proj": joint,
        "encoder.linear1": reads,
        "encoder.linear2": reads,
        "scaled": "is a `Scaled`, whose forward may be its own",
        "inner.reading.read": "has its `in_features` read in the forward of a `Reading`",
        "inner.reading.deep": "has its `weight` read in the forward of a `Tied`",
    }
    assert list(candidates(nn.Linear(2, 2), [])[1].values()) == [
        "is the whole model, and has no place in another module"
    ]


def test_a_record_is_plain_and_brings_the_layers_back() -> None:
    record: dict[str, dict[str, Any]] = {
        "0": {"over": "inputs", "groups": [[0, 1], [2, 3]]},
        "1.0": {"scheme": "spatial", "rank": 2},
        "2": {"over": "outputs", "groups": [[0, 2], [1]]},
    }

    def made() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.Conv2d(3, 4, 3)), nn.Linear(4, 3))

    first, second = made(), made()
    compact_(first, record)
    compact_(second, json.loads(json.dumps(record)))
    second.load_state_dict(first.state_dict())
    assert {name: tuple(value.shape) for name, value in second.state_dict().items()} == {
        "0.1.weight": (3, 2),
        "0.1.bias": (3,),
        "1.0.0.weight": (2, 3, 3, 1),
        "1.0.1.weight": (4, 2, 1, 3),
        "1.0.1.bias": (4,),
        "2.0.weight": (2, 4),
        "2.1.bias": (3,),
    }


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"x": {"scheme": "channel", "rank": 1}},
            r"`Sequential` has no layer `x` that small ones could stand for\.",
        ),
        (
            {"1": {"scheme": "channel", "rank": 1}},
            r"`Sequential` has no layer `1` that small ones could stand for\.",
        ),
        ({"0": {"over": "inputs", "groups": [[0], [1]]}}, r"it groups 2 inputs of `0`, which has 4\.$"),
        (
            {"0": {"scheme": "channel", "rank": 5}},
            r"it has channel factors of rank 5 for `0`, whose weight has the shape \(4, 4\)\.$",
        ),
        (
            {"0": {"scheme": "spatial", "rank": 1}},
            r"it has spatial factors of rank 1 for `0`, whose weight has the shape \(4, 4\)\.$",
        ),
    ],
)
def test_a_record_of_another_architecture_is_refused(record: Any, message: str) -> None:
    start = "^The record of small layers is that of another architecture: "
    with pytest.raises(CompressionError, match=start + message):
        compact_(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), record)
