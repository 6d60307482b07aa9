"""Files written whole."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from lightning_compress.errors import ExportError
from lightning_compress.export.audit import audit
from lightning_compress.export.model_file import write_model
from lightning_compress.export.session import open_session, run_session


def product(weight: torch.Tensor) -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", weight.shape[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", weight.shape[1]])],
        [onnx.numpy_helper.from_array(weight.numpy(), "weight")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize(("max_bytes", "names"), [(4000, ["m.onnx", "m.onnx.data"]), (5000, ["m.onnx"])])
def test_more_bytes_than_one_message_holds_go_to_a_second_file(
    max_bytes: int, names: list[str], tmp_path: Path
) -> None:
    weight = torch.rand(32, 32)  # 4096 bytes
    path = tmp_path / "m.onnx"
    write_model(product(weight), path, max_bytes)
    assert sorted(item.name for item in tmp_path.iterdir()) == names
    x = torch.rand(3, 32)
    torch.testing.assert_close(run_session(open_session(path), [x])[0], x @ weight)
    assert audit(path, {"x": x}).rows[0].macs == 3 * 32 * 32


def test_an_invalid_model_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"the last good file")
    model = product(torch.rand(2, 2))
    model.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(ExportError, match=r"^The exported model is not valid ONNX: .*NoSuchOperator.*\.$"):
        write_model(model, path)
    assert path.read_bytes() == b"the last good file"
    assert [item.name for item in tmp_path.iterdir()] == ["m.onnx"]
