"""Export paths: where a file, the weights of a failed export and an incomplete network go."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from lightning_compress.callbacks.complete_weights import save_weights
from lightning_compress.unfinished import unfinished_folder


def check_writable(path: Path, owner: str) -> None:
    """Check, by making an empty folder next to it and removing it, that a file can be written at ``path``.

    Args:
        path: The file.
        owner: Which callback will write it, for the message.

    Raises:
        ValueError: If it cannot; before the training rather than after it.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     check_writable(Path(folder) / "model.onnx", "OnnxExport")
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder")
        with unfinished_folder(path):
            pass
    except OSError as error:
        raise ValueError(
            f"`{owner}` cannot write {path}: {error.strerror or error}. Choose a path in a folder you may write to."
        ) from error


def writes_nothing(trainer: pl.Trainer) -> bool:
    """Tell whether a run leaves no files behind."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def marked_incomplete(path: Path) -> Path:
    """Return where the file goes when the run has ended before its full compression.

    Example:
        >>> marked_incomplete(Path("model.onnx")).name
        'model.incomplete.onnx'
    """
    return path.with_name(f"{path.stem}.incomplete{path.suffix}")


def kept_weights(path: Path) -> Path:
    """Return where the weights go when the file at ``path`` cannot be written.

    Example:
        >>> kept_weights(Path("model.onnx")).name
        'model.onnx.ckpt'
    """
    return path.with_name(f"{path.name}.ckpt")


def keep_weights(trainer: pl.Trainer, pl_module: pl.LightningModule, path: Path) -> None:
    """Write the trained weights after a failed export, and tell; the export's own error is the one to raise."""
    try:
        save_weights(pl_module, trainer, path)
    except (OSError, RuntimeError) as error:  # torch turns some of the system's errors into its own
        rank_zero_warn(
            f"The export failed, and {path} could not be written either ({error}): the trained weights are in the "
            "module alone. Save them with `trainer.save_checkpoint` where there is room."
        )
    else:
        rank_zero_warn(f"The export failed; the trained weights are kept in {path}.")
