"""What ONNX Runtime's own optimized graph says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.export import export_onnx
from lightning_compress.export.audit import AuditReport, AuditRow, audit
from tests.small_networks import NETWORKS, Residual, images, plain, quantized, warmed

COUNTS = {
    "plain": {"conv": (1, 1), "gemm": (1, 1)},
    "separable": {"conv": (3, 3), "pool": (1, 1), "gemm": (1, 1)},
    "one_dimensional": {"conv": (2, 2), "gemm": (1, 1)},
    "residual": {"conv": (3, 3), "add": (2, 2), "pool": (1, 1), "gemm": (1, 1)},
    # A batch norm on its own is a convolution, a mean over rows and columns a pooling.
    "pre_activation": {"conv": (3, 3), "add": (1, 1), "pool": (1, 1), "gemm": (1, 1)},
    "concatenated": {"conv": (3, 3), "concat": (1, 1), "pool": (1, 1)},
    "shuffled": {"conv": (2, 2), "concat": (1, 1), "gemm": (1, 1)},
}


@pytest.mark.parametrize("name", COUNTS)
def test_everything_runs_in_integers(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = warmed(NETWORKS[name]())
    quantized(model)
    assert export_onnx(model, images(), tmp_path / "model.onnx").audit.counts() == COUNTS[name]


def test_a_plain_model_runs_in_float_and_says_why(tmp_path: Path) -> None:
    torch.manual_seed(0)
    report = export_onnx(warmed(plain()), images(), tmp_path / "model.onnx").audit
    assert report.counts() == {"conv": (0, 1), "gemm": (0, 1)}
    assert all(row.reason for row in report.floats())


def test_an_excluded_layer_is_named_with_a_reason(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = warmed(Residual())
    quantized(model, exclude=["conv3"])
    report = export_onnx(model, images(), tmp_path / "model.onnx").audit
    assert report.counts()["conv"] == (2, 3)
    (row,) = report.floats()
    assert row.name.startswith("conv3/Conv")
    assert (row.kind, row.reason) == ("conv", "its weight is in float")


def test_multiply_accumulates_are_those_of_the_run(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 7, 3), nn.Flatten(), nn.Linear(112, 4))
    quantized(model, exclude=["2"])
    report = export_onnx(model, images(2), tmp_path / "model.onnx").audit
    # Two images: 5 x 6 x 6 sums of 27 products, 7 x 4 x 4 of 45, 4 of 112.
    assert [(row.is_integer, row.macs) for row in report.rows] == [(True, 9720), (False, 10080), (True, 896)]
    assert report.integer_mac_share == 10616 / 20696
    assert "; 51.3 % of the multiply-accumulates" in report.to_text()


def test_without_inputs_nothing_is_counted(tmp_path: Path) -> None:
    path = export_onnx(nn.Linear(4, 2), torch.rand(2, 4), tmp_path / "model.onnx").path
    report = audit(path)
    assert (report.rows[0].macs, report.integer_mac_share) == (0, None)


class TransposedBetween(nn.Module):
    """A transposed convolution, which has no integer form here, between two that have."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.last = nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.up(self.first(x)))


def test_weights_that_no_training_rounded_are_not_rounded_by_the_runtime(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TransposedBetween()
    # One channel a hundred times the others: a single scale for all of them would lose the others.
    model.up.weight.data[:, 0] *= 100.0
    quantized(model)
    result = export_onnx(model, images(), tmp_path / "model.onnx")
    assert result.audit.counts() == {"conv": (2, 3)}
    assert result.parity.snr_db > 40.0


def test_a_product_with_a_sigmoid_says_what_it_reads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = warmed(NETWORKS["squeeze_excite"]())
    quantized(model)
    report = export_onnx(model, images(), tmp_path / "model.onnx").audit
    assert [row.reason for row in report.floats()] == ["it reads the result of Sigmoid `Sigmoid` in float"]


def test_the_text_counts_and_explains() -> None:
    report = AuditReport((AuditRow("a", "conv", True), AuditRow("b", "conv", False, "its weight is in float")))
    assert report.to_text() == "in integers on ONNX Runtime: 1 of 2 conv\nin float: conv `b`: its weight is in float"
    assert AuditReport(()).to_text() == "in integers on ONNX Runtime: nothing"


def warmed_by_images(model: nn.Module, data: list[Tensor]) -> nn.Module:
    """Let the batch norms of ``model`` learn the statistics of ``data``."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    model.train()
    with torch.no_grad():
        for batch in data:
            model(batch)
    return model


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("resnet18", {"conv": (20, 20), "add": (8, 8), "pool": (1, 1), "gemm": (1, 1)}),
        ("mobilenet_v2", {"conv": (52, 52), "add": (10, 10), "pool": (1, 1), "gemm": (1, 1)}),
    ],
)
def test_torchvision_networks_run_in_integers_from_end_to_end(
    name: str, counts: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    torch.manual_seed(0)
    data = [torch.rand(8, 3, 64, 64) for _ in range(2)]
    model = warmed_by_images(getattr(models, name)(num_classes=10), data)
    quantized(model, data)
    result = export_onnx(model, data[0], tmp_path / "model.onnx")
    assert result.audit.counts() == counts
    assert result.has_dynamic_batch
