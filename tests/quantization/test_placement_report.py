"""The placement report: what becomes of every operation, for a prepared model and for any other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_compress import placement_report
from lightning_compress.quantization.scheme import Scheme
from tests.small_networks import quantized


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.Tanh(), nn.Flatten(), nn.Linear(4, 2))


def test_a_plain_model_is_told_what_would_become_of_it_and_left_alone() -> None:
    model = small()
    assert placement_report(model).to_text().splitlines() == [
        "operation  kind     runs in  weights  grid of its result  step  note",
        "0          Conv2d   integer  8 bits   0                         -",
        "1          Tanh     float             1                         no integer form",
        "2          Flatten  integer           1                         -",
        "3          Linear   integer  8 bits   3                         -",
    ]
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_calibrated_model_shows_the_step_of_every_grid() -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    nn.init.ones_(model.get_submodule("0").weight)  # type: ignore[arg-type]
    quantized(model, [torch.tensor([[-1.0], [1.55]])])
    (row,) = placement_report(model)
    assert row.grid is not None
    assert row.grid.scale == pytest.approx(0.01)
    assert row.grid.zero_point == 100
    assert str(placement_report(model)).splitlines()[1].split() == [
        "0",
        "Linear",
        "integer",
        "8",
        "bits",
        "0",
        "0.01",
        "-",
    ]


def test_bits_and_exclusions_of_a_scheme_are_shown() -> None:
    scheme = Scheme(weight_bits=4, activation_bits=4, edge_bits=4, exclude=["3"], overrides={"0": {"weight_bits": 6}})
    report = placement_report(small(), scheme)
    assert [(row.name, row.weight_bits, row.reason) for row in report if row.operation in ("Conv2d", "Linear")] == [
        ("0", 6, ""),
        ("3", None, "excluded"),
    ]
    assert [row.name for row in report.floats()] == ["1", "2", "3"]


def test_a_module_without_a_graph_says_why() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) if x.sum() > 0 else x

    report = placement_report(nn.Sequential(Branching()))
    assert report.to_text().splitlines()[-1] == (
        "`0` has no graph: TraceError: symbolically traced variables cannot be used as inputs to control flow"
    )
    assert [(row.name, row.is_integer) for row in report] == [("0.layer", True), ("0", False)]


def test_an_override_that_matches_no_layer_names_the_layers() -> None:
    with pytest.raises(ValueError, match="overrides") as caught:
        placement_report(small(), Scheme(overrides={"head": {"weight_bits": 4}}))
    assert str(caught.value) == "`overrides` pattern 'head' matches no layer. The layers are: `0`, `3`."
