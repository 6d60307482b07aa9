"""Annealing: a weight or a temperature that changes over the run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from lightning_compress.schedules import check_moment, check_order, resolve_step

Shape = Literal["linear", "cosine"]


@dataclass(frozen=True)
class Annealing:
    """A number that goes from ``initial`` to ``final`` between two moments of the run, and stays there.

    A warm-up is ``Annealing(0.0, 0.7, end=0.1)``; a teacher that is needed less and less ``Annealing(0.7, 0.0)``.

    Args:
        initial: Its value up to ``start``.
        final: Its value from ``end`` on.
        start: When it begins to change: a share of the run (float) or optimizer steps (int).
        end: When it has changed: a share of the run (float) or optimizer steps (int).
        shape: ``"linear"``, or ``"cosine"`` for half a wave, slow at both ends (Loshchilov & Hutter 2017,
            arXiv:1608.03983, equation 5).

    Raises:
        ValueError: If a value is not finite, a moment is out of range, or ``shape`` is unknown.
        TypeError: If a moment is neither a float nor an int.

    Example:
        >>> annealing = Annealing(0.0, 1.0, start=10, end=0.5)
        >>> [annealing.at(step, total_steps=100) for step in (0, 10, 30, 50, 90)]
        [0.0, 0.0, 0.5, 1.0, 1.0]
        >>> round(Annealing(1.0, 0.0, shape="cosine").at(25, total_steps=100), 3)
        0.854
    """

    initial: float
    final: float
    start: int | float = 0.0
    end: int | float = 1.0
    shape: Shape = "linear"

    def __post_init__(self) -> None:
        for name, value in (("initial", self.initial), ("final", self.final)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"`{name}` must be a finite number, got {value!r}.")
        check_moment("start", self.start)
        check_moment("end", self.end)
        check_order("start", self.start, "end", self.end)
        if self.shape not in get_args(Shape):
            raise ValueError(f"`shape` must be one of {', '.join(get_args(Shape))}, got {self.shape!r}.")

    def at(self, step: int, total_steps: int | None) -> float:
        """Return the value at an optimizer step.

        Args:
            step: Optimizer steps completed so far.
            total_steps: Those of the whole run, or None where the run has no known end.

        Raises:
            ValueError: If a moment is a share and the run has no known end.
        """
        begin, end = (resolve_step(name, getattr(self, name), total_steps) for name in ("start", "end"))
        if step >= end:
            return self.final
        progress = max(step - begin, 0) / (end - begin) if end > begin else 0.0
        if self.shape == "cosine":
            progress = (1.0 - math.cos(math.pi * progress)) / 2.0
        return self.initial + (self.final - self.initial) * progress
