"""One picture of stored weights: bits of every stage, and which values the weights of each layer have."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from lightning_compress.report.archived import STAGES, ArchivedTensor
from lightning_compress.report.plot import COLOURS, end_of, import_matplotlib, start_of
from lightning_compress.unfinished import written_whole

MOST_LAYERS = 12
"""Layers that are drawn: those with the most weights."""

_SIZE_INCHES = (13.0, 8.0)
_COLUMNS = 3
_BINS = 101


def plot_weights(
    tensors: Sequence[ArchivedTensor], values: Mapping[str, Tensor], path: str | PathLike[str], title: str
) -> None:
    r"""Draw the weights of an archive into one PNG.

    On the left the bits of a weight after every stage, with the entropy as a line; on the right, for each layer, how
    often each value of its codebook comes, or a histogram where there is none. Zeros are told in the title, not drawn.

    Args:
        tensors: What each tensor takes; those of at least two dimensions are drawn, the largest of them.
        values: The tensors themselves, by name.
        path: The PNG to write, under a temporary name first.
        title: Title of the picture.

    Raises:
        MissingExtraError: If matplotlib is not installed.
        OSError: If the file cannot be written.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> weight = torch.tensor([[0.0, 1.0], [0.0, -1.0]])
        >>> tensor = ArchivedTensor("fc.weight", (2, 2), "sparse shared", 4, 2, 32.0, 17.0, 6.0, 4.0, 3.0, (-1.0, 1.0))
        >>> with TemporaryDirectory() as folder:
        ...     plot_weights([tensor], {"fc.weight": weight}, f"{folder}/weights.png", "A net")
        ...     Path(folder, "weights.png").read_bytes()[:4]
        b'\x89PNG'
    """
    style, figure_class, canvas_class = import_matplotlib()
    layers = [tensor for tensor in tensors if len(tensor.shape) > 1]
    largest = sorted(sorted(layers, key=lambda layer: -layer.entries)[:MOST_LAYERS], key=layers.index)
    with style.context("default"):
        figure = figure_class(figsize=_SIZE_INCHES, dpi=100, layout="constrained")
        canvas = canvas_class(figure)
        figure.suptitle(start_of(title, 90), fontsize=14, fontweight="bold", parse_math=False)
        stages, histograms = figure.subfigures(1, 2, width_ratios=(1.0, 1.7), wspace=0.03)
        _draw_stages(stages.subplots(), largest)
        n_rows = max(math.ceil(len(largest) / _COLUMNS), 1)
        panels = histograms.subplots(n_rows, min(max(len(largest), 1), _COLUMNS), squeeze=False).flatten()
        for panel in panels[len(largest) :]:
            panel.set_axis_off()
        for panel, layer in zip(panels, largest, strict=False):
            _draw_values(panel, layer, values[layer.name])
        with written_whole(path) as temporary:
            canvas.print_png(temporary)


def _draw_stages(axis: Any, layers: Sequence[ArchivedTensor]) -> None:
    height = 0.8 / len(STAGES)
    for number, stage in enumerate(STAGES):
        rows = [row + (number - 1.5) * height for row in range(len(layers))]
        bars = axis.barh(rows, [getattr(layer, stage) for layer in layers], height, color=COLOURS[number], label=stage)
        axis.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
    for row, layer in enumerate(layers):
        label = "entropy" if row == 0 else None
        axis.plot([layer.bound] * 2, [row - 0.45, row + 0.45], color="black", linewidth=1.2, linestyle=":", label=label)
    labels = [f"{end_of(layer.name, 26)}\n{layer.form}" for layer in layers]
    axis.set_yticks(range(len(layers)), labels, fontsize=8, parse_math=False)
    axis.invert_yaxis()
    axis.set(title="Bits of a weight", xlabel="bits", xlim=(0, 38))
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    if layers:
        axis.legend(loc="lower right", fontsize=8)
    else:
        axis.text(0.5, 0.5, "no layers", transform=axis.transAxes, ha="center", va="center", color="gray")


def _draw_values(axis: Any, layer: ArchivedTensor, weight: Tensor) -> None:
    flat = weight.detach().float().cpu().flatten()
    flat = flat[(flat != 0) & flat.isfinite()]
    zeros = 100 * (1 - layer.nonzeros / max(layer.entries, 1))
    book = torch.tensor([value for value in layer.codebook if math.isfinite(value)])
    if len(book):
        counts = torch.bincount(torch.searchsorted(book, flat).clamp_max(len(book) - 1), minlength=len(book))
        axis.vlines(book.tolist(), 0, counts.tolist(), color=COLOURS[0], linewidth=2 if len(book) <= 32 else 1)
        axis.set_ylim(bottom=0)
        told = f"{len(book)} values"
    elif flat.numel():
        low, high = flat.min().item(), flat.max().item()
        counts = torch.histc(flat, _BINS, low, high)
        places = torch.linspace(low, high, _BINS)
        axis.fill_between(places.tolist(), counts.tolist(), color=COLOURS[0], step="mid", linewidth=0)
        told = "many values" if weight.is_floating_point() else "integers"
    else:
        told = "no values"
    axis.set_title(f"{end_of(layer.name, 26)}\n{told}, {zeros:.0f} % zeros", fontsize=8, parse_math=False)
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)
