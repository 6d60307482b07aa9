from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.pruning.channels.attention import head_parts
from lightning_compress.pruning.channels.groups import find_channel_groups
from lightning_compress.pruning.channels.importance import Importance, channel_importance, taylor_scores
from lightning_compress.pruning.channels.places import channel_sums
from tests.pruning.channels import networks


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, 3, 1, bias=False)
        self.norm = nn.BatchNorm1d(3)
        self.last = nn.Conv1d(3, 1, 1, bias=False)
        self.first.weight.data = torch.tensor([1.0, -2.0, 3.0]).view(3, 1, 1)
        self.norm.weight.data = torch.tensor([0.5, -1.0, 3.0])
        self.last.weight.data = torch.tensor([3.0, 0.0, -1.0]).view(1, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("importance", "scores"),
    [
        # Means over the layer that makes the channel and the one that reads it: (1 + 3, 2 + 0, 3 + 1) / 2.
        ("l1", [2.0, 1.0, 2.0]),
        ("l2", [5.0, 2.0, 5.0]),
        ("bn_scale", [0.5, 1.0, 3.0]),
        # Distances of the filters 1, -2 and 3: 3 + 2, 3 + 5, 2 + 5.
        ("fpgm", [5.0, 8.0, 7.0]),
    ],
)
def test_importance_by_hand(importance: Importance, scores: list[float]) -> None:
    network = Small()
    groups = find_channel_groups(network, [torch.rand(1, 1, 2)]).groups
    expected = torch.tensor(scores) / torch.tensor(scores).mean()
    assert torch.allclose(channel_importance(network, groups, importance)["first"], expected)


def test_taylor_is_the_squared_sum_of_weight_times_gradient() -> None:
    network = Small().eval()
    groups = find_channel_groups(network, [torch.rand(1, 1, 2)]).groups
    network(torch.ones(1, 1, 1)).sum().backward()
    by_hand = [
        torch.stack(
            [
                (network.first.weight[i] * network.first.weight.grad[i]).sum() ** 2,  # type: ignore[index]
                (network.last.weight[:, i] * network.last.weight.grad[:, i]).sum() ** 2,  # type: ignore[index]
            ]
        ).mean()
        for i in range(3)
    ]
    assert torch.allclose(taylor_scores(network, groups)["first"], torch.stack(by_hand))


def test_random_importance_hangs_on_nothing_but_the_name() -> None:
    first, second = Small(), Small()
    second.first.weight.data *= 5
    groups = find_channel_groups(first, [torch.rand(1, 1, 2)]).groups
    scores = channel_importance(first, groups, "random")["first"]
    assert torch.equal(scores, channel_importance(second, groups, "random")["first"])
    assert len(set(scores.tolist())) == 3


def test_weights_that_are_not_finite_cannot_be_ranked() -> None:
    network = Small()
    groups = find_channel_groups(network, [torch.rand(1, 1, 2)]).groups
    network.first.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="A weight of the channel group `first` holds NaN or infinity"):
        channel_importance(network, groups, "l2")


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.ConvTranspose1d])
def test_sums_over_channels_of_grouped_layers_are_those_of_the_whole_layer(kind: type[nn.Module]) -> None:
    grouped = kind(4, 6, 3, groups=2)
    weight = grouped.get_parameter("weight").detach().abs()
    made, read = torch.zeros(6), torch.zeros(4)
    for group in range(2):
        for i in range(2):
            for o in range(3):
                row, column = (group * 3 + o, i) if kind is nn.Conv1d else (group * 2 + i, o)
                made[group * 3 + o] += weight[row, column].sum()
                read[group * 2 + i] += weight[row, column].sum()
    assert torch.allclose(channel_sums(grouped, "out", torch.abs), made)
    assert torch.allclose(channel_sums(grouped, "in", torch.abs), read)


@pytest.mark.parametrize("importance", ["l1", "l2", "fpgm", "bn_scale"])
def test_a_head_without_weights_is_worth_least(importance: Importance) -> None:
    network = networks.Attention()
    groups = find_channel_groups(network, [torch.rand(1, 5, 3)]).groups
    with torch.no_grad():
        for part in head_parts(network.attention):
            part.of(network.attention).index_fill_(part.dim, part.index[2], 0)
    scores = channel_importance(network, groups, importance)["attention"]
    expected = 2 if importance != "fpgm" else scores.argmin().item()
    assert scores.argmin().item() == expected
    assert len(scores) == 4


def test_taylor_counts_all_weights_of_a_head() -> None:
    network = networks.Attention()
    groups = find_channel_groups(network, [torch.rand(1, 5, 3)]).groups
    network(torch.rand(1, 5, 3)).square().sum().backward()
    by_hand = torch.zeros(4)
    for part in head_parts(network.attention):
        weight = part.of(network.attention)
        assert weight.grad is not None
        products = (weight * weight.grad).movedim(part.dim, 0)
        by_hand += torch.stack([products[rows].sum() for rows in part.index]) * (weight.dim() > 1)
    assert torch.allclose(taylor_scores(network, groups)["attention"], by_hand.square())
