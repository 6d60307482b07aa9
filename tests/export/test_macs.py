"""Multiply-accumulates, against numbers that can be checked in the head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from lightning_compress.export.macs import count_macs

OPSETS = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]


def macs_of_one(
    op_type: str, shapes: Sequence[tuple[int, ...]], folder: Path, domain: str = "", opset: int = 20, **settings: Any
) -> int:
    """Count the multiply-accumulates of one operation on inputs of ``shapes``."""
    names = [f"input_{position}" for position in range(len(shapes))]
    node = helper.make_node(op_type, names, ["result"], domain=domain, **settings)
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, s) for name, s in zip(names, shapes, strict=True)]
    result = helper.make_tensor_value_info("result", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "graph", inputs, [result])
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), folder / "model.onnx")
    (count,) = count_macs(folder / "model.onnx", {name: torch.rand(s) for name, s in zip(names, shapes, strict=True)})
    return count


def test_a_convolution_takes_a_product_for_each_weight_of_each_output(tmp_path: Path) -> None:
    # 6 x 3 x 3 outputs, each of 2 x 3 x 3 weights.
    assert macs_of_one("Conv", [(1, 4, 5, 5), (6, 2, 3, 3)], tmp_path, group=2) == 54 * 18


def test_a_transposed_convolution_takes_a_product_for_each_weight_of_each_input(tmp_path: Path) -> None:
    # 4 x 3 x 3 inputs, each of 5 x 2 x 2 weights.
    assert macs_of_one("ConvTranspose", [(1, 4, 3, 3), (4, 5, 2, 2)], tmp_path, strides=[2, 2]) == 36 * 20


@pytest.mark.parametrize(
    ("op_type", "first", "second", "settings"),
    [
        ("MatMul", (2, 5, 3), (3, 4), {}),
        ("MatMul", (2, 5, 3), (2, 3, 4), {}),
        ("FusedMatMul", (2, 5, 3), (2, 4, 3), {"transB": 1}),
        ("FusedMatMul", (2, 3, 5), (2, 3, 4), {"transA": 1}),
        ("FusedMatMul", (5, 2, 3), (2, 3, 4), {"transBatchA": 1}),
        ("FusedMatMul", (3, 2, 5), (2, 3, 4), {"transBatchA": 1, "transA": 1}),
        ("Gemm", (10, 3), (3, 4), {}),
        ("Gemm", (3, 10), (4, 3), {"transA": 1, "transB": 1}),
        ("Einsum", (2, 5, 3), (2, 4, 3), {"equation": "bij, bkj -> bik"}),
        ("Einsum", (2, 5, 3), (3, 4), {"equation": "...j,jk->...k"}),
        ("Einsum", (2, 5, 3), (1, 3, 4), {"equation": "...ij,...jk"}),
    ],
)
def test_every_product_of_ten_rows_by_three_and_four_columns_is_the_same(
    op_type: str, first: tuple[int, ...], second: tuple[int, ...], settings: dict[str, Any], tmp_path: Path
) -> None:
    domain = "com.microsoft" if op_type == "FusedMatMul" else ""
    assert macs_of_one(op_type, [first, second], tmp_path, domain, **settings) == 10 * 3 * 4


def test_a_single_operand_has_no_products(tmp_path: Path) -> None:
    assert macs_of_one("Einsum", [(2, 3)], tmp_path, equation="ij->ji") == 0
    assert macs_of_one("Relu", [(2, 3)], tmp_path) == 0


@pytest.mark.parametrize(("op_type", "gates"), [("RNN", 1), ("GRU", 3), ("LSTM", 4)])
def test_a_recurrent_layer_reads_input_and_state_at_every_step(op_type: str, gates: int, tmp_path: Path) -> None:
    shapes = [(7, 2, 3), (1, gates * 5, 3), (1, gates * 5, 5)]
    # 7 steps of 2 sequences, each of gates x 5 sums over 3 inputs and 5 states.
    assert macs_of_one(op_type, shapes, tmp_path, hidden_size=5) == 14 * gates * 5 * 8


def test_attention_makes_scores_and_weighted_sums(tmp_path: Path) -> None:
    shapes = [(1, 2, 4, 3), (1, 2, 5, 3), (1, 2, 5, 6)]
    # 2 heads, 4 queries, 5 keys: scores over 3 values, sums of 6.
    assert macs_of_one("Attention", shapes, tmp_path, opset=23) == 2 * 4 * 5 * (3 + 6)


def test_attention_of_onnx_runtime_projects_first_in_one_of_its_two_operators(tmp_path: Path) -> None:
    runtimes = "com.microsoft"
    shapes = [(1, 4, 8), (8, 24), (24,)]
    assert macs_of_one("Attention", shapes, tmp_path, runtimes, num_heads=2) == 4 * 8 * 24 + 4 * 4 * (8 + 8)
    shapes = [(1, 4, 8), (1, 4, 8), (1, 4, 8)]
    assert macs_of_one("MultiHeadAttention", shapes, tmp_path, runtimes, num_heads=2) == 4 * 4 * (8 + 8)


def test_constants_that_the_kernel_packs_away_are_counted_all_the_same(tmp_path: Path) -> None:
    weight = onnx.numpy_helper.from_array(torch.rand(6, 2, 3, 3).numpy(), "weight")
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "weight"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2, 5, 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [weight],
    )
    onnx.save(helper.make_model(graph, opset_imports=OPSETS, ir_version=10), tmp_path / "model.onnx")
    assert count_macs(tmp_path / "model.onnx", {"x": torch.rand(2, 2, 5, 5)}) == [2 * 54 * 18]


LOOP = """<ir_version: 8, opset_import: ["": 17]>
g (int64 n, bool go, float[2,2] x) => (float[2,2] y) {
    y = Loop (n, go, x) <body = b (int64 i, bool before, float[2,2] state) => (bool after, float[2,2] next) {
        after = Identity (before)
        next = MatMul (state, state)
    }>
}"""

BRANCH = """<ir_version: 8, opset_import: ["": 17]>
g (bool go, float[2,2] x) => (float[2,2] y) {
    y = If (go) <then_branch = t () => (float[2,2] a) { a = MatMul (x, x) },
                 else_branch = e () => (float[2,2] b) { b = MatMul (x, x) }>
}"""


def test_what_a_loop_repeats_is_counted_each_time(tmp_path: Path) -> None:
    onnx.save(onnx.parser.parse_model(LOOP), tmp_path / "model.onnx")
    feeds = {"n": torch.tensor(3), "go": torch.tensor(True), "x": torch.rand(2, 2)}
    assert count_macs(tmp_path / "model.onnx", feeds) == [0, 0, 3 * 8]


def test_of_two_branches_the_one_taken_is_counted(tmp_path: Path) -> None:
    onnx.save(onnx.parser.parse_model(BRANCH), tmp_path / "model.onnx")
    assert count_macs(tmp_path / "model.onnx", {"go": torch.tensor(False), "x": torch.rand(2, 2)}) == [0, 0, 8]
