"""The table of what works together is that of the tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.compatibility.table import PAGE

PROGRAM = """
import pytest, sys
from tests.compatibility.table import TESTS, Rows, page
rows = Rows()
assert pytest.main([*TESTS, "--collect-only", "-qq", "-n", "0"], plugins=[rows]) == 0
open(sys.argv[1], "w").write(page(rows))
"""


def test_the_page_is_made_from_the_tests(tmp_path: Path) -> None:
    made = tmp_path / "page.md"
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(made)],
        capture_output=True,
        text=True,
        check=False,
        cwd=PAGE.parents[1],
    )
    assert found.returncode == 0, found.stdout
    assert made.read_text() == PAGE.read_text(), "Write it anew with `python -m tests.compatibility.table`."
