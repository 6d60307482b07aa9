from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.errors import CompressionError
from lightning_compress.pruning.channels.groups import find_channel_groups
from lightning_compress.pruning.channels.narrowing import narrow_
from lightning_compress.pruning.channels.places import ChannelGroup, record_of, removed_places
from tests.pruning.channels import networks

IMAGES = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def places_of(group: ChannelGroup) -> list[str]:
    return sorted(f"{member.module}.{member.side}" for member in group.members)


@pytest.mark.parametrize(
    ("network", "groups"),
    [
        (
            networks.Residual,
            {8: ["bn.both", "first.out", "last.in", "second.in", "second.out"]},
        ),
        (networks.Concatenated, {4: ["last.in", "left.out"], 6: ["last.in", "right.out"]}),
        (networks.Flattened, {4: ["conv.out", "fc.in"]}),
        (networks.Depthwise, {8: ["depthwise.both", "narrow.in", "widen.out"]}),
        (networks.Grouped, {8: ["before.out", "grouped.in"], 12: ["after.in", "grouped.out"]}),
        (networks.Transposed, {8: ["first.out", "grouped.in"], 2: ["grouped.out", "last.in"]}),
        (networks.Halves, {4: ["conv.out", "last.in"]}),
        (networks.Gates, {8: ["conv.out", "excite.out", "last.in", "squeeze.in"], 4: ["excite.in", "squeeze.out"]}),
        (networks.Scaled, {8: ["act.both", "conv.out", "last.in", "scale.dim0"]}),
        (networks.Recurring, {8: ["again.in", "again.out", "first.out", "last.in"]}),
        (networks.AddedToInput, {8: ["back.in", "hidden.out"]}),
    ],
)
def test_channels_that_go_together(network: type[nn.Module], groups: dict[int, list[str]]) -> None:
    found = find_channel_groups(network(), [IMAGES]).groups
    assert {group.n_units: places_of(group) for group in found} == groups


def test_hidden_layers_of_transformers_are_free_and_the_residual_stream_is_not() -> None:
    found = find_channel_groups(networks.Normed(), [torch.rand(1, 5, 3)])
    assert [(group.name, group.n_units) for group in found.groups] == [("up", 16)]
    assert found.left_alone == {
        "embed": "`layer_norm` reads them in `norm`",
        "down": "`layer_norm` reads them in `norm`",
        "head": "the model returns them",
    }


def test_heads_are_units_of_their_own_and_what_reads_them_makes_channels() -> None:
    found = find_channel_groups(networks.Attention(), [torch.rand(2, 5, 3)])
    assert {group.n_units: places_of(group) for group in found.groups} == {
        4: ["attention.heads"],
        8: ["attention.out_proj.out", "head.in"],
    }
    assert found.left_alone["embed"] == "an attention module reads them in `attention`"


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_without_some_heads_computes_what_it_computes_with_zeros_there(batch_first: bool) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 4, batch_first=batch_first).eval()
    masked, small = networks.with_two_of_four_heads(attention)
    x, mask = torch.randn(3, 5, 8), torch.randn(5, 5) if batch_first else torch.randn(3, 3)
    expected, weights = masked(x, x, x, attn_mask=mask, average_attn_weights=False)
    result, fewer = small(x, x, x, attn_mask=mask, average_attn_weights=False)
    assert torch.allclose(result, expected, atol=1e-6)
    assert torch.allclose(fewer, weights[:, [0, 2]], atol=1e-6)
    assert small.in_proj_weight.shape == (12, 8)
    assert not torch.allclose(attention(x, x, x, attn_mask=mask)[0], expected, atol=1e-2)


def test_a_head_of_zeros_proves_nothing_less() -> None:
    network = networks.Concatenated()
    nn.init.zeros_(network.last.weight)
    assert len(find_channel_groups(network, [IMAGES]).groups) == 2
    assert not network.last.weight.any()


def test_a_unit_of_a_flattened_channel_is_all_its_entries() -> None:
    (group,) = find_channel_groups(networks.Flattened(), [IMAGES]).groups
    reads = next(member for member in group.members if member.module == "fc")
    assert reads.units.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert reads.channels.tolist() == list(range(16))


def test_halves_that_are_multiplied_lose_the_same_channels() -> None:
    (group,) = find_channel_groups(networks.Halves(), [IMAGES]).groups
    makes = next(member for member in group.members if member.module == "conv")
    assert makes.units.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


def test_a_grouped_convolution_keeps_as_many_channels_in_each_of_its_groups() -> None:
    before, after = find_channel_groups(networks.Grouped(), [IMAGES]).groups
    assert before.blocks is not None
    assert before.blocks.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert after.blocks is not None
    assert after.blocks.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3


def test_a_shuffle_loses_the_same_channels_of_each_of_its_rows() -> None:
    first, second = find_channel_groups(networks.Shuffled(), [IMAGES]).groups
    assert places_of(first) == ["first.out", "second.in"]
    assert first.members[0].units.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert first.members[1].units.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert second.n_units == 8


