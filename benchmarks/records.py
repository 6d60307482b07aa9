"""Results of a benchmark: kept as JSON after every run, so that a stopped benchmark goes on, and told as Markdown."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from examples.quiet import quiet_lightning
from lightning_compress.report.cpu import cpu_name

OUT = Path(__file__).parent / "out"
"""Where results and trained weights are kept."""

LIBRARIES = ("torch", "torchvision", "lightning", "onnx", "onnxruntime")

Row = dict[str, Any]


class Records:
    """Rows of one benchmark, each found again by its key.

    Args:
        name: Name of the benchmark; the rows live in ``benchmarks/out/NAME.json``.
    """

    def __init__(self, name: str) -> None:
        OUT.mkdir(parents=True, exist_ok=True)
        self.path = OUT / f"{name}.json"

    @property
    def rows(self) -> list[Row]:
        """All rows, read from the file: two parts of a benchmark may run at the same time."""
        return json.loads(self.path.read_text())["rows"] if self.path.exists() else []

    def find(self, **key: Any) -> Row | None:
        """Return the row with these values, or None."""
        return next((row for row in self.rows if key.items() <= row.items()), None)

    def drop(self, is_old: Callable[[Row], bool]) -> None:
        """Forget the rows of which ``is_old`` is true."""
        if self.path.exists():
            content = json.loads(self.path.read_text())
            content["rows"] = [row for row in content["rows"] if not is_old(row)]
            self.path.write_text(json.dumps(content, indent=2) + "\n")

    def get(self, measure: Callable[[], Mapping[str, Any]], **key: Any) -> Row:
        """Return the row with these values; measure it and write it down where there is none yet."""
        row = self.find(**key)
        if row is None:
            row = {**key, **measure()}
            content = {"machine": machine(), "rows": [*self.rows, row]}
            self.path.write_text(json.dumps(content, indent=2) + "\n")
            print(row, flush=True)
        return row


def machine() -> dict[str, str]:
    """Return what a reader needs to run this again: command, processor, threads and versions."""
    command = f"python -m benchmarks.{Path(sys.argv[0]).stem} {shlex.join(sys.argv[1:])}"
    return {
        "command": command.strip(),
        "cpu": f"{cpu_name()}, {os.cpu_count()} processors, {torch.get_num_threads()} threads",
        "versions": ", ".join(
            [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in LIBRARIES)]
        ),
    }


def print_machine() -> None:
    """Print :func:`machine`, one line each, and keep Lightning from printing its own."""
    quiet_lightning()
    for name, text in machine().items():
        print(f"{name}: {text}", flush=True)


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table whose columns are the keys of the first row.

    Example:
        >>> print(markdown_table([{"model": "ResNet-8", "accuracy": 90.5}]))
        | model | accuracy |
        |---|---|
        | ResNet-8 | 90.5 |
    """
    columns = list(rows[0])
    cells = [columns, *([str(row[column]) for column in columns] for row in rows)]
    head, *body = [f"| {' | '.join(line)} |" for line in cells]
    return "\n".join([head, f"|{'---|' * len(columns)}", *body])
