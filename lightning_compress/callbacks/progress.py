"""One line that tells what long work is being done."""

from __future__ import annotations

import sys
from types import TracebackType

from tqdm import tqdm


class ProgressLine:
    """A line in the terminal that says what is going on and for how long; gone when the work is done.

    Where the output is no terminal, nothing is printed.

    Args:
        name: Who is at work.

    Example:
        >>> with ProgressLine("OnnxExport") as progress:
        ...     progress.tell("writing the ONNX file")
    """

    def __init__(self, name: str) -> None:
        self._bar = tqdm(
            desc=name,
            bar_format="{desc}: {postfix} [{elapsed}]",
            leave=False,
            file=sys.stderr,
            disable=None,  # shown in a terminal only
        )

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()

    def tell(self, message: str) -> None:
        """Say what is being done now, in a few words."""
        self._bar.set_postfix_str(message)
