"""The table of docs/compatibility.md: every row is a test.

``python -m tests.compatibility.table`` runs the tests and writes the table; a test keeps it current.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

TESTS = ("tests/compatibility", "tests/examples/test_cli.py")
PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"

INTRODUCTION = """# What works together

Made by `python -m tests.compatibility.table` from the tests that it names: every row is a test, or several. *Works*
means that the run ended with the full compression and a file that computes what the network computes. *Refused* means
that the callbacks say in one sentence, before the training, what stands in the way and what to do instead.
"""


def works(area: str, what: str, note: str = "") -> pytest.MarkDecorator:
    """Mark a test that shows that ``what`` works."""
    return pytest.mark.combination(area, what, "works", note)


def refused(area: str, what: str, note: str) -> pytest.MarkDecorator:
    """Mark a test that shows that ``what`` is refused; ``note`` is the way out."""
    return pytest.mark.combination(area, what, "refused", note)


def untested(area: str, what: str, note: str) -> pytest.MarkDecorator:
    """Mark a test that was not run where the table was made; ``note`` is what it needs."""
    return pytest.mark.combination(area, what, "untested", note)


class Rows:
    """Collects the rows of the tests, as a plugin of pytest."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], tuple[str, str, str]] = {}

    def pytest_collection_modifyitems(self, items: Sequence[pytest.Item]) -> None:
        for item in items:
            for mark in item.iter_markers("combination"):
                area, what, outcome, note = mark.args
                test = f"{Path(item.nodeid.partition('::')[0]).name}::{getattr(item, 'originalname', item.name)}"
                self.rows.setdefault((area, what), (outcome, note, test))


def page(rows: Rows) -> str:
    """Return the page that tells of ``rows``."""
    lines = [INTRODUCTION]
    for area in dict.fromkeys(area for area, _ in rows.rows):
        lines += [f"## {area}\n", "| combination | | notes | test |", "|---|---|---|---|"]
        lines += [
            f"| {what} | {outcome} | {note} | `{test}` |"
            for (row_area, what), (outcome, note, test) in rows.rows.items()
            if row_area == area
        ]
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    """Run the tests and write the page if they pass."""
    rows = Rows()
    code = pytest.main([*TESTS, "-n", "0", "-q", "--deselect", "test_table.py"], plugins=[rows])
    if code == 0:
        PAGE.write_text(page(rows))
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
