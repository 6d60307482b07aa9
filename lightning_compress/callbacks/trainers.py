"""Which Trainers our callbacks work with, checked in `setup`; and modules whose layers come late."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_compress.errors import CompressionError


def check_trainer(trainer: Any, callback: pl.Callback) -> None:
    """Check that ``callback`` can work with ``trainer``.

    Args:
        trainer: What called the callback's ``setup``.
        callback: The callback.

    Raises:
        CompressionError: If the Trainer comes from another package than the callback, or splits the weights.

    Example:
        >>> trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
        >>> check_trainer(trainer, pl.Callback())
    """
    name = type(callback).__name__
    if not isinstance(trainer, pl.Trainer):
        package = type(trainer).__module__.partition(".")[0]
        raise CompressionError(
            f"`{name}` belongs to the package `lightning`, and this Trainer comes from `{package}`, whose classes are "
            f"others of the same names. Write `import lightning.pytorch as pl` instead of `import {package} as pl`, "
            "for the Trainer and for the LightningModule."
        )
    if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
        raise CompressionError(
            f"`{name}` does not work with `{type(trainer.strategy).__name__}`: it splits the weights over processes, "
            'and magnitudes, scales and the exported file need whole ones. Use `strategy="ddp"`, or one device.'
        )


def brings_back_weights_alone(trainer: pl.Trainer) -> bool:
    """Tell whether the processes of ``trainer`` end with the fit, and the module here gets nothing but their weights.

    Example:
        >>> brings_back_weights_alone(pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu"))
        False
    """
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def has_late_layers(pl_module: pl.LightningModule) -> bool:
    """Tell whether ``pl_module`` may create layers after the callbacks' ``setup``: in its own, or to be configured.

    Example:
        >>> has_late_layers(pl.LightningModule())
        False
    """
    return is_overridden("setup", pl_module) or is_overridden("configure_model", pl_module)
