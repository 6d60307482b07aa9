"""The report of a run: everything that was measured, as plain JSON and as a table for the terminal."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from numbers import Integral, Real
from os import PathLike
from textwrap import wrap
from typing import Any, TypeVar

from lightning_compress.report.archived import STAGES, ArchivedNetwork, ArchivedTensor
from lightning_compress.report.cpu import cpu_name
from lightning_compress.report.figures import (
    format_bytes,
    format_count,
    format_ms,
    format_reduction,
    format_share,
    format_speedup,
)
from lightning_compress.report.latency import Latency, LatencyComparison
from lightning_compress.report.size import FileSizes
from lightning_compress.report.statistics import LayerStatistics, ModelStatistics
from lightning_compress.unfinished import written_whole

_WIDTH = 80
_LABEL_WIDTH = 30
_INDENT = "  "
_NAMES_SHOWN = 6
_NON_FINITE = ("nan", "inf", "-inf")

T = TypeVar("T")


@dataclass(frozen=True)
class Metric:
    """One metric of a run at up to three places.

    Args:
        name: Name of the metric.
        before: Value of the uncompressed model, or None where not known.
        after: Value of the compressed model in torch, or None where not known.
        onnxruntime: Value of the exported file in ONNX Runtime, or None where not known.
    """

    name: str
    before: float | None = None
    after: float | None = None
    onnxruntime: float | None = None


@dataclass(frozen=True)
class RunReport:
    """What a run gave; whatever was not measured is None and left out of the table.

    Args:
        model: Name of the model.
        versions: Versions of the libraries by name, such as ``{"torch": "2.14.0"}``.
        cpu: Name of the processor.
        statistics: Counts of the compressed model.
        sizes: Bytes of the exported file.
        archive: What the archive of the same run takes.
        latency: Times in ONNX Runtime.
        metrics: Metrics before and after.
        parity: Differences between the trained model and the exported file, by name; text is shown as it is.
        integer_ops: How often each integer operator is in ONNX Runtime's optimized graph.
        float_ops: Operators that stayed in float, by name, each with the reason.
        notes: Further sentences for the end of the table.

    Example:
        >>> report = RunReport("Net", {"torch": "2.14.0"}, cpu="a CPU", sizes=FileSizes(312_000, 100_000, 1_090_000))
        >>> print(report.to_text())
        ================================================================================
        Net: compression report
        ================================================================================
        Files
          fp32 ONNX                     1.09 MB
          this ONNX                     312 kB      3.5x smaller
          this ONNX, zipped             100 kB      10.9x smaller
        <BLANKLINE>
        a CPU
        torch 2.14.0
        >>> RunReport.from_dict(report.to_dict()) == report
        True
    """

    model: str
    versions: Mapping[str, str] = field(default_factory=dict)
    cpu: str = field(default_factory=cpu_name)
    statistics: ModelStatistics | None = None
    sizes: FileSizes | None = None
    archive: ArchivedNetwork | None = None
    latency: LatencyComparison | None = None
    metrics: tuple[Metric, ...] = ()
    parity: Mapping[str, float | int | str] | None = None
    integer_ops: Mapping[str, int] | None = None
    float_ops: Mapping[str, str] | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the report in plain JSON types.

        Sparsities and speed-ups are written out for readers; NaN and infinite numbers become the strings ``"nan"``,
        ``"inf"`` and ``"-inf"``, which JSON has no numbers for.

        Returns:
            A dict of dicts, lists, strings, numbers, booleans and None.

        Raises:
            TypeError: If the report holds something that JSON has no type for.
        """
        plain: dict[str, Any] = as_json(self)
        if self.statistics is not None:
            plain["statistics"]["sparsity"] = self.statistics.sparsity
            for row, layer in zip(plain["statistics"]["layers"], self.statistics.layers, strict=True):
                row["sparsity"] = layer.sparsity
        if self.latency is not None:
            for row, latency in zip(plain["latency"]["rows"], self.latency.rows, strict=True):
                row["speedup"] = as_json(self.latency.speedup(latency.file, latency.batch_size))
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> RunReport:
        """Return the report that :meth:`to_dict` was called on.

        Args:
            plain: What :meth:`to_dict` returned, also after a trip through JSON.

        Returns:
            An equal report.

        Raises:
            KeyError: If a part is missing.
        """
        statistics, latency, sizes = plain["statistics"], plain["latency"], plain["sizes"]
        archive = plain.get("archive")  # reports of before have none
        return _rebuilt(
            cls,
            plain,
            statistics=statistics and _rebuilt(ModelStatistics, statistics, layers=_layers(statistics["layers"])),
            sizes=sizes and _rebuilt(FileSizes, sizes),
            archive=archive and _rebuilt(ArchivedNetwork, archive, tensors=_tensors(archive["tensors"])),
            latency=latency
            and _rebuilt(LatencyComparison, latency, rows=tuple(_rebuilt(Latency, row) for row in latency["rows"])),
            metrics=tuple(_rebuilt(Metric, metric) for metric in plain["metrics"]),
            parity=plain["parity"] and {name: _number(value) for name, value in plain["parity"].items()},
            notes=tuple(plain["notes"]),
        )

    def write_json(self, path: str | PathLike[str]) -> None:
        """Write the report as JSON, under a temporary name first so that no half file is ever seen.

        Args:
            path: The file to write; its folder is made where missing.

        Raises:
            OSError: If the file cannot be written.
            TypeError: If the report holds something that JSON has no type for.
        """
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        with written_whole(path) as temporary:
            temporary.write_text(f"{text}\n", encoding="utf-8")

    def to_text(self) -> str:
        """Return the report as a table for a terminal, at most 80 columns of plain ASCII around the given names."""
        sections = (
            _model_section(self.statistics),
            _file_section(self.sizes),
            _archive_section(self.archive),
            _latency_section(self.latency),
            _metric_section(self.metrics),
            _parity_section(self.parity),
            _audit_section(self.integer_ops, self.float_ops),
            _zeros_section(self.statistics, self.notes),
            _machine_section(self),
        )
        title = ["=" * _WIDTH, *_wrapped(f"{self.model}: compression report"), "=" * _WIDTH]
        return "\n".join([*title, "\n\n".join("\n".join(lines) for lines in sections if lines)])


