"""How outputs are compared, and where a file begins to differ."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from lightning_compress.errors import ExportError, ParityError
from lightning_compress.export import export_onnx
from lightning_compress.export import onnx as onnx_module
from lightning_compress.export.onnx import WrittenFile, write_onnx
from lightning_compress.export.parity import compare_outputs, first_difference
from lightning_compress.quantization import quantization_of
from tests.small_networks import Residual, images, quantized, warmed


def test_numbers_are_gathered_over_batches_and_outputs() -> None:
    expected = [[torch.tensor([[3.0, 0.0]]), torch.tensor([2.0])], [torch.tensor([[0.0, 4.0]]), torch.tensor([1.0])]]
    found = [[torch.tensor([[3.0, 0.0]]), torch.tensor([2.0])], [torch.tensor([[2.0, 1.0]]), torch.tensor([1.0])]]
    report = compare_outputs(expected, found, step=0.5)
    assert (report.samples, report.max_abs_diff, report.max_diff_steps) == (2, 3.0, 6.0)
    assert (report.top1_agreement, report.distinct_top1) == (0.5, 2)
    # 9 + 4 + 16 + 1 against 4 + 9.
    assert report.snr_db == pytest.approx(10 * math.log10(30 / 13))


def test_equal_outputs_have_no_noise() -> None:
    values = [[torch.tensor([[1.0, -math.inf]])]]
    report = compare_outputs(values, values)
    assert (report.max_abs_diff, report.snr_db, report.max_diff_steps) == (0.0, math.inf, None)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_a_number_is_a_difference(value: float) -> None:
    right, wrong = [[torch.tensor([[1.0, 2.0]])]], [[torch.tensor([[1.0, value]])]]
    assert compare_outputs(right, wrong).snr_db == -math.inf
    assert compare_outputs(wrong, right).snr_db == -math.inf
    assert compare_outputs(right, wrong).max_abs_diff == math.inf


def test_an_output_without_classes_has_no_agreement() -> None:
    report = compare_outputs([[torch.ones(3)]], [[torch.ones(3)]])
    assert (report.samples, report.top1_agreement, report.distinct_top1) == (3, None, 0)
    assert report.to_text() == "3 samples: largest difference 0, no difference at all"


def test_a_dense_prediction_agrees_where_every_position_does() -> None:
    expected = torch.zeros(2, 3, 4, 4)
    expected[:, 1] = 1.0
    found = expected.clone()
    found[1, 2, 0, 0] = 2.0
    assert compare_outputs([[expected]], [[found]]).top1_agreement == 0.5


def exported(folder: Path) -> tuple[Residual, WrittenFile]:
    torch.manual_seed(0)
    model = warmed(Residual())
    quantized(model)
    assert isinstance(model, Residual)
    return model, write_onnx(model, images(), folder / "model.onnx")


def damage(path: Path, value: str, factor: float) -> None:
    """Multiply the scale of the pair that gives ``value``."""
    model = onnx.load(path)
    node = next(node for node in model.graph.node if f"{value}.dequantized" in node.output)
    constants = {item.output[0]: item for item in model.graph.node if item.op_type == "Constant"}
    initializers = {item.name: item for item in model.graph.initializer}
    name = node.input[1]
    tensor = constants[name].attribute[0].t if name in constants else initializers[name]
    changed = numpy_helper.from_array(numpy_helper.to_array(tensor) * factor, "changed")
    model.graph.initializer.append(changed)
    node.input[1] = "changed"
    onnx.save(model, path)


@pytest.mark.parametrize("place", ["relu", "bn2", "relu_1", "conv3"])
def test_the_first_place_that_differs_is_found(place: str, tmp_path: Path) -> None:
    model, written = exported(tmp_path)
    damage(written.path, place, 3.0)
    quantization = quantized_recording(model)
    found = first_difference(written.path, [images()], quantization, min_snr_db=20.0)
    assert found == place


def quantized_recording(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    quantization = quantization_of(model)
    assert quantization is not None
    recorded: list[tuple[str, torch.Tensor]] = []
    quantization.recorded = recorded
    with torch.no_grad():
        model.eval()(images())
    quantization.recorded = None
    return recorded


class Twice(nn.Module):
    """Calls the same layers twice, so that one place is met at two times."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())
        self.last = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.shared(self.shared(x)))


def test_a_place_that_is_met_twice_is_compared_time_by_time(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Twice()
    quantized(model)
    written = write_onnx(model, images(), tmp_path / "model.onnx")
    recorded = quantized_recording(model)
    assert [name for name, _ in recorded].count("shared.1") == 2
    assert first_difference(written.path, [images()], recorded, min_snr_db=20.0) is None
    damage(written.path, "shared.1#2", 3.0)
    assert first_difference(written.path, [images()], recorded, min_snr_db=20.0) == "shared.1"


def test_no_place_differs_in_a_good_file(tmp_path: Path) -> None:
    model, written = exported(tmp_path)
    assert first_difference(written.path, [images()], quantized_recording(model), min_snr_db=20.0) is None


def test_a_damaged_file_is_an_error_that_names_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_and_damage(*args: object) -> WrittenFile:
        written = write_onnx(*args)  # type: ignore[arg-type]
        damage(written.path, "relu_1", -1.0)
        return written

    torch.manual_seed(0)
    model = warmed(Residual())
    quantized(model)
    monkeypatch.setattr(onnx_module, "write_onnx", write_and_damage)
    path, kept = tmp_path / "model.onnx", tmp_path / "model.failed" / "model.onnx"
    path.write_bytes(b"the last good file")
    with pytest.raises(ParityError) as caught:
        export_onnx(model, images(), path)
    head, _, tail = str(caught.value).partition(": 8 samples: ")
    assert head == "The file does not compute what the trained model computes"
    assert tail.endswith(
        f" dB were expected. The first layer that differs is `relu_1`. It is kept for inspection as `{kept}`."
    )
    assert path.read_bytes() == b"the last good file"
    onnx.checker.check_model(kept)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["model.failed", "model.onnx"]


def test_a_file_that_the_runtime_cannot_open_is_an_error_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_and_break(*args: object) -> WrittenFile:
        written = write_onnx(*args)  # type: ignore[arg-type]
        model = onnx.load(written.path)
        model.graph.node[0].domain = "nowhere"
        onnx.save(model, written.path)
        return written

    monkeypatch.setattr(onnx_module, "write_onnx", write_and_break)
    path = tmp_path / "model.onnx"
    with pytest.raises(ExportError) as caught:
        export_onnx(nn.Linear(2, 2), torch.rand(2, 2), path)
    kept = tmp_path / "model.failed" / "model.onnx"
    assert str(caught.value).startswith("ONNX Runtime cannot open the file: ")
    assert str(caught.value).endswith(f" It is kept for inspection as `{kept}`.")
    assert kept.exists()
    assert not path.exists()


class Undefined(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return torch.log(x - 2.0)


def test_a_network_that_returns_nan_is_not_exported(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"the last good file")
    with pytest.raises(ExportError) as caught:
        export_onnx(Undefined(), torch.rand(2, 2), path)
    assert str(caught.value) == (
        "`Undefined` returns NaN for the inputs that the file is proved on, so nothing can be compared. Look for what "
        f"makes it. The file is kept for inspection as `{tmp_path / 'model.failed' / 'model.onnx'}`."
    )
    assert path.read_bytes() == b"the last good file"
