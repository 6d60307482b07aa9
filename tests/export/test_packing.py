"""Weights of few bits are stored with few bits, and ONNX Runtime still runs them in integers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from lightning_compress.export import ExportResult, export_onnx
from lightning_compress.export.packing import pack_weights_, storage_note
from lightning_compress.export.session import open_session, run_session
from tests.small_networks import Residual, images, quantized, warmed


def exported(folder: Path, weight_bits: int, activation_bits: int = 8) -> ExportResult:
    torch.manual_seed(0)
    model = warmed(Residual())
    quantized(model, weight_bits=weight_bits, activation_bits=activation_bits, edge_bits=2)
    return export_onnx(model, images(), folder / "model.onnx", verify_inputs=[images(32, seed) for seed in range(3)])


@pytest.mark.parametrize(
    ("bits", "stored", "opset"),
    [
        (8, TensorProto.INT8, 20),
        (5, TensorProto.INT8, 20),
        (4, TensorProto.INT4, 21),
        (3, TensorProto.INT4, 21),
        (2, TensorProto.INT2, 25),
    ],
)
def test_each_bit_width_has_its_smallest_type(tmp_path: Path, bits: int, stored: int, opset: int) -> None:
    result = exported(tmp_path, bits)
    model = onnx.load(result.path)
    weights = {tensor.name: tensor for tensor in model.graph.initializer if tensor.name.endswith(".weight")}
    assert {name: tensor.data_type for name, tensor in weights.items()} == dict.fromkeys(
        ("conv1.weight", "conv2.weight", "conv3.weight", "fc.weight"), stored
    )
    assert model.opset_import[0].version == opset


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_few_bits_run_in_integers_and_compute_the_same(tmp_path: Path, bits: int) -> None:
    result = exported(tmp_path, bits, max(bits, 3))
    assert result.audit.counts() == {"conv": (3, 3), "add": (2, 2), "pool": (1, 1), "gemm": (1, 1)}
    assert result.parity.snr_db > 40
    (output,) = run_session(open_session(result.path), [images(32, 1)])
    assert len(torch.unique(output)) > 10


def test_four_bits_halve_the_bytes_of_the_weights(tmp_path: Path) -> None:
    weights = {}
    for bits in (8, 4, 2):
        model = onnx.load(exported(tmp_path, bits).path)
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "conv2.weight")
        weights[bits] = len(tensor.raw_data)
    assert weights == {8: 8 * 8 * 9, 4: 8 * 8 * 9 // 2, 2: 8 * 8 * 9 // 4}


@pytest.mark.parametrize(
    ("values", "stored"),
    [
        ([-8, 7, 0], TensorProto.INT4),
        ([-8, 8, 0], TensorProto.INT8),
        ([-2, 1, 0, 1, -1], TensorProto.INT2),
        ([-3, 1], TensorProto.INT4),
    ],
)
def test_what_is_packed_is_read_back(values: list[int], stored: int) -> None:
    weight = onnx.numpy_helper.from_array(np.array([values], dtype=np.int8), "weight")
    scale = onnx.numpy_helper.from_array(np.array(0.5, dtype=np.float32), "scale")
    node = onnx.helper.make_node("DequantizeLinear", ["weight", "scale"], ["result"])
    output = onnx.helper.make_tensor_value_info("result", TensorProto.FLOAT, [1, len(values)])
    graph = onnx.helper.make_graph([node], "graph", [], [output], [weight, scale])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)])
    pack_weights_(model)
    onnx.checker.check_model(model, full_check=True)
    packed = model.graph.initializer[0]
    assert packed.data_type == stored
    assert onnx.numpy_helper.to_array(packed).astype(np.int8).tolist() == [values]


def test_the_note_says_what_a_runtime_does_with_them(tmp_path: Path) -> None:
    result = exported(tmp_path, 4)
    assert storage_note(result.packed) in result.to_text()
    assert storage_note(result.packed) == (
        "Stored with 4 bits: 4 weights. ONNX Runtime unpacks them to int8 when it loads the file: the file is smaller, "
        "the speed that of int8."
    )
    assert storage_note({}) == ""
