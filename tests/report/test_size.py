"""Bytes of ONNX files, also of those that keep their weights next to them."""

import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from lightning_compress.report.size import FileSizes, file_sizes, size_bytes, zipped_size_bytes

SOURCE = '<ir_version: 8, opset_import: ["": 17]> g (float[N, 100] x) => (float[N, 100] y) { y = MatMul(x, w) }'


def _model(weight: np.ndarray) -> onnx.ModelProto:
    model = onnx.parser.parse_model(SOURCE)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    return model


@pytest.fixture
def weight() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((100, 100)).astype(np.float32)


def test_size_of_one_file_is_what_the_disk_says(tmp_path: Path, weight: np.ndarray) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(_model(weight), path)
    assert size_bytes(path) == path.stat().st_size > 40_000


def test_external_data_counts(tmp_path: Path, weight: np.ndarray) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(_model(weight), path, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    (tmp_path / "unrelated.data").write_bytes(bytes(1000))
    assert path.stat().st_size < 1000
    assert size_bytes(path) == path.stat().st_size + 40_000
    assert zipped_size_bytes(path) > 30_000


def test_external_data_inside_a_branch_counts(tmp_path: Path) -> None:
    branch = onnx.helper.make_graph(
        [], "branch", [], [onnx.helper.make_tensor_value_info("b", onnx.TensorProto.FLOAT, [1000])]
    )
    branch.initializer.append(numpy_helper.from_array(np.ones(1000, np.float32), "b"))
    branch.initializer[0].ClearField("raw_data")
    branch.initializer[0].data_location = onnx.TensorProto.EXTERNAL
    branch.initializer[0].external_data.add(key="location", value="branch.data")
    node = onnx.helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    path = tmp_path / "branch.onnx"
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], [])), path)
    (tmp_path / "branch.data").write_bytes(bytes(4000))
    assert size_bytes(path) == path.stat().st_size + 4000


def test_zipped_size_is_that_of_a_real_zip_without_its_headers(tmp_path: Path, weight: np.ndarray) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(_model(weight), path)
    with zipfile.ZipFile(tmp_path / "model.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        archive.write(path)
    assert zipped_size_bytes(path) == archive.infolist()[0].compress_size


def test_zeros_shrink_the_zipped_file_only(tmp_path: Path, weight: np.ndarray) -> None:
    dense, sparse = tmp_path / "dense.onnx", tmp_path / "sparse.onnx"
    onnx.save(_model(weight), dense)
    onnx.save(_model(np.where(np.abs(weight) > 1.3, weight, np.float32(0))), sparse)
    assert size_bytes(sparse) == size_bytes(dense)
    assert zipped_size_bytes(sparse) < 0.4 * zipped_size_bytes(dense)


def test_measuring_writes_no_file(tmp_path: Path, weight: np.ndarray) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(_model(weight), path)
    zipped_size_bytes(path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_file_sizes_hold_all_three(tmp_path: Path, weight: np.ndarray) -> None:
    small, large = tmp_path / "small.onnx", tmp_path / "large.onnx"
    onnx.save(_model(weight[:, :50]), small)
    onnx.save(_model(weight), large)
    expected = FileSizes(size_bytes(small), zipped_size_bytes(small), size_bytes(large))
    assert file_sizes(small, large) == expected
    assert file_sizes(small).float_onnx_bytes is None
