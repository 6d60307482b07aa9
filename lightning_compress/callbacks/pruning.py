"""`MagnitudePruning`: weights that go to zero gradually during a fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_compress.callbacks.checkpoint import attach_state, attached_state
from lightning_compress.callbacks.gradual import GradualCompressor
from lightning_compress.callbacks.trainers import has_late_layers
from lightning_compress.errors import CompressionError
from lightning_compress.pruning.magnitude import Scope, magnitude_masks
from lightning_compress.pruning.pattern import pattern_masks, pattern_sparsity
from lightning_compress.pruning.state import PruningState
from lightning_compress.pruning.weights import (
    check_pattern_fits,
    input_dims,
    sparsity,
    sparsity_by_layer,
)
from lightning_compress.selection import plain_weights
from lightning_compress.settings import plain

STATE_KEY = "pruning"
"""Where the masks lie in a checkpoint: ``checkpoint["lightning_compress"]["pruning"]``."""


class MagnitudePruning(GradualCompressor):
    """Prune the smallest weights, a few at a time, on a cubic schedule (Zhu & Gupta 2017, arXiv:1710.01878).

    Between ``start`` and ``end`` the masks are made anew every ``update_every`` steps; after every optimizer step
    (under manual optimization: after every training batch) they set the pruned weights, and the optimizer's momentum
    and moments there, to zero. A pruned weight stays pruned. Once ``end`` is reached, exactly ``round(sparsity * N)``
    of the N selected weights are masked. The weights of convolution and linear layers are pruned, biases and
    normalisations never; a weight that several layers share is counted once.

    The parameters stay plain leaf parameters under their own names. The masks travel in every checkpoint of the
    module, one bit a weight. The counted sparsity is logged as ``compress/sparsity``. Where weights are averaged
    (``WeightAveraging``), the masks are applied to the average when the fit ends.

    Args:
        sparsity: Fraction of the selected weights that end as zeros, in [0, 1). With ``pattern`` it may be left out.
        start: When the rise begins: a share of the run (float) or optimizer steps (int).
        end: When the full sparsity is reached: a share of the run (float) or optimizer steps (int).
        scope: ``"global"`` prunes the smallest weights of all layers together, ``"layer"`` every layer alike,
            ``"lamp"`` by magnitudes relative to their layer's (Lee et al. 2021, arXiv:2010.07611), which serves
            high sparsities better and takes longer to compute.
        pattern: ``(n, m)`` to keep n of every m consecutive weights along the input dimension, such as ``(2, 4)``.
        exclude: Patterns of layer names to leave out; a pattern covers everything below the name it matches.
        update_every: Optimizer steps between two masks; None for at most 100 masks over the rise.

    Raises:
        ValueError: If an argument is out of range, or ``sparsity`` is not that of ``pattern``.
        TypeError: If ``start`` or ``end`` is neither a float nor an int.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader
        >>> from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
        >>> pruning = MagnitudePruning(sparsity=0.75, end=0.5)
        >>> trainer = pl.Trainer(max_epochs=1, callbacks=[pruning], accelerator="cpu", logger=False,
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ...     limit_val_batches=0)
        >>> model = BoringModel()
        >>> _ = [parameter.data.normal_() for parameter in model.parameters()]
        >>> import warnings
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     trainer.fit(model, DataLoader(RandomDataset(32, 8)))
        >>> pruning.complete, pruning.sparsity_by_layer(model)
        (True, {'layer': 0.75})
    """

    max_updates = 100
    clears_optimizers_each_step = False

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        start: int | float = 0.0,
        end: int | float = 0.6,
        scope: Scope = "global",
        pattern: tuple[int, int] | None = None,
        exclude: Sequence[str] = (),
        update_every: int | None = None,
    ) -> None:
        sparsity, start, end, update_every = plain((sparsity, start, end, update_every))
        self.pattern = pattern = plain(pattern)
        self.sparsity = _checked_sparsity(sparsity, self.pattern)
        super().__init__(self.sparsity, start, end, update_every)
        if scope not in ("global", "layer", "lamp"):
            raise ValueError(f'`scope` must be "global", "layer" or "lamp", got {scope!r}.')
        if pattern is not None and scope == "lamp":
            raise ValueError('`scope="lamp"` ranks weights that `pattern` has chosen already. Leave one of them out.')
        self.scope: Scope = scope
        self.exclude = plain(exclude)
        self._state = PruningState()
        self._layers: tuple[str, ...] = ()
        self._counted = 0.0

    @property
    @override
    def complete(self) -> bool:
        """Whether the masks in force are those of the full target."""
        return self._state.complete

    @property
    @override
    def has_begun(self) -> bool:
        """Whether a weight has been pruned."""
        return bool(self._state.masks)

    @override
    def shortfall(self, pl_module: pl.LightningModule) -> str:
        """Return the sparsity that was reached, and when the full one would have been."""
        return (
            f"`MagnitudePruning` was at a sparsity of {sparsity(self._weights(pl_module)):.4f}, and the full "
            f"{self.sparsity:.4f} was due after step {self._schedule.end_step}"
        )

    def counted_sparsity(self, pl_module: nn.Module) -> float:
        """Return the fraction of zeros among the selected weights of ``pl_module``, counted from the tensors."""
        return sparsity(plain_weights(pl_module, self.exclude))

    def sparsity_by_layer(self, pl_module: nn.Module) -> dict[str, float]:
        """Return the fraction of zeros of each selected layer of ``pl_module``, counted from the tensors."""
        return sparsity_by_layer(plain_weights(pl_module, self.exclude))

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        # The masks belong to the module: a second fit finds them, a deep copy of the module has its own.
        self._state = attached_state(pl_module, STATE_KEY, PruningState) or PruningState()
        self._state.settings = self._settings
        attach_state(pl_module, STATE_KEY, self._state.save, self._state.load)
        if stage == "fit" and not has_late_layers(pl_module):  # else only `on_fit_start` can tell
            self._select_layers(pl_module)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._select_layers(pl_module)
        super().on_fit_start(trainer, pl_module)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        step, weights = self._last_step, self._weights(pl_module)
        if step == 0:
            self._state.clear()  # a new run follows its schedule from the beginning
        self._check_masks_fit(weights)
        self._state.masks = {name: mask.to(weights[name].device) for name, mask in self._state.masks.items()}
        self._counted = sparsity(weights)
        overdue = not self._state.masks if step < self._rise.end_step else not self._state.complete
        if step >= self._rise.begin_step and overdue:
            self._update(trainer, pl_module, step)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_end(trainer, pl_module)
        self._state.rest()

    @property
    def _settings(self) -> dict[str, Any]:
        """What a checkpoint must agree on; a schedule may change, as when a run is made longer."""
        pattern = None if self.pattern is None else list(self.pattern)
        return {"sparsity": self.sparsity, "scope": self.scope, "pattern": pattern, "exclude": list(self.exclude)}

    @property
    @override
    def _progress(self) -> tuple[str, float]:
        return "compress/sparsity", self._counted

    @property
    @override
    def _decisions(self) -> tuple[str, Any]:
        return "pruning masks", self._state.masks

    @override
    def _project(self, module: nn.Module, *optimizers: Optimizer) -> None:
        self._state.apply_(self._weights(module), *optimizers)

    @override
    def _update(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        weights = self._weights(pl_module)
        target = self._schedule(step)
        if self.pattern is None:
            self._state.masks = magnitude_masks(weights, target, self.scope)
        else:
            dims = input_dims(pl_module, self._layers)
            self._state.masks = pattern_masks(weights, self.pattern, target, self.scope, dims)
        self._state.complete = step >= self._schedule.end_step
        self._apply(trainer, pl_module, *trainer.optimizers)
        self._counted = sparsity(weights)

    def _select_layers(self, pl_module: pl.LightningModule) -> None:
        layers = tuple(plain_weights(pl_module, self.exclude))
        if not layers:
            raise CompressionError(
                f"`{type(pl_module).__name__}` has no convolution or linear layer to prune. "
                "Give it one, or exclude fewer."
            )
        if self.pattern is not None:
            check_pattern_fits(pl_module, layers, self.pattern)
        self._layers = layers

    def _weights(self, pl_module: nn.Module) -> dict[str, nn.Parameter]:
        return {name: pl_module.get_parameter(f"{name}.weight") for name in self._layers}

    def _check_masks_fit(self, weights: dict[str, nn.Parameter]) -> None:
        masks = self._state.masks
        shapes = {name: tuple(mask.shape) for name, mask in masks.items()}
        if masks and shapes != {name: tuple(weight.shape) for name, weight in weights.items()}:
            raise CompressionError(
                f"The checkpoint holds masks for the layers {sorted(masks)}, but this run prunes {sorted(weights)}. "
                "Resume with the model and the `exclude` of the run that wrote it."
            )


def _checked_sparsity(sparsity: float | None, pattern: tuple[int, int] | None) -> float:
    if pattern is not None:
        implied = pattern_sparsity(pattern)
        if sparsity is not None and abs(sparsity - implied) > 1e-9:
            raise ValueError(
                f"`sparsity={sparsity}` is not the sparsity of `pattern={pattern}`, which is {implied}. "
                "Leave `sparsity` out."
            )
        return implied
    if sparsity is None:
        raise ValueError("`MagnitudePruning` needs a `sparsity` in [0, 1), or a `pattern` such as (2, 4).")
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"`sparsity` is a fraction of zeros in [0, 1), got {sparsity}.")
    return sparsity
