"""The metric of a file: the user's own validation step, with the file in the place of the network."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.utils import _pytree as pytree

from lightning_compress.export import ExportResult
from lightning_compress.export.arguments import plain_tensor, tensors_of
from lightning_compress.export.session import open_session, run_session


class FileForward:
    """Stands in for a network's forward: runs the exported file on the same tensors.

    Args:
        path: The file.
        result: What is known of it.
    """

    def __init__(self, path: Path, result: ExportResult) -> None:
        self.session = open_session(path)
        self.result = result

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the file and nest its outputs as the forward nests them."""
        tensors = dict(zip(self.result.input_names, tensors_of(args, kwargs), strict=True))
        wanted = [tensors[description.name] for description in self.session.get_inputs()]
        outputs = run_session(self.session, [plain_tensor(tensor) for tensor in wanted])
        return pytree.tree_unflatten(outputs, self.result.output_spec)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keep the greeting and the advice of a second Trainer, which the user did not ask for, from the user."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
