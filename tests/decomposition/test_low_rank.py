"""Low rank against singular value decompositions, and the way back to a rank after a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_compress.decomposition.low_rank import (
    Scheme,
    as_matrix,
    as_weight,
    best_basis,
    best_factors,
    narrower_basis,
    projected,
    rank_error,
    retracted,
)

SHAPES = [(6, 10), (10, 6), (5, 5)]


def svd_of_rank(matrix: Tensor, rank: int) -> Tensor:
    """The slow reference: the best approximation by Eckart and Young."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    best: Tensor = (left[:, :rank] * values[:rank]) @ right[:rank]
    return best


def random(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_matrix_of_rank_one_is_the_product_of_its_factors() -> None:
    matrix = torch.tensor([[2.0, 4.0], [1.0, 2.0], [3.0, 6.0]])  # (2, 1, 3) times (1, 2)
    left, right = best_factors(matrix, 1)
    assert (left.shape, right.shape) == ((3, 1), (1, 2))
    torch.testing.assert_close(left @ right, matrix)
    torch.testing.assert_close(left.norm(), right.norm())
    torch.testing.assert_close(right[0, 1] / right[0, 0], torch.tensor(2.0))


def test_weights_are_cut_along_channels_or_along_space() -> None:
    weight = torch.arange(2 * 3 * 2 * 4).view(2, 3, 2, 4).float()
    by_channel, by_space = as_matrix(weight, "channel"), as_matrix(weight, "spatial")
    assert by_channel[1].tolist() == weight[1].flatten().tolist()
    # Rows: output channel and column; columns: input channel and row.
    assert by_space.shape == (2 * 4, 3 * 2)
    assert by_space[1 * 4 + 3, 2 * 2 + 1] == weight[1, 2, 1, 3]


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
def test_matrices_are_weights_again(scheme: Scheme) -> None:
    weight = random((3, 2, 5, 4))
    torch.testing.assert_close(as_weight(as_matrix(weight, scheme), weight.shape, scheme), weight, rtol=0, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_basis_and_the_factors_are_those_of_the_decomposition(shape: tuple[int, int], rank: int) -> None:
    matrix = random(shape)
    expected = svd_of_rank(matrix, rank).float()
    torch.testing.assert_close(projected(matrix, best_basis(matrix, rank)), expected, rtol=1e-4, atol=1e-5)
    left, right = best_factors(matrix, rank)
    torch.testing.assert_close(left @ right, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_narrower_basis_is_that_of_the_decomposition(shape: tuple[int, int]) -> None:
    matrix = svd_of_rank(random(shape), 4).float()
    found = projected(matrix, narrower_basis(matrix, best_basis(matrix, 4), 2))
    torch.testing.assert_close(found, svd_of_rank(matrix, 2).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_retraction_is_nearly_the_best_of_its_rank_and_exactly_of_it(shape: tuple[int, int]) -> None:
    before = svd_of_rank(random(shape), 3).float()
    basis = best_basis(before, 3)
    for step in range(20):  # as of an optimizer that walks on
        moved = before + 0.02 * random(shape, seed=step + 1)
        before, basis = retracted(moved, basis)
        best = (moved - svd_of_rank(moved, 3)).norm()
        assert (moved - before).norm() < 1.001 * best
        assert torch.linalg.matrix_rank(before, rtol=1e-5) == 3
    torch.testing.assert_close(basis.T @ basis, torch.eye(3), rtol=0, atol=1e-5)


def test_a_retraction_under_autocast_is_one_in_float32() -> None:
    matrix, basis = random((6, 10)), best_basis(random((6, 10), seed=1), 2)
    expected, _ = retracted(matrix, basis)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = retracted(matrix, basis)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_products_of_less_precision_are_set_aside_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    qr = torch.linalg.qr

    def watched(matrix: Tensor) -> Any:
        seen.append(torch.backends.cuda.matmul.fp32_precision)
        return qr(matrix)

    monkeypatch.setattr(torch.linalg, "qr", watched)
    torch.set_float32_matmul_precision("medium")
    try:
        retracted(random((6, 10)), best_basis(random((6, 10)), 2))
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == ["ieee"]


def test_weak_directions_beside_strong_ones_are_kept() -> None:
    matrix = torch.diag(torch.tensor([1e3, 1.0, 1e-2, 1e-4]))
    basis = best_basis(matrix, 3)
    found, _ = retracted(matrix, basis)
    torch.testing.assert_close(found.diagonal(), torch.tensor([1e3, 1.0, 1e-2, 0.0]), rtol=1e-4, atol=1e-6)


def test_what_lies_outside_a_basis_is_told_relative_to_the_whole() -> None:
    matrix = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert rank_error(matrix, best_basis(matrix, 1)) == pytest.approx(0.6)
    assert rank_error(torch.zeros(2, 2), best_basis(matrix, 1)) == 0.0


def test_zeros_have_factors_too() -> None:
    left, right = best_factors(torch.zeros(3, 4), 2)
    assert float((left @ right).abs().max()) == 0.0
    assert bool(torch.isfinite(left).all() and torch.isfinite(right).all())
