"""Training loaders that know their position, after a stop inside an epoch."""

from __future__ import annotations

import lightning.pytorch as pl


def restore_loaders(trainer: pl.Trainer) -> None:
    """Give loaders with a ``load_state_dict`` the state of the checkpoint, where Lightning has not done so.

    It does so when it makes the loaders, which is before the checkpoint is read if `configure_optimizers` asks for
    ``trainer.estimated_stepping_batches``, as one-cycle schedules do; the epoch would begin anew.

    Args:
        trainer: A Trainer in `on_train_start`, whose fit has read no batch yet.

    Example:
        >>> restore_loaders(pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu"))
    """
    loop = trainer.fit_loop
    if loop.restarting and loop._combined_loader_states_to_load and loop._data_fetcher is not None:
        loop._load_combined_loader_states()
        iter(loop._data_fetcher)
