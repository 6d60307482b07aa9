"""The report: the same numbers in JSON and in the terminal."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from lightning_compress.report.archived import ArchivedNetwork, ArchivedTensor
from lightning_compress.report.latency import Latency, LatencyComparison
from lightning_compress.report.run_report import Metric, RunReport
from lightning_compress.report.size import FileSizes
from lightning_compress.report.statistics import LayerStatistics, ModelStatistics

ZEROS_SENTENCE = "Unstructured zeros do not speed up ONNX Runtime"

FULL = RunReport(
    model="ResNet20",
    versions={"torch": "2.14.0", "lightning": "2.6.6", "onnx": "1.23.2", "onnxruntime": "1.32.0"},
    cpu="Some CPU @ 2.00GHz",
    statistics=ModelStatistics(
        parameters=1_090_000,
        nonzeros=218_400,
        weight_parameters=1_000_000,
        weight_nonzeros=200_000,
        macs=40_800_000,
        layers=(
            LayerStatistics("conv1", "Conv2d", (16, 3, 3, 3), 432, 432, bits=8),
            LayerStatistics("layer1.conv", "Conv2d", (16, 16, 3, 3), 2304, 576, bits=8),
            LayerStatistics("fc", "Linear", (10, 64), 640, 640, bits=32),
        ),
    ),
    sizes=FileSizes(onnx_bytes=1_100_000, zipped_bytes=312_000, float_onnx_bytes=4_400_000),
    archive=ArchivedNetwork(
        "model.lcz",
        1_000,
        (ArchivedTensor("fc.weight", (10, 100), "sparse shared", 1_000, 90, 32.0, 9.5, 8.5, 7.75, 7.25, (-0.5, 0.5)),),
    ),
    latency=LatencyComparison(
        rows=(
            Latency("fp32", 1, median_ms=4.0, p10_ms=3.9, p90_ms=4.4, rounds=50),
            Latency("int8", 1, median_ms=2.0, p10_ms=1.95, p90_ms=2.2, rounds=50),
            Latency("fp32", 8, median_ms=32.1, p10_ms=31.0, p90_ms=35.0, rounds=42),
            Latency("int8", 8, median_ms=12.84, p10_ms=12.0, p90_ms=13.3, rounds=42),
        ),
        cpu="Some CPU @ 2.00GHz",
        vnni=True,
        threads=2,
        onnxruntime="1.32.0",
    ),
    metrics=(Metric("test accuracy", before=0.9106, after=0.912, onnxruntime=0.9119), Metric("F1", after=0.5)),
    parity={"batches compared": 4, "largest difference": 0.03125, "signal to noise": math.inf, "verdict": "same"},
    integer_ops={"QLinearConv": 20, "QLinearAdd": 9},
    float_ops={"fc": "its input is not quantized"},
    notes=("Weights of the best checkpoint.",),
)


def test_json_round_trip_gives_an_equal_report(tmp_path: Path) -> None:
    FULL.write_json(tmp_path / "new" / "report.json")
    assert RunReport.from_dict(json.loads((tmp_path / "new" / "report.json").read_text())) == FULL


def test_an_empty_report_makes_the_round_trip_too() -> None:
    empty = RunReport("Net")
    assert RunReport.from_dict(json.loads(json.dumps(empty.to_dict()))) == empty
    assert empty.to_text().splitlines()[1:] == ["Net: compression report", "=" * 80, empty.cpu]


def test_a_report_of_before_archives_were_told_is_read() -> None:
    plain = FULL.to_dict()
    del plain["archive"]
    assert RunReport.from_dict(plain) == dataclasses.replace(FULL, archive=None)


def test_numbers_that_json_lacks_survive_but_names_stay_names() -> None:
    report = RunReport("inf", metrics=(Metric("nan", before=-math.inf),), parity={"signal to noise": math.inf})
    assert RunReport.from_dict(json.loads(json.dumps(report.to_dict(), allow_nan=False))) == report


def test_json_has_sparsity_and_speedup_for_readers() -> None:
    plain = FULL.to_dict()
    assert plain["statistics"]["sparsity"] == 0.8
    assert [layer["sparsity"] for layer in plain["statistics"]["layers"]] == [0.0, 0.75, 0.0]
    assert [row["speedup"] for row in plain["latency"]["rows"]] == [1.0, 2.0, 1.0, 2.5]
    assert plain["parity"]["signal to noise"] == "inf"


def test_numpy_numbers_become_plain_ones() -> None:
    report = RunReport("Net", parity={"difference": np.float32(0.5), "steps": np.int64(1)})  # type: ignore[dict-item]
    plain = report.to_dict()["parity"]
    assert [(type(value), value) for value in plain.values()] == [(float, 0.5), (int, 1)]


def test_what_json_cannot_hold_is_refused_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("the old one")
    report = dataclasses.replace(FULL, parity={"difference": 1j})  # type: ignore[dict-item]
    with pytest.raises(
        TypeError, match=r"^A report holds numbers and text, got a complex\. Convert it to a float or a str\.$"
    ):
        report.write_json(path)
    assert path.read_text() == "the old one"


def test_writing_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("the old one")
    FULL.write_json(path)
    assert json.loads(path.read_text())["model"] == "ResNet20"
    assert list(tmp_path.iterdir()) == [path]


def test_a_path_that_cannot_be_replaced_leaves_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.mkdir()
    with pytest.raises(IsADirectoryError):
        FULL.write_json(path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "words",
    [
        "ResNet20: compression report",
        "parameters 1.09 M",
        "sparsity 80.0 %",
        "stored with 8 bits in 2 layers, 32 bits in 1 layer",
        "multiply-accumulates 40.8 M per sample",
        "fp32 ONNX 4.40 MB",
        "this ONNX 1.10 MB 4.0x smaller",
        "this ONNX, zipped 312 kB 14.1x smaller",
        "model.lcz 1.00 kB 4.0x smaller",
        "bits of a weight, dense 32.00",
        "bits of a weight, coded 7.75",
        "entropy 7.25",
        "batch 1, fp32 4.00 ms 3.90 - 4.40 ms",
        "batch 1, int8 2.00 ms 1.95 - 2.20 ms 2.00x faster",
        "batch 8, int8 12.8 ms 12.0 - 13.3 ms 2.50x faster",
        "Some CPU @ 2.00GHz with VNNI, 2 threads, 50 / 42 interleaved rounds",
        "test accuracy 0.9106 0.912 0.9119",
        "F1 - 0.5 -",
        "batches compared 4",
        "largest difference 0.03125",
        "signal to noise inf",
        "verdict same",
        "integer 20 QLinearConv, 9 QLinearAdd",
        "float fc: its input is not quantized",
        f"{ZEROS_SENTENCE}: it multiplies by them like by any other weight.",
        "The zeros here (80.0 % of the conv and linear weights) only make the zipped file smaller.",
        "Weights of the best checkpoint.",
        "torch 2.14.0, lightning 2.6.6, onnx 1.23.2, onnxruntime 1.32.0",
    ],
)
def test_text_tells(words: str) -> None:
    assert words in " ".join(FULL.to_text().split())


def test_text_is_ascii_in_eighty_columns() -> None:
    text = FULL.to_text()
    assert text.isascii()
    assert max(len(line) for line in text.splitlines()) == 80
    assert all(line == line.rstrip() for line in text.splitlines())


def test_the_sentence_about_zeros_is_told_only_where_there_are_zeros() -> None:
    assert FULL.statistics is not None
    dense = dataclasses.replace(FULL.statistics, weight_nonzeros=FULL.statistics.weight_parameters)
    assert ZEROS_SENTENCE in FULL.to_text()
    assert ZEROS_SENTENCE not in dataclasses.replace(FULL, statistics=dense).to_text()


def test_many_float_operators_of_one_reason_are_one_entry() -> None:
    float_ops = {f"layer{i}.conv": "the model was not quantized" for i in range(20)}
    text = RunReport("Net", integer_ops={}, float_ops=float_ops).to_text()
    words = " ".join(text.split())
    assert "integer none float layer0.conv, layer1.conv," in words
    assert "layer5.conv and 14 more: the model was not quantized" in words
    assert max(len(line) for line in text.splitlines()) == 80


def test_a_slower_and_larger_file_is_told_as_such() -> None:
    assert FULL.latency is not None
    rows = (FULL.latency.rows[1], FULL.latency.rows[0])
    report = RunReport(
        "Net", latency=dataclasses.replace(FULL.latency, rows=rows), sizes=FileSizes(200, float_onnx_bytes=100)
    )
    assert "2.00x slower" in report.to_text()
    assert "200 B       2.0x larger" in report.to_text()
