"""The state of the random numbers, so that dropout and shuffling go on after a stop as they would have without it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from torch import distributed

from lightning_compress.callbacks.checkpoint import attach_state, attached_state
from lightning_compress.callbacks.loaders import restore_loaders
from lightning_compress.processes import n_processes, rank

STATE_KEY = "random"
"""Where the state lies in a checkpoint: ``checkpoint["lightning_compress"]["random"]``."""


class RandomState:
    """The generators of torch, numpy and Python, of every process, as they were when a checkpoint was written.

    Attributes:
        is_training: Whether a fit is under way: only its checkpoints hold the state, which all processes write.
    """

    def __init__(self) -> None:
        self.is_training = False
        self._loaded: dict[str, Any] | None = None

    def save(self) -> dict[str, Any]:
        """Return the state of every process as tensors and plain types; nothing outside of a fit."""
        if not self.is_training:
            return {}
        states: list[Any] = [_plain(_collect_rng_states())]
        if n_processes() > 1:
            states *= n_processes()
            distributed.all_gather_object(states, states[0])
        return {"processes": states}

    def load(self, state: dict[str, Any]) -> None:
        """Keep a state for `restore`."""
        self._loaded = state or None

    def restore(self) -> None:
        """Set the generators as they were, if a state of as many processes was loaded."""
        states = [] if self._loaded is None else self._loaded["processes"]
        if len(states) == n_processes():
            _set_rng_states(_native(states[rank()]))

    def begin(self, trainer: pl.Trainer) -> None:
        """Begin a fit, in `on_train_start`; its checkpoints hold the state from now on."""
        restore_loaders(trainer)  # may draw numbers
        if is_inside_an_epoch(trainer):
            self.restore()
        self.is_training = True
        self._loaded = None

    def interrupt(self) -> None:
        """Tell that an error has ended the fit: checkpoints that others write about it hold the state too.

        Not those of several processes: the one that failed would wait for the others, which know nothing of it.
        """
        self.is_training = self.is_training and n_processes() == 1


def attach_random_state(pl_module: pl.LightningModule) -> RandomState:
    """Make the state of the random numbers travel in checkpoints of ``pl_module``; return what holds it.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> module = BoringModel()
        >>> attach_random_state(module) is attach_random_state(module)
        True
    """
    state = attached_state(pl_module, STATE_KEY, RandomState) or RandomState()
    state.load({})  # what a test loaded before this fit is not for it
    state.is_training = False
    attach_state(pl_module, STATE_KEY, state.save, state.load)
    return state


def is_inside_an_epoch(trainer: pl.Trainer) -> bool:
    """Tell whether a run goes on inside an epoch: the loader, made anew, has then drawn numbers that it should not.

    After the last batch it has drawn those of the next epoch; but after the last validation it will draw them again.
    """
    loop = trainer.fit_loop.epoch_loop
    is_next_epoch = loop.batch_progress.is_last_batch and loop.restarted_on_train_batch_end
    return trainer.fit_loop.restarted_mid_epoch and not is_next_epoch


def _plain(states: dict[str, Any]) -> dict[str, Any]:
    """Return what `torch.load` reads with ``weights_only=True``."""
    name, keys, *rest = states["numpy"]
    version, words, gauss = states["python"]
    return {
        **states,
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "python": [version, torch.tensor(words), gauss],
    }


def _native(states: dict[str, Any]) -> dict[str, Any]:
    name, keys, *rest = states["numpy"]
    version, words, gauss = states["python"]
    return {
        **states,
        "numpy": (name, keys.numpy().astype(np.uint32), *rest),
        "python": (version, tuple(words.tolist()), gauss),
    }
