"""Which layer gets which bits, and how scales are found."""

from __future__ import annotations

import re
from typing import Any

import pytest
from torch import nn

from lightning_compress.quantization import prepare
from lightning_compress.quantization.scheme import LayerSettings, Scheme

NAMES = ["stem", "body.0", "body.1", "head"]


def test_first_and_last_layers_keep_eight_bits() -> None:
    settings = Scheme(weight_bits=4, activation_bits=3).settings(NAMES, edges={"stem", "head"})
    assert settings["stem"] == settings["head"] == LayerSettings(8, 8)
    assert settings["body.0"] == LayerSettings(4, 3)


def test_the_rule_for_first_and_last_layers_can_be_lowered() -> None:
    settings = Scheme(weight_bits=4, activation_bits=4, edge_bits=2).settings(NAMES, edges={"stem"})
    assert settings["stem"] == LayerSettings(4, 4)


def test_the_last_pattern_that_matches_wins_also_at_the_edge() -> None:
    overrides = {
        "*": {"weight_bits": 6},
        "body": {"weight_bits": 2, "activation_bits": 5},
        "body.1": {"weight_bits": 3},
    }
    settings = Scheme(overrides=overrides).settings(NAMES, edges={"stem"})
    assert settings == {
        "stem": LayerSettings(6, 8),
        "body.0": LayerSettings(2, 5),
        "body.1": LayerSettings(3, 5),
        "head": LayerSettings(6, 8),
    }


@pytest.mark.parametrize(("bits", "used"), [(8, 7), (7, 7), (4, 4)])
def test_a_reduced_range_takes_one_bit_of_eight(bits: int, used: int) -> None:
    settings = Scheme(weight_bits=bits, reduce_range=True).settings(NAMES, edges=())
    assert settings["body.0"] == LayerSettings(used, 8)


def test_weights_of_a_reduced_range_stay_within_63() -> None:
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    quantization = prepare(net, reduce_range=True)
    integers, _ = quantization.weights["0"].integers(net.get_parameter("0.weight"))
    assert integers.abs().max() == 63


@pytest.mark.parametrize(
    ("ranges", "bits", "method"),
    [(None, 8, "minmax"), (None, 4, "learned"), ("percentile", 8, "percentile"), ("minmax", 2, "minmax")],
)
def test_low_bits_are_learned_where_nothing_else_is_said(ranges: Any, bits: int, method: str) -> None:
    assert Scheme(ranges=ranges).method(bits) == method


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"ranges": "lsq"},
            ValueError,
            '`ranges` must be one of "minmax", "percentile", "mse", "learned", or None, got \'lsq\'.',
        ),
        ({"weight_bits": 0}, ValueError, "`weight_bits` must be from 1 to 8, got 0."),
        ({"activation_bits": 16}, ValueError, "`activation_bits` must be from 1 to 8, got 16."),
        ({"edge_bits": True}, TypeError, "`edge_bits` must be an int from 1 to 8, got True."),
        (
            {"overrides": {"head": {"bits": 4}}},
            ValueError,
            "`overrides` for 'head' has the setting 'bits'; a layer has `weight_bits` and `activation_bits`.",
        ),
        (
            {"overrides": {"head": {"weight_bits": 0}}},
            ValueError,
            "`overrides['head']['weight_bits']` must be from 1 to 8, got 0.",
        ),
    ],
)
def test_a_setting_that_is_none_is_refused(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        Scheme(**arguments)


def test_an_override_that_matches_no_layer_names_the_layers() -> None:
    message = "`overrides` pattern 'tail' matches no layer. The layers are: `stem`, `body.0`, `body.1`, `head`."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Scheme(overrides={"tail": {"weight_bits": 4}}).settings(NAMES, edges=())
