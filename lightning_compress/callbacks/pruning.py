"""`MagnitudePruning`: weights that go to zero gradually during a fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_compress.callbacks.averages import averaged_modules
from lightning_compress.callbacks.checkpoint import attach_state, attached_state
from lightning_compress.callbacks.clock import Rise, completed_steps, resolve_rise
from lightning_compress.callbacks.compressor import Compressor
from lightning_compress.callbacks.random_state import RandomState, attach_random_state
from lightning_compress.callbacks.trainers import check_trainer, has_late_layers
from lightning_compress.errors import CompressionError
from lightning_compress.processes import check_alike
from lightning_compress.pruning.magnitude import Scope, magnitude_masks
from lightning_compress.pruning.pattern import pattern_masks, pattern_sparsity
from lightning_compress.pruning.state import PruningState
from lightning_compress.pruning.weights import (
    check_pattern_fits,
    input_dims,
    prunable_weights,
    sparsity,
    sparsity_by_layer,
)
from lightning_compress.schedules import CubicSchedule, check_moment, check_order
from lightning_compress.settings import plain

STATE_KEY = "pruning"
"""Where the masks lie in a checkpoint: ``checkpoint["lightning_compress"]["pruning"]``."""

MAX_DEFAULT_UPDATES = 100
"""How often the masks are made anew over the whole rise where ``update_every`` is not given."""


class MagnitudePruning(Compressor):
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
        super().__init__()
        sparsity, start, end, update_every = plain((sparsity, start, end, update_every))
        self.pattern = pattern = plain(pattern)
        self.sparsity = _checked_sparsity(sparsity, self.pattern)
        check_moment("start", start)
        check_moment("end", end)
        check_order("start", start, "end", end)
        if scope not in ("global", "layer", "lamp"):
            raise ValueError(f'`scope` must be "global", "layer" or "lamp", got {scope!r}.')
        if pattern is not None and scope == "lamp":
            raise ValueError('`scope="lamp"` ranks weights that `pattern` has chosen already. Leave one of them out.')
        if update_every is not None and update_every < 1:
            raise ValueError(f"`update_every` must be at least 1 optimizer step, got {update_every}.")
        self.start = start
        self.end = end
        self.scope: Scope = scope
        self.exclude = plain(exclude)
        self.update_every = update_every
        self._state = PruningState()
        self._random = RandomState()
        self._layers: tuple[str, ...] = ()
        self._rise = Rise(0, 0, 1)
        self._schedule = CubicSchedule(self.sparsity, 0, 0)
        self._last_step = 0
        self._counted = 0.0
        self._logged: float | None = None

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

    @property
    @override
    def moments(self) -> dict[str, float]:
        """The moments that it was given."""
        return {"start": self.start, "end": self.end}

    @override
    def shortfall(self, pl_module: pl.LightningModule) -> str:
        """Return the sparsity that was reached, and when the full one would have been."""
        return (
            f"`MagnitudePruning` was at a sparsity of {sparsity(self._weights(pl_module)):.4f}, and the full "
            f"{self.sparsity:.4f} was due after step {self._schedule.end_step}"
        )

    def counted_sparsity(self, pl_module: nn.Module) -> float:
        """Return the fraction of zeros among the selected weights of ``pl_module``, counted from the tensors."""
        return sparsity(prunable_weights(pl_module, self.exclude))

    def sparsity_by_layer(self, pl_module: nn.Module) -> dict[str, float]:
        """Return the fraction of zeros of each selected layer of ``pl_module``, counted from the tensors."""
        return sparsity_by_layer(prunable_weights(pl_module, self.exclude))

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        check_trainer(trainer, self)
        super().setup(trainer, pl_module, stage)
        if sum(isinstance(callback, MagnitudePruning) for callback in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise ValueError("The Trainer has more than one `MagnitudePruning` callback. Keep one of them.")
        # The masks belong to the module: a second fit finds them, a deep copy of the module has its own.
        self._state = attached_state(pl_module, STATE_KEY, PruningState) or PruningState()
        self._state.settings = self._settings
        attach_state(pl_module, STATE_KEY, self._state.save, self._state.load)
        if stage != "fit":
            return
        self._random = attach_random_state(pl_module)
        if not has_late_layers(pl_module):  # else only `on_fit_start` can tell
            self._select_layers(pl_module)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._select_layers(pl_module)
        self._random.restore()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._random.begin(trainer)
        self._rise = resolve_rise(trainer, self.start, self.end, self.update_every, MAX_DEFAULT_UPDATES)
        self._schedule = CubicSchedule(self.sparsity, self._rise.begin_step, self._rise.end_step)
        step = self._last_step = completed_steps(trainer)
        weights = self._weights(pl_module)
        if step == 0:
            self._state.clear()  # a new run follows its schedule from the beginning
        self._check_masks_fit(weights)
        self._state.masks = {name: mask.to(weights[name].device) for name, mask in self._state.masks.items()}
        self._counted, self._logged = sparsity(weights), None
        overdue = not self._state.masks if step < self._rise.end_step else not self._state.complete
        if step >= self._rise.begin_step and overdue:
            self._update_masks(trainer, pl_module, step)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._logged = None

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = completed_steps(trainer)
        if step != self._last_step:  # else gradients are accumulated: no optimizer step was taken
            self._last_step = step
            self._after_step(trainer, pl_module, step)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _after_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        if step < self._schedule.begin_step:
            return
        # Momentum can move a pruned weight off zero, so the masks are applied after every step.
        self._apply(trainer, pl_module)
        if not self.complete and self._rise.is_due(step):
            self._update_masks(trainer, pl_module, step)
        # Lightning keeps a logged value for the rest of the epoch.
        if not trainer.barebones and self._logged != self._counted:
            pl_module.log("compress/sparsity", self._counted)
            self._logged = self._counted

    @override
    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # The module's `on_validation_start`, which comes before, may have swapped the weights, as a schedule-free
        # optimizer asks for.
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._state.apply_(self._weights(pl_module))

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._random.is_training = False
        # `WeightAveraging` has just put the average in the weights' place, if it comes before this callback.
        self._state.apply_(self._weights(pl_module))
        check_alike("pruning masks", self._state.masks)
        super().on_train_end(trainer, pl_module)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._random.interrupt()

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # `WeightAveraging` may also come after this callback.
        self._state.apply_(self._weights(pl_module))
        self._state.rest()

    @property
    def _settings(self) -> dict[str, Any]:
        """What a checkpoint must agree on; a schedule may change, as when a run is made longer."""
        pattern = None if self.pattern is None else list(self.pattern)
        return {"sparsity": self.sparsity, "scope": self.scope, "pattern": pattern, "exclude": list(self.exclude)}

    def _update_masks(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
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

    def _apply(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *optimizers: Optimizer) -> None:
        """Set what is pruned to zero, in what ``optimizers`` remember and in averages of the weights too."""
        self._state.apply_(self._weights(pl_module), *optimizers)
        for average in averaged_modules(trainer):
            self._state.apply_(self._weights(average))

    def _select_layers(self, pl_module: pl.LightningModule) -> None:
        layers = tuple(prunable_weights(pl_module, self.exclude))
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
