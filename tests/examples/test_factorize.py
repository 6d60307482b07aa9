"""The example of small layers as a newcomer runs it, on few images."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from pathlib import Path

import onnx
import pytest

from examples import factorize
from tests.compatibility.runs import LIGHTNING_NOISE

pytestmark = [pytest.mark.filterwarnings(*LIGHTNING_NOISE)]


def test_the_example_leaves_a_file_of_small_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    factorize.main(["--quick", "--data", "digits", "--method", "spatial", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    rows = re.findall(r"  (.*): (\S+) % with (\S+) multiply-accumulates and (\S+) parameters", printed)
    assert [name for name, *_ in rows] == ["dense", "small module", "file in ONNX Runtime"]
    accuracies = [float(row[1]) for row in rows]
    macs = [int(row[2].replace(",", "")) for row in rows]
    assert min(accuracies) > 80.0
    assert macs[1] / macs[0] == pytest.approx(0.216, abs=1e-3)
    assert "The small module and the file agree on 100.0 % of the images." in printed
    weights = onnx.load(tmp_path / "model.onnx").graph.initializer
    assert (16, 64, 3, 1) in [tuple(weight.dims) for weight in weights]
    assert "network.blocks.2.conv2" in json.loads((tmp_path / "record.json").read_text())


def test_every_method_is_a_callback() -> None:
    options = Namespace(rank=0.25, size=4)
    made = [type(make(options)).__name__ for make in factorize.METHODS.values()]
    assert made == ["Factorize", "Factorize", "FilterSharing", "FilterSharing"]
