"""Unfinished files: they take their place only when whole, and the next run removes those of one that was killed."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
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


@contextmanager
def unfinished_folder(path: Path) -> Iterator[Path]:
    """Make a hidden folder next to ``path`` for what will take its place; it is gone when the block ends.

    What killed runs have left for the same ``path`` is removed first.

    Args:
        path: The file that is being made; its folder is made where missing.

    Yields:
        The folder, ``.NAME.PID.*.tmp``.

    Example:
        >>> with tempfile.TemporaryDirectory() as home, unfinished_folder(Path(home) / "model.onnx") as folder:
        ...     folder.name.startswith(f".model.onnx.{os.getpid()}.")
        True
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    prefix = f".{path.name}.{os.getpid()}."
    with tempfile.TemporaryDirectory(prefix=prefix, suffix=".tmp", dir=path.parent) as folder:
        yield Path(folder)


def remove_leftovers(path: Path) -> None:
    """Remove the unfinished files and folders for ``path`` whose process is no more.

    Args:
        path: The file that they were to become.

    Example:
        >>> with tempfile.TemporaryDirectory() as home:
        ...     for name in (".a.txt.999999999.tmp", f".a.txt.{os.getpid()}.tmp", ".a.txt.tmp", ".b.txt.999999999.tmp"):
        ...         n_characters = (Path(home) / name).write_text("half")
        ...     remove_leftovers(Path(home) / "a.txt")
        ...     sorted(found.name for found in Path(home).iterdir()) == sorted(
        ...         [f".a.txt.{os.getpid()}.tmp", ".a.txt.tmp", ".b.txt.999999999.tmp"]
        ...     )
        True
    """
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(\d+)(\.\w+)?\.tmp")
    for found in path.parent.glob(".*.tmp"):
        match = pattern.fullmatch(found.name)
        if match is None or _is_alive(int(match[1])):
            continue
        if found.is_dir() and not found.is_symlink():
            shutil.rmtree(found, ignore_errors=True)
        else:
            found.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    if os.name != "posix":
        return True  # elsewhere signal 0 is not a question
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True  # somebody else's
    return True
