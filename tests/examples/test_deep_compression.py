"""The paper's pipeline, small: pruned, shared and coded in one fit, and read back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from examples import deep_compression
from lightning_compress import load_compressed


def test_the_file_holds_what_the_recipe_asks_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data", "digits", "--epochs", "6", "--batch-size", "32", "--out", str(tmp_path)]
    deep_compression.main(arguments)
    weights = load_compressed(tmp_path / "lenet-300-100.lcz")
    matrices = [weights[f"network.{layer}.weight"] for layer in (1, 3, 5)]
    n_zeros = sum(int((matrix == 0).sum()) for matrix in matrices)
    assert n_zeros == round(0.915 * sum(matrix.numel() for matrix in matrices))
    assert [int(torch.unique(matrix).numel()) for matrix in matrices] == [17, 17, 17]
    *_, table, _, last = capsys.readouterr().out.splitlines()
    assert "times smaller; the entropy bound is" in table
    dense, compressed = (float(part.split()[-1]) for part in last.split(" %")[:2])
    assert dense > 80
    assert compressed > 70
