"""Where quantizers are placed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.graph import trace_program
from lightning_compress.quantization.placement import Placement, place
from lightning_compress.quantization.scheme import Scheme
from tests.small_networks import Concatenated, PreActivation, Residual, Shuffled


def placed(model: nn.Module, **settings: Any) -> Placement:
    return place(trace_program(model), Scheme(**settings))


def folds(model: nn.Module, **settings: Any) -> dict[str, nn.Module]:
    weights = placed(model, **settings).weights.values()
    return {weight.name: weight.norm for weight in weights if weight.norm is not None}


class Made(nn.Module):
    """A forward given as a function, over a convolution, a linear layer and what else is passed."""

    def __init__(self, run: Any, **children: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(4, 4)
        self.run = run
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def quantizers(run: Any, **children: nn.Module) -> list[str]:
    return list(placed(Made(run, **children)).bits)


def test_convolution_norm_and_relu_share_one_quantizer() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
    placement = placed(net)
    assert list(placement.bits) == ["input_1", "2", "3"]
    assert folds(net) == {"0": net[1]}


def test_one_relu_at_several_call_sites_has_a_quantizer_at_each() -> None:
    assert list(placed(Residual()).bits) == [
        "x",
        "relu",
        "bn2",  # the second operand of the add
        "relu_1",
        "conv3",
        "relu_2",
        "adaptive_avg_pool2d",
        "fc",
    ]


def test_a_sum_and_both_its_operands_are_quantized() -> None:
    assert list(placed(PreActivation()).bits) == ["x", "stem", "relu", "conv", "relu_1", "mean", "fc"]


def test_concatenated_values_share_one_grid() -> None:
    placement = placed(Concatenated())
    places = {str(node): spot.quantizer for node, spot in placement.nodes.items()}
    assert places["relu"] == places["right"] == places["cat"]
    assert sorted(placement.bits) == sorted({"x", places["cat"], "after", "mean"})


@pytest.mark.parametrize(
    "move",
    [
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Identity(),
        nn.Dropout(),
        nn.PixelShuffle(2),
        lambda x: F.max_pool2d(x, 2),
        lambda x: x.flatten(1),
        lambda x: x.permute(0, 2, 3, 1).contiguous(),
        lambda x: x.view(x.shape[0], -1),
        lambda x: x.chunk(2, 1)[0],
        lambda x: F.dropout(x, 0.5),
    ],
)
def test_what_only_moves_values_has_no_quantizer(move: Any) -> None:
    children = {"move": move} if isinstance(move, nn.Module) else {}
    assert quantizers(lambda self, x: self.fc(move(self.conv(x))), **children) == ["x", "conv", "fc"]


def test_a_channel_shuffle_needs_no_quantizer() -> None:
    assert list(placed(Shuffled()).bits) == ["conv.input_1", "conv.2", "grouped", "fc"]


def test_arithmetic_on_shapes_has_no_quantizer() -> None:
    def run(self: Made, x: Tensor) -> Any:
        half = x.shape[1] * x.size(2) // 2
        return self.fc(self.conv(x).reshape(x.size(0) * half + 0, 4))

    assert quantizers(run) == ["x", "conv", "fc"]


def test_a_multiple_by_a_plain_number_is_rounded_where_it_is_read() -> None:
    assert quantizers(lambda self, x: self.fc(self.conv(x) * 0.5)) == ["x", "conv", "mul", "fc"]


def test_a_relu_that_nothing_integer_reads_stays() -> None:
    assert quantizers(lambda self, x: F.relu(torch.tanh(self.conv(x)))) == ["x", "conv"]


def test_a_relu_behind_a_float_operation_is_taken_over() -> None:
    placement = placed(Made(lambda self, x: self.fc(F.relu(torch.tanh(self.conv(x))))))
    clamps = {spot.quantizer: spot.clamp for spot in placement.nodes.values()}
    assert clamps == {
        "x": (-torch.inf, torch.inf),
        "conv": (-torch.inf, torch.inf),
        "relu": (0.0, torch.inf),
        "fc": (
            -torch.inf,
            torch.inf,
        ),
    }


def test_a_value_that_a_relu_and_others_read_has_a_quantizer_of_its_own() -> None:
    assert quantizers(lambda self, x: self.fc(F.relu(y := self.conv(x))) + y) == ["x", "conv", "relu", "fc", "add"]


def test_an_entry_of_what_a_float_module_returns_has_a_quantizer_of_its_own() -> None:
    names = quantizers(lambda self, x: self.fc(self.lstm(x)[0]), lstm=nn.LSTM(4, 4, batch_first=True))
    assert names == ["getitem", "fc"]


def test_a_mask_of_minus_infinity_before_a_softmax_stays_in_float() -> None:
    def run(self: Any, x: Tensor) -> Any:
        scores = torch.matmul(x, x) + self.mask.weight
        return self.fc(torch.matmul(scores.softmax(-1), x))

    assert quantizers(run, mask=nn.Linear(4, 4)) == ["x", "softmax", "matmul_1", "fc"]


def test_inputs_and_results_keep_eight_bits() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Linear(4, 4), nn.Flatten())
    assert placed(net, activation_bits=4, edge_bits=2).bits == {"input_1": 8, "1": 4, "3": 4, "4": 8}


def test_what_only_additions_and_poolings_read_keeps_eight_bits() -> None:
    bits = placed(Residual(), activation_bits=4, edge_bits=2).bits
    assert bits == {
        "x": 8,
        "relu": 4,
        "bn2": 8,  # read by the add alone
        "relu_1": 4,
        "conv3": 8,  # likewise
        "relu_2": 8,  # read by the pooling
        "adaptive_avg_pool2d": 4,
        "fc": 8,
    }


def test_values_that_are_joined_get_the_bits_of_what_reads_them_together() -> None:
    placement = placed(Concatenated(), activation_bits=4, edge_bits=2)
    joined = {spot.quantizer for node, spot in placement.nodes.items() if str(node) == "cat"}
    assert {name: bits for name, bits in placement.bits.items() if bits == 4} == dict.fromkeys(joined, 4)


def test_operands_of_matrix_products_get_the_bits_of_activations() -> None:
    def run(net: Made, x: Tensor) -> Tensor:
        return F.softmax(torch.matmul(net.fc(x), x.transpose(1, 2)), -1)

    assert placed(Made(run), activation_bits=4, edge_bits=2).bits["fc"] == 4


def test_an_excluded_layer_stays_in_float_and_says_so() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    placement = placed(net, exclude=["2"])
    assert set(placement.weights) == {id(net[0]), id(net[4])}
    assert list(placement.bits) == ["input_1", "1", "3", "4"]
    assert [(row.name, row.is_integer, row.reason) for row in placement.rows] == [
        ("0", True, ""),
        ("1", True, ""),
        ("2", False, "excluded"),
        ("3", True, ""),
        ("4", True, ""),
    ]


def test_a_layer_that_untraced_code_calls_is_rounded_on_both_sides() -> None:
    class Star(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, *values: Tensor) -> Any:
            return self.fc(values[0])

    model = Star()
    placement = placed(model)
    assert placement.layer_inputs[id(model.fc)].quantizer == "fc.input"
    assert placement.layer_outputs[id(model.fc)].quantizer == "fc"
    assert placement.weights[id(model.fc)].grid == "fc.input"


def test_a_norm_folds_only_behind_a_layer_of_its_own() -> None:
    shared = nn.Sequential(nn.Conv2d(3, 3, 1), norm := nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), norm)
    lonely = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
    untracked = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False))
    excluded = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
    read_twice = Made(lambda self, x: self.norm(y := self.conv(x)) + y, norm=nn.BatchNorm2d(4))
    assert folds(shared) == {}
    assert folds(lonely) == {}
    assert folds(untracked) == {}
    assert folds(excluded, exclude=["0"]) == {}
    assert folds(read_twice) == {}


def test_a_shared_layer_has_no_single_input_grid() -> None:
    shared = nn.Sequential(layer := nn.Linear(2, 2), nn.ReLU(), layer)
    assert [weight.grid for weight in placed(shared).weights.values()] == [None]


def test_values_that_leave_the_graph_are_marked() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.Flatten())
    assert {spot.quantizer: spot.escapes for spot in placed(net).nodes.values()} == {
        "input_1": False,
        "1": False,
        "2": True,
    }
