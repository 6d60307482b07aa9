"""Schedules: pure functions of the optimizer step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CubicSchedule:
    """Sparsity that rises fast and then flattens (Zhu & Gupta 2017, eq. 1, arXiv:1710.01878).

    Args:
        final: Sparsity reached at ``end_step`` and kept from then on, in [0, 1].
        begin_step: Optimizer step at which the rise begins.
        end_step: Optimizer step at which ``final`` is reached; equal to ``begin_step`` for a single jump.
        initial: Sparsity before ``begin_step``, in [0, 1].

    Raises:
        ValueError: If ``begin_step`` comes after ``end_step``.

    Example:
        >>> schedule = CubicSchedule(final=0.8, begin_step=0, end_step=100)
        >>> [round(schedule(step), 2) for step in (0, 50, 100, 200)]
        [0.0, 0.7, 0.8, 0.8]
    """

    final: float
    begin_step: int
    end_step: int
    initial: float = 0.0

    def __post_init__(self) -> None:
        if self.begin_step > self.end_step:
            raise ValueError(f"`begin_step` must not come after `end_step`, got {self.begin_step} and {self.end_step}.")

    def __call__(self, step: int) -> float:
        """Return the sparsity at optimizer step ``step``."""
        if step >= self.end_step:
            return self.final
        progress = max(step - self.begin_step, 0) / (self.end_step - self.begin_step)
        return self.final + (self.initial - self.final) * (1.0 - progress) ** 3


def check_moment(name: str, moment: float) -> None:
    """Check that ``moment`` can name a point of a run: a share of it (float) or an optimizer step (int).

    Args:
        name: Name of the argument, for the message.
        moment: A float in [0, 1] or an int of at least 0.

    Raises:
        TypeError: If ``moment`` is neither a float nor an int.
        ValueError: If a share lies outside [0, 1] or a step is negative.

    Example:
        >>> check_moment("start", 0.5)
        >>> check_moment("start", 1.5)
        Traceback (most recent call last):
        ...
        ValueError: `start` as a float is a share of the run in [0, 1], got 1.5. For optimizer steps pass an int.
    """
    if isinstance(moment, bool) or not isinstance(moment, int | float):
        raise TypeError(
            f"`{name}` must be a float (share of the run) or an int (optimizer step), got {type(moment).__name__}."
        )
    if isinstance(moment, float) and not 0.0 <= moment <= 1.0:
        raise ValueError(
            f"`{name}` as a float is a share of the run in [0, 1], got {moment}. For optimizer steps pass an int."
        )
    if moment < 0:
        raise ValueError(f"`{name}` must not be negative, got {moment}.")


def check_order(first_name: str, first: float, last_name: str, last: float) -> None:
    """Check that two moments come in order, as far as that can be known before the length of the run is.

    Args:
        first_name: Name of the argument that must not come last.
        first: Its value: share (float) or optimizer step (int).
        last_name: Name of the argument that must not come first.
        last: Its value.

    Raises:
        ValueError: If both are shares or both are steps, and ``first`` is greater.

    Example:
        >>> check_order("start", 0.2, "end", 0.6)
        >>> check_order("start", 0.2, "end", 100)
        >>> check_order("start", 0.7, "end", 0.6)
        Traceback (most recent call last):
        ...
        ValueError: `start` must not come after `end`, got start=0.7 and end=0.6.
    """
    if isinstance(first, float) == isinstance(last, float) and first > last:
        raise ValueError(
            f"`{first_name}` must not come after `{last_name}`, got {first_name}={first} and {last_name}={last}."
        )


def resolve_step(name: str, moment: float, total_steps: int | None) -> int:
    """Turn a share of the run into an optimizer step; an int stays what it is.

    Args:
        name: Name of the argument, for the message.
        moment: A share in [0, 1] (float) or an optimizer step (int).
        total_steps: Optimizer steps of the whole run, or None where the run has no known end.

    Returns:
        The optimizer step.

    Raises:
        ValueError: If ``moment`` is a share and the run has no known end.

    Example:
        >>> resolve_step("start", 0.25, total_steps=200), resolve_step("start", 30, total_steps=None)
        (50, 30)
    """
    if isinstance(moment, int):
        return moment
    if total_steps is None:
        raise ValueError(
            f"`{name}={moment}` is a share of the run, but this run has no known end. "
            f"Pass `{name}` as an int (optimizer steps), or give the Trainer `max_steps` or a finite `max_epochs`."
        )
    return round(moment * total_steps)
