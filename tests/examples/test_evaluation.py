from __future__ import annotations

from pathlib import Path

import onnx
import torch
from torch import nn

from examples.evaluation import percent_equal, predict, predict_onnx

BATCHES = [
    (torch.tensor([[3.0, 1.0, 2.0], [0.0, 1.0, 5.0]]), torch.tensor([0, 2])),
    (torch.tensor([[0.0, 7.0, 1.0]]), torch.tensor([1])),
]


def test_predictions_are_the_largest_logits_of_all_batches() -> None:
    assert predict(nn.Identity(), BATCHES).tolist() == [0, 2, 1]


def test_predicting_is_done_in_eval_mode_and_leaves_the_mode_as_it_was() -> None:
    dropout = nn.Dropout(p=1.0)
    assert predict(dropout, BATCHES).tolist() == [0, 2, 1]
    assert dropout.training


def test_a_file_predicts_in_onnx_runtime(tmp_path: Path) -> None:
    source = '<ir_version: 8, opset_import: ["": 17]> g (float[N, 3] x) => (float[N, 3] y) { y = Neg(x) }'
    onnx.save(onnx.parser.parse_model(source), tmp_path / "neg.onnx")
    assert predict_onnx(tmp_path / "neg.onnx", BATCHES).tolist() == [1, 0, 0]


def test_half_of_the_classes_are_equal() -> None:
    assert percent_equal(torch.tensor([1, 2]), torch.tensor([1, 3])) == 50.0
