"""The averages of weights that Lightning's callbacks keep: copies of the module, which training steps pass by."""

from __future__ import annotations

from collections.abc import Iterator

import lightning.pytorch as pl
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel


def averaged_modules(trainer: pl.Trainer) -> Iterator[nn.Module]:
    """Yield the copy of the module in which each of the Trainer's averaging callbacks keeps its average.

    Example:
        >>> trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
        >>> list(averaged_modules(trainer))
        []
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
            average: nn.Module | None = callback._average_model
            if average is not None:
                yield average.module if isinstance(average, AveragedModel) else average


def statistics_epochs(trainer: pl.Trainer) -> int:
    """Return how many epochs `StochasticWeightAveraging` has added at the end of the run, without optimizer steps.

    It adds one, where there are batch norms, to renew their statistics under the averaged weights.

    Example:
        >>> trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
        >>> statistics_epochs(trainer)
        0
    """
    return sum(
        bool(callback._model_contains_batch_norm) and callback._max_epochs != -1
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if isinstance(callback, StochasticWeightAveraging)
    )


def is_renewing_statistics(trainer: pl.Trainer) -> bool:
    """Tell whether this epoch takes no optimizer steps, but runs the training batches for their statistics alone."""
    return trainer.fit_loop._skip_backward
