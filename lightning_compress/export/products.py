"""Products: an einsum of two operands as one matrix product, which runtimes know in integers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_compress.quantization.roles import einsum_letters


def matrix_product(
    equation: str,
    left: Tensor,
    right: Tensor,
    say_again: Callable[[Tensor, Tensor], Tensor] = lambda moved, value: moved,
) -> Tensor:
    """Compute an einsum of two operands by moving their dimensions, one matrix product, and moving them back.

    Args:
        equation: An equation in which each letter stands once in an operand, and each letter that is summed over
            stands in both.
        left: First operand.
        right: Second operand.
        say_again: Takes an operand whose dimensions were moved, and the operand as it was, and returns what is
            multiplied.

    Returns:
        The same as ``torch.einsum(equation, left, right)``.

    Example:
        >>> q, k = torch.rand(2, 3, 4, 5), torch.rand(2, 3, 6, 5)
        >>> found = matrix_product("bhid,bhjd->bhij", q, k)
        >>> torch.allclose(found, torch.einsum("bhid,bhjd->bhij", q, k))
        True
    """
    of_left, of_right, of_result = einsum_letters(equation)
    batch = [letter for letter in of_left if letter in of_right and letter in of_result]
    summed = [letter for letter in of_left if letter in of_right and letter not in of_result]
    rows = [letter for letter in of_left if letter not in of_right]
    columns = [letter for letter in of_right if letter not in of_left]
    sizes = dict(zip(of_left + of_right, (*left.shape, *right.shape), strict=True))
    a = _grouped(left, of_left, (batch, rows, summed))
    b = _grouped(right, of_right, (batch, summed, columns))
    product = torch.matmul(say_again(a, left), say_again(b, right))
    order = batch + rows + columns
    return product.reshape([sizes[letter] for letter in order]).permute([order.index(letter) for letter in of_result])


def _grouped(value: Tensor, letters: str, groups: tuple[list[str], list[str], list[str]]) -> Tensor:
    """Bring the dimensions of ``value`` in the order of ``groups``; the last two groups become one dimension each."""
    order = [letters.index(letter) for group in groups for letter in group]
    batch, first, _ = groups
    moved = value.permute(order)
    shape = list(moved.shape)
    rows, columns = shape[len(batch) : len(batch) + len(first)], shape[len(batch) + len(first) :]
    return moved.reshape([*shape[: len(batch)], _product(rows), _product(columns)])


def _product(sizes: list[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result
