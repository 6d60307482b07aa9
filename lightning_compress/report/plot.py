"""One picture of a run: losses, sparsity, quantization phase and metrics over steps, sparsity and bits per layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

from lightning_compress.errors import MissingExtraError
from lightning_compress.report.statistics import LayerStatistics
from lightning_compress.unfinished import written_whole

LOSSES = {"train_loss": "training loss", "distillation_loss": "distillation loss"}
"""Series of a :class:`History` that are drawn as losses, with their labels."""

PHASES = {1: "observing ranges", 2: "quantized", 3: "quantized, frozen"}
"""Labels of the quantization phases; 0 is plain float."""

_SIZE_INCHES = (12.0, 9.0)
_DPI = 100
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito: colour-blind safe
"""Colours of lines and bars."""

_PHASE_COLOURS = {1: "#FFF3D6", 2: "#DCEBF7", 3: "#C3D9EE"}
_SMOOTHED_POINTS = 60
_NAMES_SHOWN = 60
_LABELLED_BARS = 40
_FEW_LAYERS = 10
_NAME_CHARACTERS = 28
_TITLE_CHARACTERS = 90


@dataclass
class _Series:
    """Every ``stride``-th point of a series, and its last one."""

    stride: int = 1
    seen: int = 0
    kept: list[tuple[int, float]] = field(default_factory=list)
    last: tuple[int, float] | None = None

    def append(self, point: tuple[int, float], max_points: int) -> None:
        if self.seen % self.stride == 0:
            self.kept.append(point)
        self.seen += 1
        self.last = point
        if len(self.kept) >= max_points:
            self.kept = self.kept[::2]
            self.stride *= 2

    def points(self) -> list[tuple[int, float]]:
        if self.last is None or (self.seen - 1) % self.stride == 0:
            return list(self.kept)
        return [*self.kept, self.last]


@dataclass
class History:
    """What a run logged over its optimizer steps, thinned evenly so that no run is too long for it.

    Each series is thinned on its own: a metric that comes once an epoch loses nothing to a loss that comes every
    step. The first and the last point are always there. ``"train_loss"``, ``"distillation_loss"``, ``"sparsity"``
    (a fraction in [0, 1]) and ``"phase"`` (0 float, 1 observing, 2 quantized, 3 frozen) have their places in
    :func:`plot_run`; every other name is a metric.

    Args:
        max_points: Points of a series that are kept at most, at least 2.

    Raises:
        ValueError: If ``max_points`` is below 2.

    Example:
        >>> history = History(max_points=4)
        >>> for step in range(10):
        ...     history.append(step, sparsity=step / 10)
        >>> history.series("sparsity")
        [(0, 0.0), (4, 0.4), (8, 0.8), (9, 0.9)]
        >>> resumed = History(max_points=4)
        >>> resumed.load_state_dict(history.state_dict())
        >>> resumed == history
        True
    """

    max_points: int = 2000
    _series: dict[str, _Series] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.max_points < 2:
            raise ValueError(f"`max_points` must be at least 2, got {self.max_points}.")

    def append(self, step: int, **values: float | None) -> None:
        """Add what was logged at an optimizer step.

        Args:
            step: Optimizer step.
            **values: Value of each series; None is left out, NaN makes a gap in the picture.
        """
        for name, value in values.items():
            if value is not None:
                self._series.setdefault(name, _Series()).append((int(step), float(value)), self.max_points)

    def names(self) -> list[str]:
        """Return the names of the series, in the order in which they first came."""
        return list(self._series)

    def series(self, name: str) -> list[tuple[int, float]]:
        """Return the kept points of a series.

        Args:
            name: Name of the series.

        Returns:
            Pairs of optimizer step and value; empty for a name that never came.
        """
        return self._series.get(name, _Series()).points()

    def state_dict(self) -> dict[str, Any]:
        """Return the history in plain types, so that it can travel in a checkpoint."""
        return {
            name: {
                "stride": series.stride,
                "seen": series.seen,
                "steps": [step for step, _ in series.kept],
                "values": [value for _, value in series.kept],
                "last": None if series.last is None else list(series.last),
            }
            for name, series in self._series.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; what was in this history is dropped.

        Args:
            state: What :meth:`state_dict` returned.
        """
        self._series = {
            name: _Series(
                stride=entry["stride"],
                seen=entry["seen"],
                kept=list(zip(entry["steps"], entry["values"], strict=True)),
                last=None if entry["last"] is None else (entry["last"][0], entry["last"][1]),
            )
            for name, entry in state.items()
        }


