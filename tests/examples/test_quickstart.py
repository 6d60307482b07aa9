"""The demo as a newcomer runs it, small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Run the demo on scikit-learn's digits; return what it printed and the folder it wrote to."""
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "examples.quickstart", "--quick", "--data", "digits", "--out", str(folder)]
    # On one thread: two that wait for each other take minutes where other work keeps the processors busy.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, folder


def test_the_demo_leaves_a_model_a_report_and_a_picture(demo: tuple[str, Path]) -> None:
    _, folder = demo
    assert {"model.onnx", "report.json", "report.png"} <= {path.name for path in folder.iterdir()}
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")


def test_the_demos_file_is_an_int8_model(demo: tuple[str, Path]) -> None:
    _, folder = demo
    model = onnx.load(folder / "model.onnx")
    n_int8_kernels = sum(
        tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 4 for tensor in model.graph.initializer
    )
    assert n_int8_kernels == 9  # the stem, two in each of three blocks, two shortcuts


def test_the_demos_report_holds_the_sparsity_and_the_accuracy_at_all_three_places(demo: tuple[str, Path]) -> None:
    _, folder = demo
    report = json.loads((folder / "report.json").read_text())
    assert report["statistics"]["sparsity"] == pytest.approx(0.8, abs=1e-4)
    accuracy = report["metrics"][-1]
    assert accuracy["name"] == "test accuracy, %"
    assert accuracy["before"] > 80.0
    assert accuracy["after"] > 80.0
    assert accuracy["onnxruntime"] == pytest.approx(accuracy["after"], abs=1.0)


def test_the_demo_says_what_it_trained_on_and_what_came_out(demo: tuple[str, Path]) -> None:
    printed, _ = demo
    assert "scikit-learn's digits: 800 images an epoch, 360 for the final figure." in printed
    assert "Unstructured zeros do not speed up ONNX Runtime" in printed
    assert "student, distilled, 80 % zeros, int8, the file in ONNX Runtime: " in printed
