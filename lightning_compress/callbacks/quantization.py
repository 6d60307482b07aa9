"""`QuantizationAwareTraining`: training on the integers that ship."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from typing_extensions import override

from lightning_compress.callbacks.averages import is_renewing_statistics
from lightning_compress.callbacks.checkpoint import attach_state, attached_state
from lightning_compress.callbacks.clock import completed_steps, total_steps
from lightning_compress.callbacks.compressor import Compressor
from lightning_compress.callbacks.random_state import RandomState, attach_random_state
from lightning_compress.callbacks.trainers import brings_back_weights_alone, check_trainer, has_late_layers
from lightning_compress.errors import CompressionError
from lightning_compress.processes import average_, check_alike
from lightning_compress.quantization import Quantization, prepare, quantization_of, strip
from lightning_compress.quantization.batchnorm import freeze_batchnorm_, running_statistics
from lightning_compress.quantization.dct import DCT
from lightning_compress.quantization.estimators import RangeMethod
from lightning_compress.quantization.placement_report import PlacementReport, placement_report
from lightning_compress.quantization.scheme import Scheme
from lightning_compress.quantization.state import check_finite_weights
from lightning_compress.schedules import check_moment, check_order, resolve_step
from lightning_compress.selection import weight_layers
from lightning_compress.settings import check_same_settings, differences, plain

STATE_KEY = "quantization"
"""Where the ranges lie in a checkpoint: ``checkpoint["lightning_compress"]["quantization"]``."""

FLOAT, OBSERVING, QUANTIZED, FROZEN = range(4)
"""The phases, as they are logged."""

WARM_UP_STEPS = 128
"""Steps before ``start`` in which ranges are observed already, every `WARM_UP_INTERVAL`-th step."""
WARM_UP_INTERVAL = 4
SETTLING_STEPS = 32
"""Steps from ``start`` on in which ranges are observed at every step; later at every ``observe_every``-th."""


class QuantizationAwareTraining(Compressor):
    """Train with weights and activations rounded to the integers that ship (Jacob et al. 2018, arXiv:1712.05877).

    Until ``start`` the model trains in plain float; shortly before, activation ranges begin to be observed. From
    ``start`` on weights are rounded to symmetric integers per output channel, in [-127, 127] at 8 bits, and
    activations to affine integers per tensor, over moving averages of their ranges; gradients pass straight through.
    Below 7 bits the scales of both are learned: begun at the least squared error and trained by an optimizer of our own
    after every optimizer step (`lightning_compress.quantization.step_sizes`); the module, its state dict and the user's
    optimizer do not know them. From ``freeze`` on scales, ranges and the batch-norm statistics stay as they are, and
    every batch norm computes as the folded layer that is exported. In `Trainer.validate` and `Trainer.test` too, also
    after the fit, the model computes with the integers; `strip` gives the float model back.

    The LightningModule, its layers, hooks and state-dict keys stay as they are. Ranges travel in every checkpoint of
    the module. The phase is logged as ``compress/quantization_phase``: 0 float, 1 observing, 2 quantized, 3 frozen.

    Args:
        weight_bits: Bits of weights, 1 to 8: 2 are ternary (-1, 0, 1), and 1 is binary: signs, with the mean magnitude
            of each output channel (Rastegari et al. 2016, arXiv:1603.05279); the weights behind them are kept within
            [-1, 1] (Courbariaux et al. 2016, arXiv:1602.02830).
        activation_bits: Bits of the activations that layers and matrix products read, 1 to 8, where 1 are signs: -1
            and 1, or 0 and 1 behind a ReLU (Courbariaux et al. 2016). Inputs and results of the network keep 8, and so
            does what only additions and poolings read: no runtime has kernels below that.
        start: When rounding begins: a share of the run (float) or optimizer steps (int).
        freeze: When ranges and batch-norm statistics are frozen: a share of the run (float) or optimizer steps (int).
            Best when the learning rate is already small: without statistics of its own batch a network takes large
            steps badly.
        exclude: Patterns of layer names that stay in float; a pattern covers everything below the name it matches.
        overrides: Bits of single layers by pattern of their names, such as ``{"head": {"weight_bits": 8}}``; where
            several patterns match, the last one wins.
        edge_bits: Bits at least of the first and the last layers, for weights and for what they read.
        module: Name of the submodule to quantize; by default all that the LightningModule's forward reaches.
        observe_every: Steps between two observations of the ranges, once they have settled.
        symmetric: Whether activations get the zero point in the middle of their grid, as TensorRT wants it.
        reduce_range: Whether weights of 8 bits use 7: processors without VNNI saturate sums of 8-bit products.
        ranges: How scales are found: ``"minmax"``, ``"percentile"``, ``"mse"`` or ``"learned"`` (Esser et al. 2020,
            arXiv:1902.08153); by default those of 7 and 8 bits by the extremes, and those below are learned.
        weight_transform: ``"dct"``, or a `DCT` with its settings: weights are rounded to ``weight_bits`` in the
            frequencies of their kernels. What an archive keeps are these integers; what computes, in the ONNX file too,
            are the 8-bit integers that they decode to.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If bits are no ints, or ``start`` or ``freeze`` is neither a float nor an int.

    Example:
        >>> import warnings
        >>> from torch.utils.data import DataLoader
        >>> from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
        >>> quantization = QuantizationAwareTraining(start=0.5)
        >>> trainer = pl.Trainer(max_epochs=1, callbacks=[quantization], accelerator="cpu", logger=False,
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ...     limit_val_batches=0)
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     trainer.fit(BoringModel(), DataLoader(RandomDataset(32, 8)))
        >>> quantization.complete, [(row.name, row.is_integer) for row in quantization.placement]
        (True, [('layer', True)])
    """

    def __init__(
        self,
        *,
        weight_bits: int = 8,
        activation_bits: int = 8,
        start: int | float = 0.0,
        freeze: int | float = 0.95,
        exclude: Sequence[str] = (),
        overrides: Mapping[str, Mapping[str, int]] | None = None,
        edge_bits: int = 8,
        module: str | None = None,
        observe_every: int = 8,
        symmetric: bool = False,
        reduce_range: bool = False,
        ranges: RangeMethod | None = None,
        weight_transform: Literal["dct"] | DCT | None = None,
    ) -> None:
        super().__init__()
        self.scheme = Scheme(
            weight_bits,
            activation_bits,
            exclude,
            overrides or {},
            edge_bits,
            symmetric,
            reduce_range,
            ranges,
            weight_transform,
        )
        start, freeze, observe_every = plain((start, freeze, observe_every))
        check_moment("start", start)
        check_moment("freeze", freeze)
        check_order("start", start, "freeze", freeze)
        if observe_every < 1:
            raise ValueError(f"`observe_every` must be at least 1 optimizer step, got {observe_every}.")
        self.start = start
        self.freeze = freeze
        self.module = module
        self.observe_every = observe_every
        self._slot = QuantizationSlot()
        self._random = RandomState()
        self._start_step = 0
        self._freeze_step = 0
        self._last_step = -1
        self._begun_step = -1
        self._frozen_norms: list[nn.Module] = []

    @property
    def quantization(self) -> Quantization:
        """The quantization of the module that was last set up.

        Raises:
            CompressionError: If no module was set up yet.
        """
        if self._slot.quantization is None:
            raise CompressionError("No model is prepared yet: `Trainer.fit` does that.")
        return self._slot.quantization

    @property
    def placement(self) -> PlacementReport:
        """What becomes of every operation: integer or float, on which grid, and why not."""
        return placement_report(self.quantization.model)

    @property
    @override
    def complete(self) -> bool:
        """Whether the model computes with the integers that ship."""
        return self._slot.quantization is not None and self._slot.quantization.is_quantizing

    @property
    @override
    def has_begun(self) -> bool:
        """Whether the model computes with the integers that ship: there is nothing between."""
        return self.complete

    @property
    @override
    def moments(self) -> dict[str, float]:
        """The moments that it was given."""
        return {"start": self.start, "freeze": self.freeze}

    @override
    def shortfall(self, pl_module: pl.LightningModule) -> str:
        """Return when rounding would have begun."""
        return f"`QuantizationAwareTraining` left the model in float, as rounding was due after step {self._start_step}"

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        check_trainer(trainer, self)
        super().setup(trainer, pl_module, stage)
        if sum(isinstance(callback, QuantizationAwareTraining) for callback in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise ValueError("The Trainer has more than one `QuantizationAwareTraining` callback. Keep one of them.")
        # The ranges belong to the module: a second fit finds them, a deep copy of the module has its own.
        self._slot = attached_state(pl_module, STATE_KEY, QuantizationSlot) or QuantizationSlot()
        attach_state(pl_module, STATE_KEY, self._slot.save, self._slot.load)
        if stage == "fit":
            self._random = attach_random_state(pl_module)
        self._take_up(pl_module, is_new_run=stage == "fit")
        if not has_late_layers(pl_module):  # else only `on_fit_start` can tell
            self._prepare(pl_module)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._prepare(pl_module)
        self._random.restore()
        self.quantization.refresh()  # the strategy may have converted batch norms since
        recurrent = self.quantization.recurrent_layers()
        if recurrent:
            rank_zero_warn(
                f"Recurrent layers have no integer form: {', '.join(f'`{name}`' for name in recurrent)} stay in float, "
                "the layers around them are quantized. Cells written out with linear layers are quantized too."
            )

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        self._prepare(pl_module)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._prepare(pl_module)

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._prepare(pl_module)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._random.begin(trainer)
        run_steps = total_steps(trainer)
        self._start_step = resolve_step("start", self.start, run_steps)
        self._freeze_step = resolve_step("freeze", self.freeze, run_steps)
        if self._start_step > self._freeze_step:
            raise ValueError(
                f"`start` must not come after `freeze`, got start={self.start} (optimizer step {self._start_step}) "
                f"and freeze={self.freeze} (optimizer step {self._freeze_step})."
            )
        step = completed_steps(trainer)
        self._last_step, self._begun_step = step, -1
        if step == 0:
            self.quantization.reset()  # a new run follows its schedule from the beginning
        self.quantization.steps.to_(pl_module.device)
        self.quantization.is_quantizing = step >= self._start_step and step > 0
        ranges = self.quantization.ranges
        if step >= self._freeze_step and step > 0 and len(ranges.unseen()) == len(ranges.names):
            raise CompressionError(
                f"The run goes on at optimizer step {step}, after `freeze={self.freeze}` (step {self._freeze_step}), "
                "and the checkpoint holds no ranges: nothing could be quantized. Choose a later `freeze`, or resume "
                "from a checkpoint that was written with `QuantizationAwareTraining`."
            )

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        step, quantization = completed_steps(trainer), self.quantization
        if is_renewing_statistics(trainer):
            self._thaw()
            quantization.is_observing = quantization.is_quantizing
            return
        if step == self._warm_up_step and step != self._begun_step:
            quantization.ranges.reset()  # what the untrained network showed is no guide
        self._begun_step = step
        if step == self._start_step and not quantization.is_quantizing:
            check_finite_weights(quantization.model)
        quantization.is_quantizing = step >= self._start_step
        quantization.is_observing = self._is_observing(step)
        if quantization.is_quantizing and not quantization.is_learning and step < self._freeze_step:
            quantization.learn()
        if step >= self._freeze_step:
            if quantization.is_learning:
                quantization.stop_learning()
            frozen = freeze_batchnorm_(quantization.model)
            average_(running_statistics(frozen))
            self._frozen_norms += frozen

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._after_batch(trainer, pl_module)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _after_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        quantization = self.quantization
        was_observing, quantization.is_observing = quantization.is_observing, False
        if is_renewing_statistics(trainer) and was_observing:
            quantization.ranges.update()  # averaged weights have ranges of their own
            return
        step = completed_steps(trainer)
        if step == self._last_step:
            return  # gradient accumulation: the ranges of this step are not complete
        if was_observing:
            quantization.ranges.update()
            if len(quantization.ranges.unseen()) == len(quantization.ranges.names):
                raise self._never_called(pl_module)
            if quantization.is_quantizing and step == self._start_step + 1:
                _warn_of_one_sign(quantization.ranges.of_one_sign())
        if quantization.is_quantizing:
            quantization.clip_binary_()
        if quantization.is_learning:
            quantization.update_steps(self._share_left(step - 1))
            if was_observing:
                quantization.learn()
        self._last_step = step
        if not trainer.barebones:
            pl_module.log("compress/quantization_phase", float(self._phase(step - 1)))

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if brings_back_weights_alone(trainer):
            rank_zero_warn(
                "Processes that are spawned end with the fit and bring back the weights alone, not the scales: the "
                "module here computes in float. Load a checkpoint with `load_compressed_state(model, path)` to test "
                'what ships, or use `strategy="ddp"`.'
            )

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self._random.is_training = False
        quantization = self.quantization
        quantization.is_observing = False
        quantization.stop_learning()
        self._thaw()
        check_alike("scales and ranges", quantization.state_dict())
        if not quantization.is_quantizing:
            return
        unreached = quantization.unreached_layers()
        if unreached:
            rank_zero_warn(
                f"The training step never reached {len(unreached)} layers, which stay in float: "
                f"{', '.join(f'`{name}`' for name in unreached[:5])}. Leave them out with `exclude`, or call them."
            )
        dead = quantization.ranges.always_zero()
        if dead:
            rank_zero_warn(
                f"Nothing but zeros was observed at {', '.join(f'`{name}`' for name in dead[:5])}"
                f"{f' and {len(dead) - 5} more places' if len(dead) > 5 else ''}. What leads there is dead: it learns "
                "nothing and ships as zeros. Check the initialization and the learning rate."
            )

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._random.interrupt()
        if self._slot.quantization is not None:
            self._slot.quantization.is_observing = False
        self._thaw()

    def _thaw(self) -> None:
        """Let the batch norms train again: the next fit begins with them as this one did."""
        for norm in self._frozen_norms:
            norm.train()
        self._frozen_norms = []

    @property
    def _warm_up_step(self) -> int:
        return max(0, self._start_step - WARM_UP_STEPS)

    def _is_observing(self, step: int) -> bool:
        if step >= self._freeze_step and step > self._start_step:
            return False
        if step >= self._start_step:
            return step < self._start_step + SETTLING_STEPS or (step - self._start_step) % self.observe_every == 0
        if step == 0:
            return True  # shows at once whether the training step reaches the network
        return step >= self._warm_up_step and (step - self._warm_up_step) % WARM_UP_INTERVAL == 0

    def _share_left(self, step: int) -> float:
        """Return the share of the steps from start to freeze that is left: the step sizes' learning rate follows it."""
        return (self._freeze_step - step) / max(1, self._freeze_step - self._start_step)

    def _phase(self, step: int) -> int:
        if step >= self._start_step:
            return FROZEN if step >= self._freeze_step else QUANTIZED
        return OBSERVING if step >= self._warm_up_step else FLOAT

    def _prepare(self, pl_module: pl.LightningModule) -> None:
        if self._slot.quantization is None:
            self._slot.take(prepare(self._network(pl_module), self.scheme))

    def _take_up(self, pl_module: pl.LightningModule, is_new_run: bool) -> None:
        """Go on with what was prepared before, or begin anew where that was done with other settings."""
        found = quantization_of(pl_module)  # not the slot's: a part of the module may have been stripped
        if found is not None:
            module = next(name for name, child in pl_module.named_modules() if child is found.model) or None
            different = differences(
                {**found.scheme.as_dict(), "module": module}, {**self.scheme.as_dict(), "module": self.module}
            )
            if different and not is_new_run:
                raise CompressionError(
                    f"The module was quantized with {different[0]}, this callback has {different[1]}. Give it the same "
                    "settings, or leave it out: the module stays quantized without it."
                )
            if different:
                strip(found.model)
            found = None if different else found
        self._slot.quantization = found
        self._slot.module = self.module

    def _network(self, pl_module: pl.LightningModule) -> nn.Module:
        if self.module is None:
            return pl_module
        modules: dict[str, nn.Module] = dict(pl_module.named_modules())
        if self.module not in modules:
            children = ", ".join(f"`{name}`" for name, _ in pl_module.named_children())
            raise ValueError(
                f"`module={self.module!r}` is not a submodule of `{type(pl_module).__name__}`; its children are "
                f"{children}."
            )
        return modules[self.module]

    def _never_called(self, pl_module: pl.LightningModule) -> CompressionError:
        prepared = f"`{type(self.quantization.model).__name__}`"
        holders = [f'"{name}"' for name, child in pl_module.named_children() if weight_layers(child)]
        return CompressionError(
            f"`training_step` never called the forward of {prepared}, which was prepared for quantization, so its "
            f"quantizers saw no data. Call it in the step (`self(...)`), or point at the network that the step calls "
            f"with `QuantizationAwareTraining(module=...)`, one of {', '.join(holders) or 'its children'}."
        )