def plot_run(history: History, layers: Sequence[LayerStatistics], path: str | PathLike[str], title: str) -> None:
    r"""Draw a run into one PNG of 1200 x 900 pixels.

    On the left, over optimizer steps: losses, sparsity and, where there are any, metrics, with the quantization
    phases shaded. On the right, one bar per layer: its sparsity and its bits. Neither pyplot nor the user's
    backend is touched.

    Args:
        history: What was logged over the run.
        layers: One entry per layer, drawn from top to bottom.
        path: The PNG to write, under a temporary name first; its folder is made where missing.
        title: Title of the picture.

    Raises:
        MissingExtraError: If matplotlib is not installed.
        OSError: If the file cannot be written.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> history = History()
        >>> history.append(0, train_loss=2.3, sparsity=0.0, phase=0)
        >>> history.append(10, train_loss=0.4, sparsity=0.8, phase=2)
        >>> with TemporaryDirectory() as folder:
        ...     plot_run(history, [LayerStatistics("fc", "Linear", (2, 5), 10, 2, 8)], f"{folder}/run.png", "A run")
        ...     Path(folder, "run.png").read_bytes()[:4]
        b'\x89PNG'
    """
    style, figure_class, canvas_class = import_matplotlib()
    # The user's rc settings must neither spoil the picture nor be changed by it; a style never holds the backend.
    with style.context("default"):
        figure = figure_class(figsize=_SIZE_INCHES, dpi=_DPI, layout="constrained")
        canvas = canvas_class(figure)
        figure.suptitle(start_of(title, _TITLE_CHARACTERS), fontsize=14, fontweight="bold", parse_math=False)
        over_steps, per_layer = figure.subfigures(1, 2, width_ratios=(1.3, 1.0), wspace=0.03)
        _draw_steps(over_steps, history)
        _draw_layers(per_layer, layers)
        with written_whole(path) as temporary:
            canvas.print_png(temporary)


def _draw_steps(figure: Any, history: History) -> None:
    metrics = [name for name in history.names() if name not in {*LOSSES, "sparsity", "phase"}]
    axes = list(figure.subplots(3 if metrics else 2, 1, sharex=True))
    for name, label, colour in zip(LOSSES, LOSSES.values(), COLOURS, strict=False):
        _draw_series(axes[0], history.series(name), label, colour, smoothed=True)
    axes[0].set(title="Losses", ylabel="loss")
    _draw_series(axes[1], [(step, 100 * value) for step, value in history.series("sparsity")], "sparsity", COLOURS[2])
    axes[1].set(title="Sparsity and quantization phase", ylabel="zeros (% of weights)", ylim=(-3, 103))
    for position, name in enumerate(metrics):
        _draw_series(axes[-1], history.series(name), name, COLOURS[position % len(COLOURS)])
    if metrics:
        axes[-1].set(title="Metrics", ylabel="value")
    for axis in axes:
        _shade_phases(axis, history.series("phase"), labelled=axis is axes[1])
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        _add_legend(axis, _free_corner(history.series("sparsity")) if axis is axes[1] else "best")
    steps = {step for name in history.names() for step, _ in history.series(name)}
    if len(steps) == 1:
        axes[-1].set_xlim(min(steps) - 1, min(steps) + 1)
    axes[-1].set_xlabel("optimizer step")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)


def _draw_series(
    axis: Any, points: Sequence[tuple[int, float]], label: str, colour: str, *, smoothed: bool = False
) -> None:
    if not points:
        return
    steps, values = zip(*points, strict=True)
    if len(points) < _SMOOTHED_POINTS or not smoothed:
        # Points between gaps have no line to be seen by, so short series get markers.
        marker = "o" if len(points) < _SMOOTHED_POINTS else None
        axis.plot(steps, values, color=colour, label=label, linewidth=1.8, marker=marker, markersize=4)
        return
    axis.plot(steps, values, color=colour, linewidth=0.8, alpha=0.25)
    axis.plot(steps, _moving_average(values), color=colour, label=f"{label} (smoothed)", linewidth=1.8)


