"""Cosine transforms of weights: their kernels, or blocks of their inputs, in frequencies and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_compress.settings import plain

LARGEST_BLOCK = 64

LARGEST_KERNEL = 1024
"""Positions of the largest kernel that is transformed; a larger one is rounded as it is."""


@dataclass(frozen=True)
class DCT:
    """Weights are rounded in the frequencies of their kernels: ``QuantizationAwareTraining(weight_transform=DCT())``.

    Args:
        block: Inputs of a linear layer, or of a convolution whose kernel has one position, that are transformed
            together, 2 to 64; None rounds these layers as they are.
        allocates: Whether frequencies get bits by what they tell, ``weight_bits`` in the mean; else each has as many.

    Raises:
        ValueError: If ``block`` is out of range.
        TypeError: If ``block`` is no int, or ``allocates`` no bool.

    Example:
        >>> DCT(block=8)
        DCT(block=8, allocates=True)
    """

    block: int | None = None
    allocates: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", plain(self.block))
        if not isinstance(self.allocates, bool):
            raise TypeError(f"`allocates` must be True or False, got {self.allocates!r}.")
        if self.block is not None and (isinstance(self.block, bool) or not isinstance(self.block, int)):
            raise TypeError(f"`block` is a number of inputs, an int, or None, got {self.block!r}.")
        if self.block is not None and not 2 <= self.block <= LARGEST_BLOCK:
            raise ValueError(f"`block` must be from 2 to {LARGEST_BLOCK} inputs, got {self.block}.")


def dct_matrix(n: int) -> Tensor:
    """Return the orthonormal discrete cosine transform of ``n`` values, type II (Ahmed, Natarajan & Rao 1974).

    Args:
        n: Number of values, at least 1.

    Returns:
        Float64 matrix of shape ``(n, n)``; row k holds the cosine of frequency k, and its transpose undoes it.

    Example:
        >>> dct_matrix(2) * 2**0.5
        tensor([[ 1.0000,  1.0000],
                [ 1.0000, -1.0000]], dtype=torch.float64)
    """
    frequency, place = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    rows = math.sqrt(2 / n) * torch.cos(math.pi * (2 * place + 1) * frequency / (2 * n))
    rows[0] /= math.sqrt(2)
    return rows


def transform_matrix(shape: Sequence[int], block: int | None) -> Tensor | None:
    """Return the matrix that takes the blocks of a weight to frequencies, or None where it has no blocks.

    Args:
        shape: Shape of the weight, output channels first: (channels, inputs, *kernel).
        block: Inputs that make a block where the kernel has one position, as in linear layers; None: no blocks there.

    Returns:
        Orthogonal float64 matrix of shape ``(n, n)`` for blocks of n values: the kernel's, along all its dimensions.
        None for weights without entries too, and for kernels of more than 1024 positions.

    Example:
        >>> transform_matrix((8, 4, 3, 3), None).shape, transform_matrix((8, 4), 2).shape
        (torch.Size([9, 9]), torch.Size([2, 2]))
    """
    kernel = [size for size in shape[2:] if size > 1]
    if math.prod(shape) == 0 or math.prod(kernel) > LARGEST_KERNEL:
        return None
    if not kernel:
        return None if block is None or len(shape) < 2 else dct_matrix(block)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for size in kernel:
        matrix = torch.kron(matrix, dct_matrix(size))
    return matrix


def to_frequencies(weight: Tensor, matrix: Tensor) -> Tensor:
    """Return the coefficients of all blocks of ``weight``.

    Args:
        weight: Weight of the shape (channels, inputs, *kernel).
        matrix: As of `transform_matrix`.

    Returns:
        Float64 tensor of shape ``(channels, blocks, n)``; a last block that is not full is filled with zeros.

    Example:
        >>> to_frequencies(torch.tensor([[1.0, 3.0, 2.0]]), dct_matrix(2)) * 2**0.5
        tensor([[[ 4.0000, -2.0000],
                 [ 2.0000,  2.0000]]], dtype=torch.float64)
    """
    rows, n = weight.double().flatten(1), len(matrix)
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % n))
    return rows.view(len(rows), -1, n) @ matrix.to(rows.device).T


def from_frequencies(coefficients: Tensor, matrix: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the weight that has these coefficients, as float64.

    Args:
        coefficients: As of `to_frequencies`.
        matrix: As of `transform_matrix`.
        shape: The weight's shape.

    Example:
        >>> weight = torch.tensor([[1.0, 5.0, 2.0]], dtype=torch.float64)
        >>> from_frequencies(to_frequencies(weight, dct_matrix(2)), dct_matrix(2), (1, 3))
        tensor([[1.0000, 5.0000, 2.0000]], dtype=torch.float64)
    """
    rows = (coefficients @ matrix.to(coefficients.device)).flatten(1)
    return rows[:, : math.prod(shape[1:])].reshape(tuple(shape))