def test_channels_that_meet_the_input_stay() -> None:
    found = find_channel_groups(networks.AddedToInput(), [IMAGES])
    assert found.left_alone["back"] == "they meet values that belong to no channel of a layer"


def test_a_reshape_with_a_fixed_number_is_left_alone_with_what_it_said() -> None:
    found = find_channel_groups(networks.FixedReshape(), [IMAGES])
    assert found.groups == ()
    assert found.left_alone["conv"].startswith("without some of them the forward fails: shape '[-1, 16]' is invalid")


def test_an_operation_that_is_not_known_freezes_what_it_reads() -> None:
    class Sorted(networks.Concatenated):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.cat([self.left(x).sort(1).values, self.right(x)], 1))  # type: ignore[no-any-return]

    found = find_channel_groups(Sorted(), [IMAGES])
    assert [group.name for group in found.groups] == ["right"]
    assert found.left_alone["left"] == "`sort` reads them"


class TwoBranches(nn.Module):
    """A layer that is added to two branches side by side: its channels are in two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.short, self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
        self.last = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.short(x) + torch.cat([self.a(x), self.b(x)], 1))  # type: ignore[no-any-return]


def test_every_group_has_a_name_of_its_own() -> None:
    found = find_channel_groups(TwoBranches(), [IMAGES]).groups
    assert [(group.name, group.n_units) for group in found] == [("short", 8), ("b", 8)]


@dataclass
class Result:
    """An output that only its user knows."""

    logits: Tensor
    features: Tensor


def test_what_an_object_of_the_users_returns_stays() -> None:
    class ReturnsAll(networks.Concatenated):
        def forward(self, x: Tensor) -> Result:  # type: ignore[override]
            left = self.left(x)
            return Result(self.last(torch.cat([left, self.right(x)], 1)), left)

    found = find_channel_groups(ReturnsAll(), [IMAGES])
    assert [group.name for group in found.groups] == ["right"]
    assert found.left_alone["left"] == "the model returns them"


def test_channels_that_are_taken_by_their_place_stay() -> None:
    class Halved(networks.Concatenated):
        def forward(self, x: Tensor) -> Tensor:
            left = self.left(x)
            half = left.shape[1] // 2
            swapped = torch.cat([left[:, half:], left[:, :half]], 1)
            return self.last(torch.cat([swapped, self.right(x)], 1))  # type: ignore[no-any-return]

    found = find_channel_groups(Halved(), [IMAGES])
    assert [group.name for group in found.groups] == ["right"]
    assert found.left_alone["left"] == "`getitem` takes some of them by their place"


def test_an_uneven_cut_keeps_its_channels() -> None:
    class Uneven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.one, self.two = nn.Conv2d(3, 9, 1), nn.Conv2d(5, 2, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            first, second = self.conv(x).chunk(2, 1)
            return self.one(first) + self.two(second)  # type: ignore[no-any-return]

    found = find_channel_groups(Uneven(), [IMAGES])
    assert found.left_alone["conv"] == "`chunk` takes some of them by their place"


def test_what_reads_channels_in_training_alone_is_a_member_too() -> None:
    class WithAuxiliary(networks.Residual):
        def __init__(self) -> None:
            super().__init__()
            self.auxiliary = nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Any:
            first = self.first(x)
            result = self.last(torch.relu(self.bn(self.second(first)) + first))
            return (result, self.auxiliary(first)) if self.training else result

    (group,) = find_channel_groups(WithAuxiliary(), [IMAGES]).groups
    assert "auxiliary.in" in places_of(group)


def test_other_calls_go_other_ways() -> None:
    class TwoTasks(networks.Concatenated):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor, task: str = "first") -> Tensor:
            left = self.left(x)
            return self.other(left) if task == "second" else self.last(torch.cat([left, self.right(x)], 1))  # type: ignore[no-any-return]

    left, right = find_channel_groups(TwoTasks(), [IMAGES], other_calls=[((IMAGES,), {"task": "second"})]).groups
    assert places_of(left) == ["last.in", "left.out", "other.in"]
    assert places_of(right) == ["last.in", "right.out"]


def test_noise_and_single_precision_do_not_stand_in_the_way() -> None:
    class Noisy(networks.Concatenated):
        def forward(self, x: Tensor) -> Tensor:
            noise = torch.randn(len(x), 1, *x.shape[2:], dtype=torch.float32)
            return self.last(torch.cat([self.left(x), self.right(x)], 1).float() + noise)  # type: ignore[no-any-return]

    assert [group.name for group in find_channel_groups(Noisy(), [IMAGES]).groups] == ["left", "right"]


def test_an_input_without_a_batch_dimension_is_taken_whole() -> None:
    class Weighted(networks.Concatenated):
        def forward(self, x: Tensor, weights: Tensor) -> Tensor:  # type: ignore[override]
            left = self.left(x) * weights[:, None, None]
            return self.last(torch.cat([left, self.right(x)], 1))  # type: ignore[no-any-return]

    found = find_channel_groups(Weighted(), [IMAGES, torch.rand(4)])
    assert [group.name for group in found.groups] == ["right"]
    assert found.left_alone["left"] == "they meet values that belong to no channel of a layer"


def test_excluded_layers_keep_their_outputs() -> None:
    found = find_channel_groups(networks.Concatenated(), [IMAGES], exclude=["left"])
    assert [group.name for group in found.groups] == ["right"]
    assert found.left_alone["left"] == "`exclude` names it"


def test_a_layer_of_another_network_too_keeps_its_channels() -> None:
    class TwoNetworks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = networks.Concatenated()
            self.other = nn.Sequential(self.net.left, nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)  # type: ignore[no-any-return]

    found = find_channel_groups(TwoNetworks(), [IMAGES])
    assert [group.name for group in found.groups] == ["net.right"]
    assert found.left_alone["net.left"] == "`other` uses the layer too, which is another network"


def test_a_forward_that_fails_says_what_was_tried() -> None:
    message = "The forward of `Flattened` fails on the inputs in eval mode, so its channels cannot be followed"
    with pytest.raises(CompressionError, match=message):
        find_channel_groups(networks.Flattened(), [torch.rand(2, 3, 9, 9)])


def test_what_masks_a_channel_and_what_removes_it_give_the_same() -> None:
    network = networks.Gates().eval()
    found = find_channel_groups(network, [IMAGES])
    kept = [torch.arange(group.n_units) % 3 != 0 for group in found.groups]
    masked, small = copy.deepcopy(network), copy.deepcopy(network)
    for place in removed_places(masked, found.groups, kept):
        place.clear_(masked.get_parameter(place.parameter))
    narrow_(small, json.loads(json.dumps(record_of(network, found.groups, kept))))
    assert small.conv.weight.shape == (5, 3, 1, 1)
    assert small.squeeze.weight.shape == (2, 5)
    assert torch.allclose(masked(IMAGES), small(IMAGES), atol=1e-6)
    assert not torch.allclose(masked(IMAGES), network(IMAGES), atol=1e-3)


def test_the_model_and_its_modes_are_left_as_they_were() -> None:
    network = networks.Residual().train()
    network.bn.eval()
    before = copy.deepcopy(network.state_dict())
    find_channel_groups(network, [IMAGES])
    assert (network.training, network.bn.training) == (True, False)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_a_group_comes_back_from_a_checkpoint() -> None:
    for group in find_channel_groups(networks.Grouped(), [IMAGES]).groups:
        again = ChannelGroup.load(group.save())
        assert (again.name, again.n_units, places_of(again)) == (group.name, group.n_units, places_of(group))
        assert again.blocks is not None
        assert again.blocks.tolist() == group.save()["blocks"].tolist()


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet121", "googlenet", "resnext50_32x4d"])
def test_groups_are_those_of_torch_pruning(name: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    torch_pruning = pytest.importorskip("torch_pruning")
    options = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    network = torchvision.models.get_model(name, weights=None, **options).eval()
    image = torch.rand(1, 3, 64, 64)
    ours = {
        member.module: group
        for group in find_channel_groups(network, [image]).groups
        for member in group.members
        if member.side != "in"
    }
    graph = torch_pruning.DependencyGraph().build_dependency(network, image, verbose=False)
    names = {module: path for path, module in network.named_modules()}
    n_compared = 0
    for theirs in graph.get_all_groups(root_module_types=[nn.Conv2d]):
        touched = {
            names[item.dep.target.module]
            for item in theirs
            if isinstance(item.dep.target.module, nn.Conv2d | nn.Linear | nn.BatchNorm2d)
        }
        group = ours[names[theirs[0].dep.target.module]]
        assert {member.module for member in group.members} == touched
        n_compared += 1
    assert n_compared == len({id(group) for group in ours.values()})


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated", "ignore:The .grad attribute of a Tensor")
def test_what_a_scripted_module_reads_stays_and_the_rest_goes() -> None:
    class WithScript(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)
            self.script = torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))

        def forward(self, x: Tensor) -> Tensor:
            return self.third(self.second(self.script(self.first(x)).relu()))  # type: ignore[no-any-return]

    found = find_channel_groups(WithScript(), [torch.rand(2, 4)])
    assert [places_of(group) for group in found.groups] == [["second.out", "third.in"]]
    assert found.left_alone == {"first": "a scripted module reads them", "third": "the model returns them"}


class Shifted(nn.Module):
    """A bare parameter of one dimension beside the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 1), nn.Conv2d(8, 2, 1)
        self.shift = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) + self.shift.view(-1, 1, 1))  # type: ignore[no-any-return]


def test_a_parameter_of_one_dimension_goes_with_its_channels() -> None:
    (group,) = find_channel_groups(Shifted(), [torch.rand(2, 1, 3, 3)]).groups
    assert {(member.module, member.side) for member in group.members} == {
        ("first", "out"),
        ("shift", "dim0"),
        ("second", "in"),
    }
