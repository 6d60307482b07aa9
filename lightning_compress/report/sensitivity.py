"""Sensitivity: what a metric loses when one layer alone is pruned or rounded, as a table, a picture and a budget."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

from lightning_compress.report.plot import import_matplotlib
from lightning_compress.unfinished import written_whole

Kind = Literal["channels", "bits"]

LARGEST_BITS = 8
"""Bits of a layer that loses too much at all fewer ones."""


@dataclass(frozen=True)
class SensitivityRow:
    """One trial: one layer, one amount.

    Args:
        name: The layer; for channels the first layer of the group that makes them.
        kind: ``"channels"`` for a share of its channels, ``"bits"`` for bits of its weights.
        amount: The share of channels that stays, in (0, 1), or the bits.
        metric: What the metric is then.
    """

    name: str
    kind: Kind
    amount: float
    metric: float


@dataclass(frozen=True)
class SensitivityReport:
    """What a metric loses, layer by layer.

    Args:
        metric: Name of the metric.
        baseline: Its value with nothing pruned or rounded.
        higher_is_better: Whether a larger value is better.
        rows: The trials.

    Example:
        >>> rows = (SensitivityRow("conv1", "channels", 0.5, 0.8), SensitivityRow("conv1", "channels", 0.75, 0.89),
        ...     SensitivityRow("fc", "bits", 4, 0.9), SensitivityRow("fc", "bits", 2, 0.4))
        >>> report = SensitivityReport("val_acc", 0.9, True, rows)
        >>> print(report.to_text())
        val_acc: 0.9000
        channels that stay    75 %     50 %
        conv1              -0.0100  -0.1000
        bits of weights          4        2
        fc                 +0.0000  -0.5000
        >>> report.channel_budget(max_drop=0.02), report.weight_bits(max_drop=0.02)
        ({'conv1': 0.75}, {'fc': {'weight_bits': 4}})
    """

    metric: str
    baseline: float
    higher_is_better: bool
    rows: tuple[SensitivityRow, ...]

    def drop(self, row: SensitivityRow) -> float:
        """Return what a trial costs in the metric; negative where it gains."""
        lost = self.baseline - row.metric
        return lost if self.higher_is_better else -lost

    def channel_budget(self, max_drop: float) -> dict[str, float]:
        """Return the least share of channels that each group may keep, for ``ChannelPruning(budget=...)``.

        Args:
            max_drop: What one group alone may cost in the metric.

        Returns:
            Shares by the group's name: the least one tried before the first that costs more; 1 where all do.
        """
        return {name: self._least(name, "channels", max_drop, 1.0) for name in self._names("channels")}

    def weight_bits(self, max_drop: float) -> dict[str, dict[str, int]]:
        """Return the fewest bits of each layer's weights, for ``QuantizationAwareTraining(overrides=...)``.

        Args:
            max_drop: What one layer alone may cost in the metric.

        Returns:
            Bits by the layer's name: the fewest tried before the first that cost more; 8 where all do.
        """
        names = self._names("bits")
        return {name: {"weight_bits": int(self._least(name, "bits", max_drop, LARGEST_BITS))} for name in names}

    def to_text(self) -> str:
        """Return the tables: one line a layer, one column an amount; what the metric changes by."""
        lines = [f"{self.metric}: {self.baseline:.4f}"]
        for kind, title in (("channels", "channels that stay"), ("bits", "bits of weights")):
            amounts = sorted({row.amount for row in self.rows if row.kind == kind}, reverse=True)
            if not amounts:
                continue
            width = max(len(title), *(len(name) for name in self._names(kind)))
            heads = [f"{100 * amount:.0f} %" if kind == "channels" else f"{amount:.0f}" for amount in amounts]
            lines.append(title.ljust(width) + "".join(head.rjust(9) for head in heads))
            for name in self._names(kind):
                found = {row.amount: row.metric for row in self.rows if (row.name, row.kind) == (name, kind)}
                cells = [f"{found[amount] - self.baseline:+.4f}" if amount in found else "" for amount in amounts]
                lines.append(name.ljust(width) + "".join(cell.rjust(9) for cell in cells))
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw what each layer costs, one line an amount, to a PNG.

        Args:
            path: The file to write.

        Raises:
            MissingExtraError: If matplotlib is not installed.
        """
        style, figure_class, canvas_class = import_matplotlib()
        kinds = [kind for kind in ("channels", "bits") if self._names(kind)]
        if not kinds:
            raise ValueError("The report holds no trials that could be drawn.")
        longest = max(len(self._names(kind)) for kind in kinds)
        with style.context("default"):
            figure = figure_class(figsize=(max(6.0, 2.0 + 0.22 * longest), 3.6 * len(kinds)), layout="constrained")
            canvas = canvas_class(figure)
            axes = figure.subplots(len(kinds), 1, squeeze=False)[:, 0]
            for axis, kind in zip(axes, kinds, strict=True):
                self._draw(axis, kind)
            with written_whole(path) as temporary:
                canvas.print_png(temporary)

    def _draw(self, axis: Any, kind: str) -> None:
        names = self._names(kind)
        for amount in sorted({row.amount for row in self.rows if row.kind == kind}, reverse=True):
            values = {row.name: row.metric for row in self.rows if (row.kind, row.amount) == (kind, amount)}
            label = f"{100 * amount:.0f} % of the channels" if kind == "channels" else f"{amount:.0f} bits"
            axis.plot(range(len(names)), [values.get(name) for name in names], "o-", markersize=3, label=label)
        axis.axhline(self.baseline, color="grey", linewidth=1, label="as it is")
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axis.set(ylabel=self.metric, title="One group pruned" if kind == "channels" else "One layer's weights rounded")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)

    def _names(self, kind: str) -> list[str]:
        return list(dict.fromkeys(row.name for row in self.rows if row.kind == kind))

    def _least(self, name: str, kind: str, max_drop: float, most: float) -> float:
        trials = sorted(
            (row for row in self.rows if (row.name, row.kind) == (name, kind)), key=lambda row: row.amount, reverse=True
        )
        least = most
        for row in trials:
            if self.drop(row) > max_drop:
                break
            least = row.amount
        return least
