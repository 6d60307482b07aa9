"""Activation ranges: moving averages of what each quantizer saw, for all quantizers of a model at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from lightning_compress.errors import CompressionError
from lightning_compress.processes import collective_device, n_processes
from lightning_compress.quantization.affine import AffineGrid, affine_parameters
from lightning_compress.quantization.estimators import RangeMethod, estimate_range


@dataclass
class LearnedGrid:
    """A grid whose step size is trained.

    Attributes:
        step: The step size, a 0-d tensor.
        zero_point: The integer that stands for zero, fixed.
        bits: Number of bits.
    """

    step: Tensor
    zero_point: int
    bits: int

    def __post_init__(self) -> None:
        self.zero_point_tensor = torch.tensor(self.zero_point, dtype=torch.int32, device=self.step.device)

    @property
    def bounds(self) -> tuple[int, int]:
        """The least and the greatest integer, relative to the zero point."""
        return -self.zero_point, 2**self.bits - 1 - self.zero_point


class ActivationRanges:
    """The value range of every quantizer of a model, averaged over optimizer steps.

    Within a step a quantizer may be fed several times (call sites that share a grid, accumulated batches): the step's
    range is the union. `update` then moves the average once, on every process alike.

    The tensors are plain attributes and not buffers of the model: `module.half()` must not round them, averaged
    weights must not average them, and the state dict must not know them.

    A quantizer may learn its step size: `learn` then turns its range into a step size and a zero point, which is fixed.

    Args:
        momentum: Weight of the newest observation in the average, in (0, 1].
        symmetric: Whether zero points lie in the middle of the grids.

    Example:
        >>> ranges = ActivationRanges(momentum=0.5)
        >>> index = ranges.add("relu", bits=8)
        >>> for largest in (2.0, 4.0):
        ...     ranges.observe(index, torch.tensor(0.0), torch.tensor(largest))
        ...     ranges.update()
        >>> ranges.as_dict()
        {'relu': (0.0, 3.0)}
    """

    def __init__(self, momentum: float = 0.1, symmetric: bool = False) -> None:
        self.momentum = momentum
        self.symmetric = symmetric
        self.after_update: Callable[[], None] | None = None
        self.methods: list[RangeMethod] = []
        self.learned: dict[int, LearnedGrid] = {}
        self.names: list[str] = []
        self.bits: list[int] = []
        self.minimum = torch.empty(0)
        self.maximum = torch.empty(0)
        self._pending: list[tuple[int, Tensor, Tensor]] = []
        self._grids: list[AffineGrid | None] = []
        self._parameters: tuple[Tensor, Tensor] | None = None

    def add(self, name: str, bits: int, method: RangeMethod = "minmax") -> int:
        """Add a quantizer that has seen nothing yet, or find the one of that name; return its index.

        Args:
            name: Its name.
            bits: Its bits.
            method: How the range of a value is found.
        """
        if name in self.names:
            return self.names.index(name)
        self.names.append(name)
        self.bits.append(bits)
        self.methods.append(method)
        self.minimum = torch.cat([self.minimum, self.minimum.new_full((1,), math.inf)])
        self.maximum = torch.cat([self.maximum, self.maximum.new_full((1,), -math.inf)])
        self._grids.append(None)
        self._parameters = None
        return len(self.names) - 1

    def reset(self) -> None:
        """Forget what every quantizer has seen, and learned."""
        self.learned.clear()
        self.minimum = torch.full_like(self.minimum, math.inf)
        self.maximum = torch.full_like(self.maximum, -math.inf)
        self._pending.clear()
        self._grids = [None] * len(self.names)
        self._parameters = None

    def estimate(self, index: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the least and greatest value (0-d tensors) that quantizer ``index`` should cover for ``x``."""
        return estimate_range(x, self.methods[index], self.bits[index], self.symmetric)

    def observe(self, index: int, minimum: Tensor, maximum: Tensor) -> None:
        """Note the least and greatest value (0-d tensors) that quantizer ``index`` met; `update` takes them in."""
        self._pending.append((index, minimum.detach().float(), maximum.detach().float()))

    def pin(self, index: int, value: Tensor) -> None:
        """Let quantizer ``index`` cover just ``value``, a parameter or buffer, whatever it covered before."""
        minimum, maximum = torch.aminmax(value.detach().float())
        self.minimum[index], self.maximum[index] = minimum, maximum
        self._parameters = None
        self._grids[index] = self._grid_over(index, minimum, maximum)

    def update(self) -> None:
        """Move the averages by what was observed since the last update; across all processes where there are several.

        Raises:
            CompressionError: If an observed value is NaN or infinite (found here on the CPU, in `check` elsewhere).
        """
        if self._pending or n_processes() > 1:
            self._take_in_observations()
        if self.after_update is not None:
            self.after_update()

    def _take_in_observations(self) -> None:
        # A process whose batch was empty has seen nothing, and still meets the others below.
        device = self._pending[0][1].device if self._pending else self.minimum.device
        minimum, maximum = self.minimum.to(device), self.maximum.to(device)
        least = torch.full_like(minimum, math.inf)
        greatest = torch.full_like(maximum, -math.inf)
        if self._pending:
            indices = torch.tensor([index for index, _, _ in self._pending], device=device)
            least = least.scatter_reduce(0, indices, torch.stack([low for _, low, _ in self._pending]), "amin")
            greatest = greatest.scatter_reduce(0, indices, torch.stack([high for _, _, high in self._pending]), "amax")
        self._pending.clear()
        if n_processes() > 1:
            device = collective_device()
            least, greatest = least.to(device), greatest.to(device)
            distributed.all_reduce(least, distributed.ReduceOp.MIN)
            distributed.all_reduce(greatest, distributed.ReduceOp.MAX)
            minimum, maximum = minimum.to(device), maximum.to(device)
        self.minimum = self._averaged(minimum, least, math.inf)
        self.maximum = self._averaged(maximum, greatest, -math.inf)
        self._renew()

    def _averaged(self, average: Tensor, newest: Tensor, missing: float) -> Tensor:
        # The first observation is taken as it is, a missing one changes nothing; the other infinity is an overflow.
        moved = average + self.momentum * (newest - average)
        return torch.where(newest == missing, average, torch.where(average == missing, newest, moved))

    def grid(self, index: int) -> AffineGrid | None:
        """Return the grid of quantizer ``index``, or None if it has seen nothing yet."""
        if self._grids[index] is None and index in self.learned:
            learned = self.learned[index]
            self._grids[index] = AffineGrid(learned.step.item(), learned.zero_point, learned.bits)
        return self._grids[index]

    def learnable(self) -> list[int]:
        """Return the indices of the quantizers that are to learn their step size, have a range and do not learn yet."""
        return [
            index
            for index, method in enumerate(self.methods)
            if method == "learned" and index not in self.learned and self._grids[index] is not None
        ]

    def initial_step(self, index: int) -> Tensor:
        """Return the scale that the range of quantizer ``index`` gives, a 0-d tensor."""
        return self._compute()[0][index]

    def learn(self, index: int, step: Tensor, zero_point: int | None = None) -> None:
        """Let ``step`` be the scale of quantizer ``index`` from now on.

        Args:
            index: Which quantizer.
            step: What is trained, a 0-d tensor.
            zero_point: Its zero point, fixed from now on; by default that of its range.
        """
        if zero_point is None:
            zero_point = int(self._compute()[1][index].item())
        self.learned[index] = LearnedGrid(step, zero_point, self.bits[index])
        self._grids[index] = None

    def renew_learned(self) -> None:
        """Take over the step sizes after they were changed."""
        for index in self.learned:
            self._grids[index] = None

    def start_from(self, index: int, minimum: Tensor, maximum: Tensor) -> AffineGrid:
        """Give quantizer ``index``, which has seen nothing yet, a grid for this step from a first value's range."""
        grid = self._grids[index] = self._grid_over(index, minimum.detach(), maximum.detach())
        return grid

    def _grid_over(self, index: int, minimum: Tensor, maximum: Tensor) -> AffineGrid:
        if not (torch.isfinite(minimum) and torch.isfinite(maximum)):
            raise _not_finite(self.names[index])
        scale, zero_point = self.parameters_over(index, minimum, maximum)
        return AffineGrid(scale.item(), int(zero_point.item()), self.bits[index])

    def parameters_over(self, index: int, minimum: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and zero point (int32), as 0-d tensors, with which quantizer ``index`` covers a range.

        Args:
            index: Which quantizer.
            minimum: The least value to cover, a 0-d tensor.
            maximum: The greatest.
        """
        largest = torch.tensor([float(2 ** self.bits[index] - 1)], device=minimum.device)
        bounds = minimum.detach().view(1), maximum.detach().view(1)
        scale, zero_point = affine_parameters(*bounds, largest, self.symmetric)
        return scale[0], zero_point[0].to(torch.int32)

    def parameters(self, index: int) -> tuple[Tensor, Tensor]:
        """Return scale and zero point (int32) of quantizer ``index`` as 0-d tensors, without a wait for the device."""
        if index in self.learned:
            learned = self.learned[index]
            return learned.step.detach(), learned.zero_point_tensor
        if self._parameters is None:
            self._parameters = self._compute()
        scale, zero_point = self._parameters
        return scale[index], zero_point[index]

    def is_seen(self, index: int) -> bool:
        """Tell whether quantizer ``index`` has a grid."""
        return self._grids[index] is not None or index in self.learned

    def unseen(self) -> list[str]:
        """Return the names of the quantizers that have seen nothing yet."""
        return [name for index, name in enumerate(self.names) if not self.is_seen(index)]

    def of_one_sign(self) -> list[str]:
        """Return the names of the quantizers of one bit that have seen positive values alone, or negative ones."""
        found = self.as_dict()
        signs = [name for name, bits in zip(self.names, self.bits, strict=True) if bits == 1]
        return [name for name in signs if name in found and (found[name][0] > 0 or found[name][1] < 0)]

    def always_zero(self) -> list[str]:
        """Return the names of the quantizers that have seen data, and nothing in it but zeros."""
        return [name for name, extremes in self.as_dict().items() if extremes == (0.0, 0.0)]

    def as_dict(self) -> dict[str, tuple[float, float]]:
        """Return the averaged range of every quantizer that has seen data."""
        pairs = zip(self.names, self.minimum.tolist(), self.maximum.tolist(), strict=True)
        return {name: (low, high) for name, low, high in pairs if math.isfinite(low)}

    def state_dict(self, names: Collection[str] | None = None) -> dict[str, Any]:
        """Return names, bits, averages and the zero points of learned grids as plain types and CPU tensors.

        Args:
            names: The quantizers that it tells of; by default all.
        """
        kept = [index for index, name in enumerate(self.names) if names is None or name in names]
        return {
            "names": [self.names[index] for index in kept],
            "bits": [self.bits[index] for index in kept],
            "minimum": self.minimum.detach().cpu()[kept],
            "maximum": self.maximum.detach().cpu()[kept],
            "zero_points": {
                self.names[index]: grid.zero_point for index, grid in self.learned.items() if index in kept
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the averages of a `state_dict`, matched by name; what was learned is for `learn`.

        Raises:
            CompressionError: If the state knows a quantizer that this model lacks, or one at other bits.
        """
        _check_match(self.names, state["names"])
        for name, bits, low, high in zip(
            state["names"], state["bits"], state["minimum"], state["maximum"], strict=True
        ):
            index = self.names.index(name)
            if self.bits[index] != bits:
                raise CompressionError(
                    f"The checkpoint quantizes `{name}` to {bits} bits, this model to {self.bits[index]}. "
                    "Use the same bits as in the run that wrote it."
                )
            self.minimum[index], self.maximum[index] = low, high
        self._pending.clear()
        self.learned.clear()
        self._renew()

    def _renew(self) -> None:
        # Kept here and not at the first use: a compiled network would be compiled once more for that step.
        self._parameters = scales, zero_points = self._compute()
        seen = (~self.minimum.isinf()).tolist()
        self._grids = [
            AffineGrid(scale, int(zero_point), bits) if is_seen else None
            for scale, zero_point, bits, is_seen in zip(
                scales.tolist(), zero_points.tolist(), self.bits, seen, strict=True
            )
        ]
        self.renew_learned()
        self.check()

    def check(self) -> None:
        """Check that every range is finite.

        Raises:
            CompressionError: If one is not; the message names the quantizer.
        """
        broken = (self.minimum.isnan() | self.maximum.isnan() | self.minimum.eq(-math.inf)).logical_or_(
            self.maximum.eq(math.inf)
        )
        if broken.any():
            raise _not_finite(self.names[int(broken.nonzero()[0])])

    def _compute(self) -> tuple[Tensor, Tensor]:
        largest = torch.tensor([float(2**bits - 1) for bits in self.bits], device=self.minimum.device)
        scale, zero_point = affine_parameters(
            torch.nan_to_num(self.minimum, posinf=0.0),
            torch.nan_to_num(self.maximum, neginf=0.0),
            largest,
            self.symmetric,
        )
        return scale, zero_point.to(torch.int32)


def _check_match(names: Sequence[str], saved: Sequence[str]) -> None:
    unknown = [name for name in saved if name not in names]
    if unknown:
        raise CompressionError(
            f"The checkpoint quantizes `{unknown[0]}`, which this model does not have. "
            "Load it into the architecture, and with the `exclude`, that it was written with."
        )


def _not_finite(name: str) -> CompressionError:
    return CompressionError(
        f"The activation at `{name}` was NaN or infinite, so it has no range to quantize to. "
        "The training diverged before: lower the learning rate, clip the gradients, or check the data."
    )
