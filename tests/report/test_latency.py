"""Latency in ONNX Runtime: what is run, how often and how it is told; never how fast."""

import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from lightning_compress.errors import MissingExtraError
from lightning_compress.report.cpu import cpu_name, has_vnni
from lightning_compress.report.latency import Latency, LatencyComparison, compare_latency

FEEDS = {"x": np.ones((1, 4), np.float32)}


def _save(path: Path, inputs: str, body: str) -> Path:
    source = f'<ir_version: 8, opset_import: ["": 17]> g ({inputs}) => (float[?, ?] y) {{ {body} }}'
    onnx.save(onnx.parser.parse_model(source), path)
    return path


@pytest.fixture
def relu(tmp_path: Path) -> Path:
    return _save(tmp_path / "relu.onnx", "float[N, 4] x", "y = Relu(x)")


@pytest.fixture
def double(tmp_path: Path) -> Path:
    return _save(tmp_path / "double.onnx", "float[N, 4] x", "y = Add(x, x)")


def test_every_file_is_measured_at_every_batch_size(relu: Path, double: Path) -> None:
    times = compare_latency({"fp32": relu, "int8": double}, FEEDS, rounds=6, threads=1)
    asked = [(row.batch_size, row.file, row.rounds) for row in times.rows]
    assert asked == [(1, "fp32", 6), (1, "int8", 6), (8, "fp32", 6), (8, "int8", 6)]
    assert all(0 < row.p10_ms <= row.median_ms <= row.p90_ms for row in times.rows)


def test_the_machine_is_named(relu: Path) -> None:
    times = compare_latency({"fp32": relu}, FEEDS, rounds=5, threads=1)
    assert (times.cpu, times.vnni) == (cpu_name(), has_vnni())
    assert (times.threads, times.onnxruntime) == (1, onnxruntime.__version__)


def test_a_spent_budget_still_measures_five_rounds(relu: Path) -> None:
    times = compare_latency({"fp32": relu}, FEEDS, rounds=10_000, threads=1, budget_s=1e-9)
    assert [row.rounds for row in times.rows] == [5, 5]


def test_the_sample_is_repeated_along_dynamic_axes_only(tmp_path: Path) -> None:
    # With the table repeated too, (8, 4) + (24, 4) could not be added.
    path = _save(tmp_path / "table.onnx", "float[N, 4] x, float[1, 4] table", "y = Add(x, table)")
    feeds = {**FEEDS, "table": np.ones((1, 4), np.float32), "unused": np.ones((1,), np.float32)}
    assert len(compare_latency({"fp32": path}, feeds, rounds=5, threads=1).rows) == 2


def test_progress_is_told_round_by_round(relu: Path) -> None:
    lines: list[str] = []
    compare_latency({"fp32": relu}, FEEDS, batch_sizes=(1,), rounds=5, threads=1, progress=lines.append)
    assert lines == [f"latency at batch size 1: round {i} of 5" for i in (1, 2, 3, 4, 5)]


def test_speedup_is_the_ratio_of_the_medians() -> None:
    rows = tuple(
        Latency(file, batch_size, median_ms=median, p10_ms=0.1, p90_ms=90.0, rounds=5)
        for file, batch_size, median in (("fp32", 1, 4.0), ("int8", 1, 1.0), ("fp32", 8, 9.0), ("int8", 8, 18.0))
    )
    times = LatencyComparison(rows, "a CPU", vnni=True, threads=2, onnxruntime="1.20.0")
    speedups = [times.speedup(file, batch_size) for file, batch_size in (("fp32", 1), ("int8", 1), ("int8", 8))]
    assert speedups == [1.0, 4.0, 0.5]


def test_a_fixed_batch_axis_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = _save(tmp_path / "fixed.onnx", "float[1, 4] x", "y = Relu(x)")
    with pytest.raises(ValueError, match=r"cannot run") as caught:
        compare_latency({"fp32": path}, FEEDS)
    assert str(caught.value) == (
        "File `fp32` cannot run at batch size 8: no input has a dynamic first axis. "
        "Export it with a dynamic batch axis, or pass `batch_sizes=(1,)`."
    )
    assert len(compare_latency({"fp32": path}, FEEDS, batch_sizes=(1,), rounds=5).rows) == 1


def test_a_missing_feed_is_named(relu: Path) -> None:
    with pytest.raises(ValueError, match=r"^File `fp32` has an input `x`, but the feeds are: image\.$"):
        compare_latency({"fp32": relu}, {"image": FEEDS["x"]})


def test_a_feed_of_several_samples_is_refused(relu: Path) -> None:
    with pytest.raises(ValueError, match=r"^Feed `x` must be a batch of one sample, got shape \(2, 4\)\.$"):
        compare_latency({"fp32": relu}, {"x": np.ones((2, 4), np.float32)})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_sizes": ()}, r"^`batch_sizes` must be one or more numbers of at least 1, got \(\)\.$"),
        ({"batch_sizes": (1, 0)}, r"^`batch_sizes` must be one or more numbers of at least 1, got \(1, 0\)\.$"),
        ({"rounds": 4}, r"^`rounds` must be at least 5, got 4\.$"),
        ({"threads": 0}, r"^`threads` must be at least 1, got 0\.$"),
        ({"budget_s": 0.0}, r"^`budget_s` must be above 0 seconds, got 0\.0\.$"),
    ],
)
def test_numbers_out_of_range_are_refused(relu: Path, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare_latency({"fp32": relu}, FEEDS, **arguments)  # type: ignore[arg-type]


def test_no_file_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^`files` must name at least one ONNX file, got none\.$"):
        compare_latency({}, FEEDS)


def test_a_missing_onnxruntime_is_one_sentence_with_the_install_line(
    relu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"not installed") as caught:
        compare_latency({"fp32": relu}, FEEDS)
    assert str(caught.value) == (
        "Measuring latency needs ONNX Runtime, which is not installed. Install it with `pip install onnxruntime`."
    )


def test_the_processor_has_a_name_on_every_machine() -> None:
    assert cpu_name()
    assert cpu_name("")