def _model_section(statistics: ModelStatistics | None) -> list[str]:
    if statistics is None:
        return []
    layers_by_bits = sorted(Counter(layer.bits for layer in statistics.layers).items())
    bits = [f"{bits} bits in {n_layers} layer{'s' * (n_layers > 1)}" for bits, n_layers in layers_by_bits]
    return [
        "Model",
        _row("parameters", format_count(statistics.parameters)),
        _row("  of them not zero", format_count(statistics.nonzeros)),
        _row("conv and linear weights", format_count(statistics.weight_parameters)),
        _row("  of them not zero", format_count(statistics.weight_nonzeros)),
        _row("  sparsity", format_share(statistics.sparsity)),
        *([_row("  stored with", ", ".join(bits))] if bits else []),
        _row("multiply-accumulates", f"{format_count(statistics.macs)} per sample"),
    ]


def _file_section(sizes: FileSizes | None) -> list[str]:
    if sizes is None:
        return []
    reference = sizes.float_onnx_bytes
    rows = {"fp32 ONNX": reference, "this ONNX": sizes.onnx_bytes, "this ONNX, zipped": sizes.zipped_bytes}
    return [
        "Files",
        *(
            _row(
                label,
                format_bytes(size),
                format_reduction(reference, size) if reference and label != "fp32 ONNX" else "",
            )
            for label, size in rows.items()
            if size is not None
        ),
    ]


def _archive_section(archive: ArchivedNetwork | None) -> list[str]:
    if archive is None:
        return []
    return [
        "Archive",
        _row(archive.file, format_bytes(archive.file_bytes), format_reduction(archive.dense_bytes, archive.file_bytes)),
        *(_row(f"  bits of a weight, {stage}", f"{archive.bits(stage):.2f}") for stage in STAGES),
        _row("  entropy", f"{archive.bits('bound'):.2f}"),
    ]


def _latency_section(latency: LatencyComparison | None) -> list[str]:
    if latency is None or not latency.rows:
        return []
    lines = ["Latency in ONNX Runtime", _row("", "median", "10th - 90th percentile")]
    for row in latency.rows:
        reference = next(other for other in latency.rows if other.batch_size == row.batch_size)
        speed = "" if row is reference else format_speedup(latency.speedup(row.file, row.batch_size))
        spread = f"{format_ms(row.p10_ms).removesuffix(' ms')} - {format_ms(row.p90_ms)}"
        lines.append(_row(f"batch {row.batch_size}, {row.file}", format_ms(row.median_ms), f"{spread:<22}  {speed}"))
    vnni = {True: " with VNNI", False: " without VNNI", None: ""}[latency.vnni]
    rounds = " / ".join(dict.fromkeys(str(row.rounds) for row in latency.rows))
    threads = f"{latency.threads} thread{'s' * (latency.threads > 1)}"
    return [*lines, *_wrapped(f"{latency.cpu}{vnni}, {threads}, {rounds} interleaved rounds", _INDENT)]