class QuantizationSlot:
    """Holds the quantization of a module for its checkpoints; what is loaded before it is prepared waits here.

    Attributes:
        quantization: The quantization, once the module is prepared.
        module: Name of the submodule that is quantized, or None for all of it.
    """

    def __init__(self) -> None:
        self.module: str | None = None
        self.quantization: Quantization | None = None
        self._waiting: dict[str, Any] | None = None

    def take(self, quantization: Quantization) -> None:
        """Hold ``quantization``, and hand it what was loaded before."""
        self.quantization = quantization
        if self._waiting is not None:
            quantization.load_state_dict(self._waiting)
            self._waiting = None

    def save(self) -> dict[str, Any]:
        """Return the state to write."""
        if self.quantization is None:
            return self._waiting or {}
        return {"module": self.module, **self.quantization.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """Take over a state that was read; an empty one leaves a network in float that has seen nothing."""
        if not state:
            self._waiting = None
            if self.quantization is not None:
                self.quantization.begin_anew()
            return
        check_same_settings({"module": state["module"]}, {"module": self.module})
        if self.quantization is None:
            self._waiting = state
        else:
            self.quantization.load_state_dict(state)


def _warn_of_one_sign(places: list[str]) -> None:
    if places:
        rank_zero_warn(
            f"With one bit the values at {', '.join(f'`{place}`' for place in places[:5])} are all alike, as every one "
            "that was observed has the same sign: what reads them learns nothing from them. Give the layers behind "
            'more bits, as by `overrides={"...": {"activation_bits": 8}}`, or values of both signs.'
        )
