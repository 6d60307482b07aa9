from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_compress.errors import CompressionError
from lightning_compress.pruning.channels.groups import find_channel_groups
from lightning_compress.pruning.channels.narrowing import narrow_
from lightning_compress.pruning.channels.places import ChannelGroup, record_of
from lightning_compress.pruning.channels.plan import CostModel, Scope, plan_channels, widths
from lightning_compress.report import model_statistics
from tests.pruning.channels import networks

IMAGES = torch.rand(1, 3, 8, 8)


def everything(groups: tuple[ChannelGroup, ...]) -> list[torch.Tensor]:
    return [torch.ones(group.n_units, dtype=torch.bool) for group in groups]


@pytest.mark.parametrize(
    ("n_units", "n_blocks", "round_to", "floor", "expected"),
    [
        (64, 1, 16, 0.1, [64, 48, 32, 16]),
        (100, 1, 16, 0.5, [100, 96, 80, 64]),
        (16, 1, 16, 0.1, [16, 12, 8, 4]),
        (6, 1, 16, 0.1, [6, 5, 4, 3, 2, 1]),
        (96, 32, 16, 0.1, [96, 64, 32]),
        (64, 1, 1, 1.0, [64]),
    ],
)
def test_widths(n_units: int, n_blocks: int, round_to: int, floor: float, expected: list[int]) -> None:
    blocks = torch.arange(n_units) // (n_units // n_blocks)
    assert widths(ChannelGroup("conv", n_units, (), blocks), round_to, floor) == expected


@pytest.mark.parametrize(
    "network",
    [
        networks.Residual,
        networks.Concatenated,
        networks.Depthwise,
        networks.Grouped,
        networks.Transposed,
        networks.Gates,
        networks.Scaled,
        networks.Flattened,
        networks.Halves,
        networks.Attention,
    ],
)
def test_the_cost_is_that_of_the_network_without_the_channels(network: type[nn.Module]) -> None:
    model = network().eval()
    image = {networks.Flattened: torch.rand(1, 3, 6, 6), networks.Attention: torch.rand(1, 5, 3)}.get(network, IMAGES)
    found = find_channel_groups(model, [image])
    kept = [torch.arange(g.n_units) % (g.n_units // g.n_blocks) != 0 for g in found.groups]
    shares = [float(mask.float().mean()) for mask in kept]
    before = model_statistics(model, (image,))
    macs = CostModel(model, found.groups, found.costs, before.macs)(shares)
    parameters = CostModel(model, found.groups, None)(shares)
    narrow_(model, record_of(model, found.groups, kept))
    after = model_statistics(model, (image,))
    assert (round(macs), round(parameters)) == (after.macs, after.parameters)
    assert after.macs < before.macs


def test_the_least_important_units_go_first_over_all_groups() -> None:
    model = networks.Concatenated()
    found = find_channel_groups(model, [IMAGES])
    cost = CostModel(model, found.groups, found.costs)
    scores = {"left": torch.tensor([1.0, 9.0, 9.0, 9.0]), "right": torch.tensor([8.0, 2.0, 8.0, 3.0, 8.0, 8.0])}
    left, right = plan_channels(found.groups, scores, everything(found.groups), cost, 0.7, round_to=1)
    assert left.tolist() == [False, True, True, True]
    assert right.tolist() == [True, False, True, False, True, True]


def test_by_layer_all_groups_lose_the_same_share() -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 1), nn.ReLU(), nn.Conv2d(32, 64, 1), nn.ReLU(), nn.Conv2d(64, 2, 1))
    found = find_channel_groups(model, [IMAGES])
    cost = CostModel(model, found.groups, found.costs)
    scores = {"0": torch.rand(32), "2": 100 + torch.rand(64)}
    kept = plan_channels(found.groups, scores, everything(found.groups), cost, 0.3, scope="layer", round_to=1)
    shares = [float(mask.float().mean()) for mask in kept]
    assert abs(shares[0] - shares[1]) < 0.05


def test_what_is_removed_stays_removed() -> None:
    model = networks.Residual()
    found = find_channel_groups(model, [IMAGES])
    cost = CostModel(model, found.groups, found.costs)
    (first,) = plan_channels(
        found.groups, {"first": torch.arange(8.0)}, everything(found.groups), cost, 0.75, round_to=1
    )
    (second,) = plan_channels(found.groups, {"first": -torch.arange(8.0)}, [first], cost, 0.4, round_to=1)
    assert first.tolist() == [False] + [True] * 7
    assert not second[0]
    assert second.sum() < first.sum()


def test_blocks_lose_as_many_units_each() -> None:
    model = networks.Grouped()
    found = find_channel_groups(model, [IMAGES])
    cost = CostModel(model, found.groups, found.costs)
    scores = {"before": torch.tensor([1.0, 2.0, 9.0, 8.0, 5.0, 6.0, 4.0, 3.0]), "grouped": torch.full((12,), 100.0)}
    kept = plan_channels(found.groups, scores, everything(found.groups), cost, 0.546, round_to=1)
    assert kept[0].tolist() == [False, True, True, False, False, True, True, False]


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("target", [0.9, 0.65, 0.5, 0.33, 0.2])
def test_the_target_is_reached_within_one_percent(scope: Scope, target: float) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 96, 3), nn.ReLU(), nn.Conv2d(96, 128, 3), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Conv2d(128, 10, 1))
    found = find_channel_groups(model, [IMAGES])
    cost = CostModel(model, found.groups, found.costs)
    scores = {group.name: torch.rand(group.n_units) for group in found.groups}
    kept = plan_channels(found.groups, scores, everything(found.groups), cost, target, scope=scope)
    reached = cost([float(mask.float().mean()) for mask in kept]) / cost.total
    assert abs(reached - target) <= 0.01


def test_a_target_below_the_floors_says_what_remains() -> None:
    model = networks.Residual()
    found = find_channel_groups(model, [IMAGES])
    cost = CostModel(model, found.groups, found.costs)
    message = r"No more than 0.0% of the cost can be removed, so that 1.000 remains, and 0.500 was asked for"
    with pytest.raises(CompressionError, match=message):
        plan_channels(found.groups, {"first": torch.ones(8)}, everything(found.groups), cost, 0.5, floors=[1.0])