def _moving_average(values: Sequence[float]) -> list[float]:
    half_width = max(1, len(values) // 100)
    windows = (values[max(0, i - half_width) : i + half_width + 1] for i in range(len(values)))
    finite_windows = ([value for value in window if math.isfinite(value)] for window in windows)
    averages = (sum(window) / len(window) if window else math.nan for window in finite_windows)
    return [average if math.isfinite(value) else math.nan for average, value in zip(averages, values, strict=True)]


def _shade_phases(axis: Any, points: Sequence[tuple[int, float]], *, labelled: bool) -> None:
    labels = dict(PHASES) if labelled else {}
    for start, end, phase in _spans(points):
        # A label is taken out when used: a phase that comes twice has one entry in the legend.
        axis.axvspan(start, end, color=_PHASE_COLOURS[phase], label=labels.pop(phase, None), linewidth=0, zorder=0)


def _spans(points: Sequence[tuple[int, float]]) -> Iterator[tuple[int, int, int]]:
    changes = [
        (step, int(phase))
        for position, (step, phase) in enumerate(points)
        if math.isfinite(phase) and (position == 0 or phase != points[position - 1][1])
    ]
    ends = [*changes[1:], (points[-1][0], 0)] if changes else []
    for (start, phase), (end, _) in zip(changes, ends, strict=True):
        if phase in _PHASE_COLOURS and end > start:
            yield start, end, phase


def _add_legend(axis: Any, loc: str) -> None:
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc=loc, fontsize=9, framealpha=0.9)
    if not axis.lines:
        axis.text(0.5, 0.5, "nothing logged", transform=axis.transAxes, ha="center", va="center", color="gray")


def _free_corner(sparsity: Sequence[tuple[int, float]]) -> str:
    # Sparsity rises to the right; shading keeps matplotlib's own "best" from seeing that.
    return "lower right" if sparsity and sparsity[-1][1] > 0.5 else "upper right"


def _draw_layers(figure: Any, layers: Sequence[LayerStatistics]) -> None:
    sparsity, bits = figure.subplots(1, 2, sharey=True, width_ratios=(1.5, 1.0))
    rows = range(len(layers))
    thickness = 0.75 * min(1.0, len(layers) / _FEW_LAYERS)
    bars_by_axis = {
        sparsity: sparsity.barh(rows, [100 * layer.sparsity for layer in layers], thickness, color=COLOURS[2]),
        bits: bits.barh(rows, [layer.bits for layer in layers], thickness, color=COLOURS[0]),
    }
    sparsity.set(title="Sparsity per layer", xlabel="zeros (% of weights)", xlim=(0, 120), xticks=range(0, 101, 25))
    bits.set(title="Bits per layer", xlabel="bits per weight", xlim=(0, 40), xticks=(0, 8, 16, 32))
    if len(layers) <= _LABELLED_BARS:
        for axis, bars in bars_by_axis.items():
            axis.bar_label(bars, fmt="%.0f", padding=3, fontsize=8)
    for axis in (sparsity, bits):
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    bits.tick_params(axis="y", length=0)
    every = max(1, math.ceil(len(layers) / _NAMES_SHOWN))
    sparsity.set_yticks(
        rows[::every],
        labels=[end_of(layer.name or layer.kind, _NAME_CHARACTERS) for layer in layers[::every]],
        fontsize=min(10.0, max(6.5, 400 / max(1, len(layers)))),
        parse_math=False,
    )
    sparsity.set_ylim(max(1, len(layers)) - 0.4, -0.6)  # the first layer is on top
    if not layers:
        sparsity.text(0.5, 0.5, "no layers", transform=sparsity.transAxes, ha="center", va="center", color="gray")


def start_of(text: str, n_characters: int) -> str:
    """Return ``text``, cut at its end to fit.

    Example:
        >>> start_of("classifier", 8)
        'class...'
    """
    return text if len(text) <= n_characters else f"{text[: n_characters - 3]}..."


def end_of(text: str, n_characters: int) -> str:
    """Return the name of a layer, cut at its beginning to fit.

    Example:
        >>> end_of("features.12.conv", 12)
        '...12.conv'
    """
    # Layers differ in the end of their names: the start is what they share.
    if len(text) <= n_characters:
        return text
    end = text[2 - n_characters :]
    # Cut at a dot where there is one: `...2.conv` must not stand for `layer.12.conv`.
    return f"...{end.partition('.')[2] or end[1:]}"


def import_matplotlib() -> tuple[Any, Any, Any]:
    """Return matplotlib's styles, figure and canvas.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    try:
        from matplotlib import style
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            "Drawing a run needs matplotlib, which is not installed. "
            'Install it with `pip install "lightning_compress[plots]"`.'
        ) from error
    return style, Figure, FigureCanvasAgg
