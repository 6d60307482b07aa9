"""Weights that share values are stored as a table and indices, and are the very weights in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from torch import nn

from lightning_compress.clustering import kmeans
from lightning_compress.export import export_onnx
from lightning_compress.export.onnx import write_onnx
from lightning_compress.export.session import open_session, run_session
from lightning_compress.export.sharing import share_values_, sharing_note
from tests.small_networks import quantized


def network(n_values: int) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(16 * 16, 20))
    with torch.no_grad():
        for layer in net:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                found = kmeans(layer.weight, n_values)
                layer.weight.copy_(found.centroids.float()[found.codes])
    return net.eval()


@pytest.mark.parametrize(("n_values", "stored", "bits"), [(16, TensorProto.UINT4, 4), (17, TensorProto.UINT8, 8)])
def test_indices_take_the_smallest_type_and_give_the_very_weights(
    n_values: int, stored: int, bits: int, tmp_path: Path
) -> None:
    net, x = network(n_values), torch.randn(4, 3, 8, 8)
    result = export_onnx(net, x, tmp_path / "model.onnx")
    write_onnx(net, x, tmp_path / "dense.onnx", shares_values=False)
    assert result.shared == {bits: 2}  # the first convolution has 432 weights
    assert sharing_note(result.shared) in result.to_text()
    model = onnx.load(result.path)
    onnx.checker.check_model(model, full_check=True)
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert [kind for name, kind in kinds.items() if name.endswith(".indices")] == [stored, stored]
    n_weights = 16 * 16 * 9 + 20 * 256
    saved = (tmp_path / "dense.onnx").stat().st_size - result.path.stat().st_size
    assert saved == pytest.approx(n_weights * (32 - bits) / 8 - 2 * n_values * 4, abs=1000)
    found = [run_session(open_session(path), [x])[0] for path in (result.path, tmp_path / "dense.onnx")]
    assert torch.equal(found[0], found[1])


def test_the_runtime_looks_them_up_when_it_loads(tmp_path: Path) -> None:
    import onnxruntime

    export_onnx(network(16), torch.randn(4, 3, 8, 8), tmp_path / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), options)
    assert not {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node} & {"Gather", "Cast"}


def test_quantized_weights_that_share_values_run_in_integers(tmp_path: Path) -> None:
    net, x = network(12), torch.randn(4, 3, 8, 8)
    with torch.no_grad():  # one scale for all channels, so that shared values stay shared
        for layer in net:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.weight.view(len(layer.weight), -1)[:, 0] = layer.weight.abs().max()
    quantized(net, [x])
    result = export_onnx(net, x, tmp_path / "model.onnx")
    assert result.shared == {4: 2}
    assert result.audit.counts() == {"conv": (2, 2), "gemm": (1, 1)}  # all of them in integers


def test_what_would_not_be_smaller_stays() -> None:
    weights: dict[str, np.ndarray] = {
        "many": np.arange(32 * 32, dtype=np.float32).reshape(32, 32),
        "few": np.ones((4, 4), np.float32),
        "flat": np.ones(4096, np.float32),
        "whole": np.ones((64, 64), np.int64),
        "late": np.concatenate([np.ones(1024), np.arange(400)]).astype(np.float32)[:, None],
    }
    graph = onnx.helper.make_graph([], "g", [], [], [onnx.numpy_helper.from_array(v, n) for n, v in weights.items()])
    model = onnx.helper.make_model(graph)
    before = model.SerializeToString()
    assert share_values_(model) == {}
    assert model.SerializeToString() == before
    assert sharing_note({}) == ""
