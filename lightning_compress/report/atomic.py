"""Files that are either whole or not there: written under a temporary name, then renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

from lightning_compress.unfinished import remove_leftovers


@contextmanager
def written_whole(path: str | PathLike[str]) -> Iterator[Path]:
    """Give a temporary name next to ``path``, which takes its place when the block ends without an error.

    Args:
        path: The file to write; its folder is made where missing.

    Yields:
        The path to write to. It is gone when the block ends.

    Raises:
        OSError: If the folder cannot be made or the file cannot be renamed.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     with written_whole(f"{folder}/new/report.txt") as temporary:
        ...         n_characters = temporary.write_text("whole")
        ...     [(file.name, file.read_text()) for file in Path(folder, "new").iterdir()]
        [('report.txt', 'whole')]
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
