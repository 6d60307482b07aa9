"""Measuring what a run gave, and telling it: counts, bytes, milliseconds, a table and a picture."""

from lightning_compress.report.latency import Latency, LatencyComparison, compare_latency
from lightning_compress.report.plot import History, plot_run
from lightning_compress.report.run_report import Metric, RunReport
from lightning_compress.report.size import FileSizes, file_sizes, size_bytes, zipped_size_bytes
from lightning_compress.report.statistics import LayerStatistics, ModelStatistics, model_statistics

__all__ = [
    "FileSizes",
    "History",
    "Latency",
    "LatencyComparison",
    "LayerStatistics",
    "Metric",
    "ModelStatistics",
    "RunReport",
    "compare_latency",
    "file_sizes",
    "model_statistics",
    "plot_run",
    "size_bytes",
    "zipped_size_bytes",
]
