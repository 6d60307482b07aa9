"""Networks with NaN in them are not exported; the file that lies there stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_compress.errors import CompressionError
from lightning_compress.export import export_onnx


@pytest.mark.parametrize("name", ["0.weight", "0.bias", "1.running_var", "1.weight"])
def test_a_network_with_nan_in_it_is_not_exported(name: str, tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    network.state_dict()[name][1] = torch.nan
    (tmp_path / "model.onnx").write_bytes(b"the last good file")
    with pytest.raises(CompressionError, match=rf"`{name if name != '0.weight' else '0'}` (is|are) NaN"):
        export_onnx(network, torch.rand(2, 4), tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").read_bytes() == b"the last good file"


def test_an_infinite_parameter_may_be_a_mask(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)
            self.mask = nn.Parameter(torch.tensor([0.0, -torch.inf, 0.0]), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            masked: torch.Tensor = self.fc(x) + self.mask
            return masked.softmax(1)

    result = export_onnx(Masked(), torch.rand(2, 4), tmp_path / "model.onnx")
    assert result.parity.max_abs_diff < 1e-5
