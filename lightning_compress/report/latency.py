"""Latency of ONNX files in ONNX Runtime, measured interleaved so that a busy machine slows all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_compress.errors import MissingExtraError
from lightning_compress.report.cpu import available_cpus, cpu_name, has_vnni

MIN_ROUNDS = 5
"""Rounds that are measured even where the time budget is spent."""

_WARMUP_ROUNDS = 3

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Latency:
    """Time of one run of one file at one batch size.

    Args:
        file: Name of the file, as given by the caller.
        batch_size: Samples per run.
        median_ms: Median over the rounds, in milliseconds per run (not per sample).
        p10_ms: 10th percentile, in milliseconds.
        p90_ms: 90th percentile, in milliseconds.
        rounds: Measured runs.
    """

    file: str
    batch_size: int
    median_ms: float
    p10_ms: float
    p90_ms: float
    rounds: int


@dataclass(frozen=True)
class LatencyComparison:
    """Times of several files on one machine, the first file being what the others are compared with.

    Args:
        rows: One row per batch size and file, in the order they were asked for.
        cpu: Name of the processor.
        vnni: Whether the processor has VNNI, None where unknown.
        threads: Threads of each run.
        onnxruntime: Version of ONNX Runtime.
    """

    rows: tuple[Latency, ...]
    cpu: str
    vnni: bool | None
    threads: int
    onnxruntime: str

    def speedup(self, file: str, batch_size: int) -> float:
        """Return the first file's median over that of ``file``: above 1 is faster.

        Args:
            file: Name of a file.
            batch_size: A batch size that was measured.

        Returns:
            The ratio of the medians.

        Raises:
            KeyError: If that file was not measured at that batch size.

        Example:
            >>> slow = Latency("fp32", 1, median_ms=3.0, p10_ms=2.9, p90_ms=3.2, rounds=50)
            >>> fast = Latency("int8", 1, median_ms=1.5, p10_ms=1.4, p90_ms=1.7, rounds=50)
            >>> LatencyComparison((slow, fast), "a CPU", True, 2, "1.20").speedup("int8", 1)
            2.0
        """
        medians = {row.file: row.median_ms for row in self.rows if row.batch_size == batch_size}
        return next(iter(medians.values()), float("nan")) / medians[file]


def compare_latency(
    files: Mapping[str, str | PathLike[str]],
    feeds: Mapping[str, Array],
    *,
    batch_sizes: Sequence[int] = (1, 8),
    rounds: int = 50,
    threads: int | None = None,
    budget_s: float = 30.0,
    progress: Callable[[str], None] | None = None,
) -> LatencyComparison:
    """Time ONNX files against one another on the CPU.

    A round runs every file once, in alternating order; the first rounds warm up and are dropped. The budget is
    split evenly over the batch sizes; where it runs out, fewer rounds are measured, but never under
    :data:`MIN_ROUNDS`. Threads wait without spinning: with several sessions in one process, and on a busy machine,
    spinning can cost more than the run itself.

    Args:
        files: Name and path of each file; the first is the one the others are compared with.
        feeds: Inputs by name, a batch of one sample each. For larger batches the sample is repeated along the
            first axis of those inputs whose first axis is dynamic in the file.
        batch_sizes: Batch sizes to measure, each at least 1.
        rounds: Rounds to measure per batch size, at least :data:`MIN_ROUNDS`.
        threads: Threads of each run, all processors this process may use by default.
        budget_s: Seconds for the whole comparison, loading not included.
        progress: Called between rounds, outside of what is timed, with one line of text.

    Returns:
        The times, with the machine they were taken on.

    Raises:
        MissingExtraError: If ONNX Runtime is not installed.
        ValueError: If a number is out of range, an input of a file is not in ``feeds``, a feed is not one sample,
            or a file cannot run at a batch size.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> import onnx
        >>> source = '<ir_version: 8, opset_import: ["": 17]> g (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }'
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder) / "relu.onnx"
        ...     onnx.save(onnx.parser.parse_model(source), path)
        ...     times = compare_latency({"a": path, "b": path}, {"x": np.ones((1, 4), np.float32)}, rounds=5)
        >>> [(row.file, row.batch_size, row.rounds) for row in times.rows]
        [('a', 1, 5), ('b', 1, 5), ('a', 8, 5), ('b', 8, 5)]
    """
    _check(files, batch_sizes, rounds, threads, budget_s)
    onnxruntime = _import_onnxruntime()
    threads = threads or available_cpus()
    sessions = {name: _session(onnxruntime, path, threads) for name, path in files.items()}
    feeds_by_batch_size = {
        batch_size: {name: _batched(name, session, feeds, batch_size) for name, session in sessions.items()}
        for batch_size in batch_sizes
    }
    deadline = time.perf_counter() + budget_s
    rows: list[Latency] = []
    for position, (batch_size, batches) in enumerate(feeds_by_batch_size.items()):
        now = time.perf_counter()
        share_s = max(deadline - now, 0.0) / (len(feeds_by_batch_size) - position)
        times_ms = _interleaved_ms(sessions, batches, rounds, now + share_s, _line(progress, batch_size, rounds))
        rows += [_row(name, batch_size, measured) for name, measured in times_ms.items()]
    return LatencyComparison(tuple(rows), cpu_name(), has_vnni(), threads, onnxruntime.__version__)


def _interleaved_ms(
    sessions: Mapping[str, Any],
    batches: Mapping[str, Mapping[str, Array]],
    rounds: int,
    deadline: float,
    tell: Callable[[int], None],
) -> dict[str, list[float]]:
    times_ms: dict[str, list[float]] = {name: [] for name in sessions}
    for warmup in range(_WARMUP_ROUNDS):
        if warmup > 0 and time.perf_counter() > deadline:
            break
        for name, session in sessions.items():
            session.run(None, batches[name])
    order = list(sessions)
    for done in range(rounds):
        if done >= MIN_ROUNDS and time.perf_counter() > deadline:
            break
        tell(done)
        for name in order:
            start_ns = time.perf_counter_ns()
            sessions[name].run(None, batches[name])
            times_ms[name].append((time.perf_counter_ns() - start_ns) / 1e6)
        order.reverse()  # what one file leaves in the caches must not always meet the same other file
    return times_ms


def _session(onnxruntime: Any, path: str | PathLike[str], threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Spinning threads, those of the other sessions too, take processors from the run that is being timed.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(fspath(path), options, providers=["CPUExecutionProvider"])


def _batched(file: str, session: Any, feeds: Mapping[str, Array], batch_size: int) -> dict[str, Array]:
    inputs = session.get_inputs()
    missing = [value.name for value in inputs if value.name not in feeds]
    if missing:
        raise ValueError(f"File `{file}` has an input `{missing[0]}`, but the feeds are: {', '.join(feeds) or 'none'}.")
    dynamic = {value.name for value in inputs if value.shape and not isinstance(value.shape[0], int)}
    if batch_size > 1 and not dynamic:
        raise ValueError(
            f"File `{file}` cannot run at batch size {batch_size}: no input has a dynamic first axis. "
            "Export it with a dynamic batch axis, or pass `batch_sizes=(1,)`."
        )
    for name in sorted(dynamic):
        if len(feeds[name]) != 1:
            raise ValueError(f"Feed `{name}` must be a batch of one sample, got shape {feeds[name].shape}.")
    return {
        value.name: np.repeat(feeds[value.name], batch_size, axis=0) if value.name in dynamic else feeds[value.name]
        for value in inputs
    }


def _row(file: str, batch_size: int, times_ms: Sequence[float]) -> Latency:
    p10, median, p90 = (float(value) for value in np.percentile(times_ms, (10, 50, 90)))
    return Latency(file, batch_size, median_ms=median, p10_ms=p10, p90_ms=p90, rounds=len(times_ms))


def _line(progress: Callable[[str], None] | None, batch_size: int, rounds: int) -> Callable[[int], None]:
    def tell(done: int) -> None:
        if progress is not None:
            progress(f"latency at batch size {batch_size}: round {done + 1} of {rounds}")

    return tell


def _check(
    files: Mapping[str, str | PathLike[str]],
    batch_sizes: Sequence[int],
    rounds: int,
    threads: int | None,
    budget_s: float,
) -> None:
    if not files:
        raise ValueError("`files` must name at least one ONNX file, got none.")
    if not batch_sizes or min(batch_sizes) < 1:
        raise ValueError(f"`batch_sizes` must be one or more numbers of at least 1, got {tuple(batch_sizes)}.")
    if rounds < MIN_ROUNDS:
        raise ValueError(f"`rounds` must be at least {MIN_ROUNDS}, got {rounds}.")
    if threads is not None and threads < 1:
        raise ValueError(f"`threads` must be at least 1, got {threads}.")
    if not budget_s > 0:
        raise ValueError(f"`budget_s` must be above 0 seconds, got {budget_s}.")


def _import_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError(
            "Measuring latency needs ONNX Runtime, which is not installed. Install it with `pip install onnxruntime`."
        ) from error
    return onnxruntime
