"""Files written whole."""

from __future__ import annotations

import os
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

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


@pytest.mark.parametrize(("max_bytes", "names"), [(4000, ["m.onnx", "m.onnx.*.data"]), (5000, ["m.onnx"])])
def test_more_bytes_than_one_message_holds_go_to_a_second_file(
    max_bytes: int, names: list[str], tmp_path: Path
) -> None:
    weight = torch.rand(32, 32)  # 4096 bytes
    path = tmp_path / "m.onnx"
    write_model(product(weight), path, max_bytes)
    found = sorted(item.name for item in tmp_path.iterdir())
    assert all(fnmatch(name, pattern) for name, pattern in zip(found, names, strict=True))
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


@pytest.mark.parametrize("last_move", [0, 1, 2])
def test_a_stop_after_any_move_leaves_a_model_with_its_own_weights(
    last_move: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, x = tmp_path / "m.onnx", torch.ones(1, 32)
    write_model(product(torch.full((32, 32), 1.0)), path, max_bytes=100)
    moves: list[Any] = []
    replace = os.replace

    def stopped(source: Path, target: Path) -> None:
        if len(moves) == last_move:
            raise KeyboardInterrupt
        replace(source, target)
        moves.append(target)

    monkeypatch.setattr(os, "replace", stopped)
    monkeypatch.setattr(Path, "unlink", lambda self, missing_ok=False: stopped(self, self))
    with pytest.raises(KeyboardInterrupt):
        write_model(product(torch.full((32, 32), 2.0)), path, max_bytes=100)
    monkeypatch.undo()
    expected = 64.0 if path in moves else 32.0
    assert set(run_session(open_session(path), [x])[0].flatten().tolist()) == {expected}
    write_model(product(torch.full((32, 32), 3.0)), path, max_bytes=100)
    assert len(list(tmp_path.iterdir())) == 2  # what the stop has left is gone
    assert set(run_session(open_session(path), [x])[0].flatten().tolist()) == {96.0}


def test_what_a_killed_export_has_left_is_removed_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for process in (dead.pid, os.getppid()):
        folder = tmp_path / f".m.onnx.{process}.x1y2.tmp"
        folder.mkdir()
        (folder / "m.onnx").write_bytes(b"half")
        (tmp_path / f".m.onnx.{process}.tmp").write_bytes(b"half")
    (tmp_path / ".other.onnx.tmp").write_bytes(b"of somebody else")
    write_model(product(torch.rand(2, 2)), path)
    left = [f".m.onnx.{os.getppid()}.tmp", f".m.onnx.{os.getppid()}.x1y2.tmp", ".other.onnx.tmp", "m.onnx"]
    assert sorted(item.name for item in tmp_path.iterdir()) == sorted(left)
