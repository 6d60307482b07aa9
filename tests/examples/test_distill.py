"""The grid of distillation experiments, from its arguments to its table and picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples import distill
from tests.compatibility.runs import LIGHTNING_NOISE

pytestmark = [pytest.mark.filterwarnings(message) for message in LIGHTNING_NOISE]


def test_a_grid_is_trained_logged_and_told_and_goes_on_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--quick", "--out", str(tmp_path), "--losses"]
    distill.main([*arguments, "logits", "contrast", "--seeds", "0"])
    first = json.loads((tmp_path / "results.json").read_text())
    distill.main([*arguments, "hints", "--seeds", "0", "1"])
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(first) == 3
    assert len(results) == len(first) + 3
    assert {key: results[key] for key in first} == first
    assert all(20.0 < accuracy <= 100.0 for accuracy in results.values())
    printed = capsys.readouterr().out
    assert printed.count("teacher: epoch") == 3
    assert "| hints | " in printed
    assert (tmp_path / "distillation.png").stat().st_size > 10_000
    logged = (tmp_path / "hints, 500 images" / "seed_1" / "metrics.csv").read_text()
    assert "compress/distillation_loss" in logged
