"""Low rank: a weight as a matrix, the best matrix of a rank, and the way back to that rank after a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Scheme = Literal["channel", "spatial"]
"""How a weight becomes the product of two: see `as_matrix`."""

SCHEMES: tuple[Scheme, ...] = get_args(Scheme)


def as_matrix(weight: Tensor, scheme: Scheme) -> Tensor:
    """Return a weight as the matrix whose two factors are the weights of two layers.

    ``"channel"``: output channels by all else, so that a convolution becomes one of the same kernel to r channels and
    a 1x1 convolution (Zhang et al. 2016, arXiv:1505.06798). ``"spatial"``: output channels and columns by input
    channels and rows, for a convolution of kernel height x 1 and one of 1 x width (Jaderberg et al. 2014,
    arXiv:1405.3866).

    Args:
        weight: Shape (outputs, inputs) or (outputs, inputs, ...); four dimensions for ``"spatial"``.
        scheme: Which of the two.

    Returns:
        The matrix: the second layer makes its rows, the first one reads its columns.

    Example:
        >>> weight = torch.zeros(8, 4, 3, 5)
        >>> as_matrix(weight, "channel").shape, as_matrix(weight, "spatial").shape
        (torch.Size([8, 60]), torch.Size([40, 12]))
    """
    if scheme == "channel":
        return weight.flatten(1)
    n_out, n_in, height, width = weight.shape
    return weight.permute(0, 3, 1, 2).reshape(n_out * width, n_in * height)


def as_weight(matrix: Tensor, shape: Sequence[int], scheme: Scheme) -> Tensor:
    """Undo `as_matrix`.

    Args:
        matrix: The matrix.
        shape: Shape of the weight.
        scheme: As of `as_matrix`.

    Example:
        >>> weight = torch.rand(8, 4, 3, 5)
        >>> torch.equal(as_weight(as_matrix(weight, "spatial"), weight.shape, "spatial"), weight)
        True
    """
    if scheme == "channel":
        return matrix.reshape(tuple(shape))
    n_out, n_in, height, width = shape
    return matrix.view(n_out, width, n_in, height).permute(0, 2, 3, 1)


def full_rank(shape: Sequence[int], scheme: Scheme) -> int:
    """Return the largest rank that a weight of a shape can have.

    Example:
        >>> full_rank((8, 4, 3, 3), "channel"), full_rank((8, 4, 3, 3), "spatial")
        (8, 12)
    """
    rows, columns = as_matrix(torch.empty(tuple(shape), device="meta"), scheme).shape
    return min(rows, columns)


@torch.no_grad()
def best_basis(matrix: Tensor, rank: int) -> Tensor:
    """Return the directions in which a matrix is largest: its first singular vectors, on its shorter side.

    They are eigenvectors of the product of the matrix with itself, in float64: as exact for float32 as a singular
    value decomposition, and cheaper where one side is much longer.

    Args:
        matrix: The matrix, finite.
        rank: How many, at most its shorter side.

    Returns:
        Orthonormal columns, shape (shorter side, rank), the largest first.

    Example:
        >>> best_basis(torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 5.0]]), 1).abs()
        tensor([[0.],
                [1.]])
    """
    wide = _wide(matrix)
    wide = (wide.cpu() if wide.device.type == "mps" else wide).double()
    vectors: Tensor = torch.linalg.eigh(wide @ wide.T).eigenvectors
    return vectors[:, -rank:].flip(1).to(device=matrix.device, dtype=matrix.dtype).contiguous()


@torch.no_grad()
def projected(matrix: Tensor, basis: Tensor) -> Tensor:
    """Return what of a matrix lies in the directions of a basis; with that of `best_basis` the best of its rank.

    Args:
        matrix: The matrix.
        basis: Orthonormal columns, as of `best_basis`.

    Example:
        >>> matrix = torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 5.0]])
        >>> projected(matrix, best_basis(matrix, 1))
        tensor([[0., 0., 0.],
                [0., 0., 5.]])
    """
    wide = _wide(matrix)
    with _whole_precision(matrix):
        found = basis @ (basis.T @ wide)
    return found if wide is matrix else found.T


@torch.no_grad()
def retracted(matrix: Tensor, basis: Tensor, n_iterations: int = 1) -> tuple[Tensor, Tensor]:
    """Return a matrix that a step has moved off its rank, put back onto it, and the basis for the next step.

    The directions before the step are nearly those after it, so one iteration of orthogonal iteration from there
    (Golub & Van Loan 2013, section 8.2.4) comes as close as a decomposition would, for two products and a QR.

    Args:
        matrix: The matrix after the step.
        basis: That of the matrix before it.
        n_iterations: More of them where the basis is that of a matrix further away.

    Returns:
        The matrix of that rank, and its basis.

    Example:
        >>> basis = torch.tensor([[1.0], [0.0]])
        >>> found, basis = retracted(torch.tensor([[2.0, 2.0, 0.0], [0.0, 0.0, 0.1]]), basis)
        >>> found.abs()
        tensor([[2., 2., 0.],
                [0., 0., 0.]])
    """
    wide = _wide(matrix)
    with _whole_precision(matrix):
        for _ in range(n_iterations):
            grown = wide @ (wide.T @ basis)
            on = grown.cpu() if grown.device.type == "mps" else grown
            basis = torch.linalg.qr(on).Q.to(grown.device)
    return projected(matrix, basis), basis


@torch.no_grad()
def narrower_basis(matrix: Tensor, basis: Tensor, rank: int) -> Tensor:
    """Return the first directions of a matrix that lies in a basis; cheaper than `best_basis`, which looks everywhere.

    Args:
        matrix: The matrix.
        basis: Its basis.
        rank: How many, at most as many as the basis has.

    Example:
        >>> matrix = torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 5.0]])
        >>> narrower_basis(matrix, torch.eye(2), 1).abs()
        tensor([[0.],
                [1.]])
    """
    with _whole_precision(matrix):
        inside = basis.T @ _wide(matrix)
        return basis @ best_basis(inside, rank)


@torch.no_grad()
def rank_error(matrix: Tensor, basis: Tensor) -> float:
    """Return how much of a matrix lies outside the directions of a basis, relative to its norm, in [0, 1].

    Example:
        >>> round(rank_error(torch.tensor([[4.0, 0.0], [0.0, 3.0]]), torch.tensor([[1.0], [0.0]])), 3)
        0.6
    """
    norm = float(torch.linalg.vector_norm(matrix))
    return float(torch.linalg.vector_norm(matrix - projected(matrix, basis))) / norm if norm else 0.0


@torch.no_grad()
def best_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the two factors of the best matrix of a rank, with equal norms, so that both train on alike.

    Args:
        matrix: The matrix, finite.
        rank: Its rank afterwards.

    Returns:
        Shapes (rows, rank) and (rank, columns).

    Example:
        >>> left, right = best_factors(torch.tensor([[2.0, 4.0], [1.0, 2.0]]), 1)
        >>> (left @ right).round(decimals=5)
        tensor([[2., 4.],
                [1., 2.]])
    """
    basis = best_basis(matrix.double(), rank)
    other = basis.T @ _wide(matrix).double()
    root = torch.linalg.vector_norm(other, dim=1).sqrt()
    scaled = torch.where(root[:, None] > 0, other / root[:, None], other)
    left, right = (basis * root).to(matrix.dtype), scaled.to(matrix.dtype)
    return (left, right) if _wide(matrix) is matrix else (right.T.contiguous(), left.T.contiguous())


def _wide(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


@contextmanager
def _whole_precision(matrix: Tensor) -> Iterator[None]:
    """Multiply in the matrix's own precision: autocast and TF32 would add their rounding to the weights, every step."""
    known: list[Any] = [getattr(torch.backends, name) for name in ("cuda", "mkldnn")]
    backends = [one.matmul for one in known if hasattr(getattr(one, "matmul", None), "fp32_precision")]  # torch 2.9
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(matrix.device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
