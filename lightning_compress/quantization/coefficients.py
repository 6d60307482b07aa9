"""Weights as integer coefficients: quantization of frequencies, with bits where they tell most."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_compress.quantization.dct import DCT, from_frequencies, to_frequencies, transform_matrix
from lightning_compress.quantization.scales import least_squares_steps

BITS = (0, 2, 3, 4, 5, 6, 7, 8)
"""Bits that a frequency may have; one bit would hold nothing but zero."""


@dataclass
class CoefficientQuantizer:
    """Rounds a weight in its frequencies: symmetric integers, a step for each output channel times one a frequency.

    Which frequency gets how many bits and what step is found once, by `fit`, on the weights as they are then. The
    bits are those of the least squared error under a budget of ``bits`` in the mean, found exactly (dynamic
    programming): bit allocation of transform coding (Huang & Schultheiss 1963).

    Args:
        bits: Bits of a coefficient, in the mean over the frequencies, 2 to 8.
        transform: What is transformed together, and whether frequencies get different numbers of bits.
        ratios: The step of each frequency as a multiple of its channel's, float32 of shape (frequencies,).
        limits: The largest integer of each frequency, int64 of shape (frequencies,).

    Example:
        >>> quantizer = CoefficientQuantizer(bits=4)
        >>> quantizer.fit(torch.tensor([[[1.0, 1.1], [2.0, 2.1]], [[-3.0, -2.9], [1.5, 1.7]]]))
        >>> quantizer.limits.tolist()
        [31, 1]
    """

    bits: int
    transform: DCT = field(default_factory=DCT)
    ratios: Tensor | None = None
    limits: Tensor | None = None

    def applies_to(self, shape: Sequence[int]) -> bool:
        """Tell whether a weight of this shape, output channels first, has blocks."""
        return transform_matrix(shape, self.transform.block) is not None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def fit(self, weight: Tensor) -> None:
        """Choose bits and steps of the frequencies for a weight of the shape (channels, inputs, *kernel)."""
        coefficients = self._frequencies(weight)
        size = coefficients.square().mean((1, 2), keepdim=True).sqrt()
        columns = (coefficients / torch.where(size > 0, size, 1.0)).flatten(0, 1).T.float()
        energy = columns.square().mean(1)
        # Where there is nothing yet, as in a weight that begins as the identity, anything may come.
        columns = torch.where((energy <= 1e-8 * energy.max())[:, None], columns[energy.argmax()], columns)
        errors, steps = [], []
        for bits in BITS if self.transform.allocates else (self.bits,):
            largest = torch.tensor(float(_limit(bits)), device=columns.device)
            step = least_squares_steps(columns, largest) if bits else torch.ones(len(columns), device=columns.device)
            codes = (columns / step[:, None]).round().clamp(-largest, largest)
            steps.append(step)
            error = (codes * step[:, None] - columns).square().mean(1)
            # A few values may lie on a coarse grid by chance, as those of a first weight; others will not.
            errors.append(torch.maximum(error, step.square() / 24) if bits else error)
        if self.transform.allocates and bool(columns.any()):
            chosen = allocate_bits(torch.stack(errors, 1).tolist(), BITS, self.bits * len(columns))
        else:
            chosen = [self.bits] * len(columns)
        # A weight of zeros, as a last layer may begin, tells nothing yet: as many bits for each.
        rows = [BITS.index(bits) if self.transform.allocates else 0 for bits in chosen]
        self.ratios = torch.stack([steps[row][column] for column, row in enumerate(rows)])
        self.limits = torch.tensor([_limit(bits) for bits in chosen], device=weight.device)

    def step(self, weight: Tensor, *, covers: bool) -> Tensor:
        """Return a step for every output channel, float32 of shape (channels,).

        Args:
            weight: The weight.
            covers: Whether the grid covers the largest coefficient; else the squared error is least, about.
        """
        ratios, limits = self._fitted(weight)
        rows = (self._frequencies(weight.detach()) / ratios.double()).float()
        rows = rows * (limits > 0)
        largest = limits.clamp_min(1).float().expand(rows.shape[1:]).flatten()
        return least_squares_steps(rows.flatten(1), largest, refines=not covers)

    def rounded(self, weight: Tensor, step: Tensor) -> Tensor:
        """Return ``weight`` from rounded coefficients, as float32; zeros stay zeros.

        Gradients pass straight through the rounding where nothing is clipped, those of zeros too, and reach ``step``
        as of Esser et al. 2020 (eq. 3 and 5, arXiv:1902.08153).

        Args:
            weight: The weight.
            step: Of every output channel, shape (channels,).
        """
        ratios, limits = self._fitted(weight)
        coefficients = self._frequencies(weight) / ratios.double()
        share = 1 / math.sqrt(math.prod(coefficients.shape[1:]) * _limit(self.bits))
        step = step.detach() + (step - step.detach()) * share  # the value to the bit, and a share of the gradient
        ratio = coefficients / step.double()[:, None, None]
        # What defines a grid lies on its bound, and is not clipped.
        is_inside = ratio.detach().abs() <= limits * (1 + 1e-6)
        clipped = torch.where(is_inside, ratio, ratio.detach().sign() * limits)
        rounded = torch.minimum(torch.maximum(clipped.detach().round(), -limits.double()), limits.double())
        codes = rounded + (clipped - clipped.detach())
        return self._weight(codes * step.double()[:, None, None], weight)

    @torch.no_grad()
    def integers(self, weight: Tensor, step: Tensor) -> Tensor:
        """Return the coefficients as int8, of shape (channels, blocks, frequencies)."""
        ratios, limits = self._fitted(weight)
        ratio = self._frequencies(weight) / ratios.double() / step.double()[:, None, None]
        return torch.minimum(torch.maximum(ratio.round(), -limits.double()), limits.double()).to(torch.int8)

    def state_dict(self) -> dict[str, Any]:
        """Return bits and steps of the frequencies as CPU tensors; empty before `fit`."""
        if self.ratios is None or self.limits is None:
            return {}
        return {"ratios": self.ratios.cpu(), "limits": self.limits.cpu()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a `state_dict`."""
        self.ratios, self.limits = state.get("ratios"), state.get("limits")

    def _fitted(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        if self.ratios is None or self.limits is None:
            self.fit(weight)
        assert self.ratios is not None
        assert self.limits is not None
        if self.ratios.device != weight.device:
            self.ratios, self.limits = self.ratios.to(weight.device), self.limits.to(weight.device)
        return self.ratios, self.limits

    def _frequencies(self, weight: Tensor) -> Tensor:
        return to_frequencies(weight, self._matrix(weight))

    def _matrix(self, weight: Tensor) -> Tensor:
        matrix = transform_matrix(weight.shape, self.transform.block)
        assert matrix is not None
        return matrix

    def _weight(self, scaled: Tensor, like: Tensor) -> Tensor:
        assert self.ratios is not None
        values = from_frequencies(scaled * self.ratios.double(), self._matrix(like), like.shape).float()
        return values - (values * (like == 0)).detach()  # zeros stay zeros, and learn what they would be


def decoded_weight(codes: Tensor, step: Tensor, ratios: Tensor, shape: Sequence[int], block: int | None) -> Tensor:
    """Return the float32 weight that integer coefficients stand for.

    In float64 and rounded to float32 at the end: the order in which a machine adds does not show.

    Args:
        codes: Integers of shape (channels, blocks, frequencies).
        step: Of every output channel, shape (channels,).
        ratios: Of every frequency, shape (frequencies,).
        shape: Shape of the weight, output channels first.
        block: Inputs of a block where the kernel has one position.

    Example:
        >>> codes = torch.tensor([[[1, 0]]], dtype=torch.int8)
        >>> decoded_weight(codes, torch.tensor([2.0**0.5]), torch.tensor([1.0, 1.0]), (1, 2), block=2)
        tensor([[1., 1.]])
    """
    matrix = transform_matrix(shape, block)
    assert matrix is not None
    scaled = codes.double() * step.double()[:, None, None] * ratios.double()
    return from_frequencies(scaled, matrix, shape).float()


def allocate_bits(errors: Sequence[Sequence[float]], bits: Sequence[int], budget: int) -> list[int]:
    """Return the bits of every frequency with the least sum of errors under a budget, exactly.

    Args:
        errors: For every frequency, its error with each number of bits.
        bits: These numbers; one of them is 0.
        budget: Most bits of all frequencies together.

    Example:
        >>> allocate_bits([[9.0, 1.0, 0.5], [2.0, 1.9, 1.8]], [0, 2, 3], budget=4)
        [3, 0]
    """
    table = np.asarray(errors, dtype=np.float64)
    least = np.full(budget + 1, np.inf)  # the least error of the frequencies so far, with so many bits
    least[0] = 0.0
    choices = np.zeros((len(table), budget + 1), dtype=np.int8)
    for row, choice in zip(table, choices, strict=True):
        found = np.full(budget + 1, np.inf)
        for number, (n_bits, error) in enumerate(zip(bits, row, strict=True)):
            with_it = least[: budget + 1 - n_bits] + error
            is_better = with_it < found[n_bits:]
            found[n_bits:][is_better] = with_it[is_better]
            choice[n_bits:][is_better] = number
        least = found
    spent = budget - int(least[::-1].argmin())  # of equal errors that with the most bits
    chosen: list[int] = []
    for choice in choices[::-1]:
        n_bits = bits[int(choice[spent])]
        chosen.insert(0, n_bits)
        spent -= n_bits
    return chosen


def _limit(bits: int) -> int:
    return 2 ** (bits - 1) - 1 if bits else 0