def _metric_section(metrics: Sequence[Metric]) -> list[str]:
    if not metrics:
        return []
    rows = [_row(metric.name, *map(_value, (metric.before, metric.after, metric.onnxruntime))) for metric in metrics]
    return ["Metric", _row("", "before", "after", "in ONNX Runtime"), *rows]


def _parity_section(parity: Mapping[str, float | int | str] | None) -> list[str]:
    if not parity:
        return []
    return ["Parity of torch and ONNX Runtime", *(_row(name, _value(value)) for name, value in parity.items())]


def _audit_section(integer_ops: Mapping[str, int] | None, float_ops: Mapping[str, str] | None) -> list[str]:
    if integer_ops is None and float_ops is None:
        return []
    counts = ", ".join(f"{count} {name}" for name, count in (integer_ops or {}).items())
    names_by_reason: dict[str, list[str]] = {}
    for name, reason in (float_ops or {}).items():
        names_by_reason.setdefault(reason, []).append(name)
    lines = ["Operators in ONNX Runtime", *_wrapped(_row("integer", counts or "none"), hanging=True)]
    if not names_by_reason:
        return [*lines, _row("float", "none")]
    for reason, names in names_by_reason.items():
        lines += _wrapped(_row("float", f"{_some(names)}: {reason}"), hanging=True)
    return lines


def _zeros_section(statistics: ModelStatistics | None, notes: Iterable[str]) -> list[str]:
    lines: list[str] = []
    if statistics is not None and statistics.sparsity > 0:
        lines += _wrapped(
            "Unstructured zeros do not speed up ONNX Runtime: it multiplies by them like by any other weight. "
            f"The zeros here ({format_share(statistics.sparsity)} of the conv and linear weights) "
            "only make the zipped file smaller."
        )
    return [*lines, *(line for note in notes for line in _wrapped(note))]


def _machine_section(report: RunReport) -> list[str]:
    # The latency section names the processor where there is one.
    cpu = _wrapped(report.cpu) if report.latency is None or not report.latency.rows else []
    return [*cpu, *_wrapped(", ".join(f"{name} {version}" for name, version in report.versions.items()))]


def _row(label: str, *cells: str) -> str:
    first, *others = cells
    line = f"{_INDENT}{label:<{_LABEL_WIDTH - 2}}"
    # A label that is too long pushes its cells to the right, never into itself.
    line += "" if line.endswith(" ") else "  "
    return f"{line}{first:<12}{''.join(f'{cell:<12}' for cell in others)}".rstrip()


def _wrapped(text: str, indent: str = "", *, hanging: bool = False) -> list[str]:
    if hanging and len(text) <= _WIDTH:
        return [text]
    if hanging:
        label, rest = text[:_LABEL_WIDTH], text[_LABEL_WIDTH:]
        return wrap(rest, _WIDTH, initial_indent=label, subsequent_indent=" " * _LABEL_WIDTH, break_on_hyphens=False)
    return wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    return f"{shown} and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else shown


def _value(value: float | int | str | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def as_json(value: object) -> Any:
    """Return a value in plain JSON types; NaN and infinite numbers become strings.

    Raises:
        TypeError: If JSON has no type for it.

    Example:
        >>> as_json({"range": (0.0, math.inf)})
        {'range': [0.0, 'inf']}
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else str(float(value))
    if is_dataclass(value):
        return {entry.name: as_json(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): as_json(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(entry) for entry in value]
    raise TypeError(f"A report holds numbers and text, got a {type(value).__name__}. Convert it to a float or a str.")


def _rebuilt(kind: type[T], plain: Mapping[str, Any], **parts: Any) -> T:
    entries = [entry for entry in fields(kind) if entry.name not in parts]  # type: ignore[arg-type]
    values = {
        entry.name: _number(plain[entry.name]) if "float" in str(entry.type) else plain[entry.name] for entry in entries
    }
    return kind(**values, **parts)


def _layers(rows: Iterable[Mapping[str, Any]]) -> tuple[LayerStatistics, ...]:
    return tuple(_rebuilt(LayerStatistics, row, shape=tuple(row["shape"])) for row in rows)


def _tensors(rows: Iterable[Mapping[str, Any]]) -> tuple[ArchivedTensor, ...]:
    return tuple(
        _rebuilt(ArchivedTensor, row, shape=tuple(row["shape"]), codebook=tuple(map(_number, row["codebook"])))
        for row in rows
    )


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) and value in _NON_FINITE else value
