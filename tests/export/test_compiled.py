"""A network that `torch.compile` has wrapped is exported as it was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from lightning_compress import export_onnx
from tests.small_networks import NETWORKS, images, quantized, warmed


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize("is_quantized", [False, True])
def test_an_export_compiles_nothing(is_quantized: bool, tmp_path: Path) -> None:
    network = warmed(NETWORKS["residual"]())
    if is_quantized:
        quantized(network)
    compiled: Any = torch.compile(network, backend="eager")
    model = nn.Sequential(compiled)
    counters.clear()
    result = export_onnx(model, images(), tmp_path / "model.onnx")
    assert result.parity.max_abs_diff < 1e-3
    assert not counters["frames"]
    model.eval()(images())
    assert counters["frames"]["ok"] == 1
