"""`ChannelPruning`: channels that are masked gradually during a fit, and removed when it is exported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree
from typing_extensions import override

from lightning_compress.callbacks.checkpoint import attach_state, attached_state
from lightning_compress.callbacks.clock import total_steps
from lightning_compress.callbacks.forward_tap import ForwardTap
from lightning_compress.callbacks.gradual import GradualCompressor
from lightning_compress.callbacks.progress import ProgressLine
from lightning_compress.callbacks.quantization import QuantizationAwareTraining
from lightning_compress.callbacks.stripping import strip
from lightning_compress.copying import copy_of
from lightning_compress.errors import CompressionError
from lightning_compress.pruning.channels.groups import MAKES, find_channel_groups
from lightning_compress.pruning.channels.importance import IMPORTANCES, Importance, channel_importance, taylor_scores
from lightning_compress.pruning.channels.places import ChannelGroup
from lightning_compress.pruning.channels.plan import TOLERANCE, CostModel, Scope, least_cost, plan_channels
from lightning_compress.pruning.channels.state import ChannelState
from lightning_compress.quantization.dct import DCT
from lightning_compress.quantization.scheme import Scheme
from lightning_compress.report import model_statistics
from lightning_compress.schedules import resolve_step
from lightning_compress.selection import match_names
from lightning_compress.settings import plain

STATE_KEY = "channels"
"""Where the channels lie in a checkpoint: ``checkpoint["lightning_compress"]["channels"]``."""

BATCHES_HEARD = 16
"""Training batches in which the network must have been called."""


MAX_OTHER_CALLS = 3
"""Calls of the network in one training step that are followed beside the first."""


class ChannelPruning(GradualCompressor):
    """Prune whole channels gradually, until a share of the multiply-accumulates remains.

    After the first training batch one run of the network tells which channels can only go together: over residual
    additions, concatenations, depthwise and grouped convolutions, flattening into linear layers, and the heads and
    hidden layers of transformers. Between ``start`` and ``end`` the units of least importance are masked, a few more
    every ``update_every`` steps, on a cubic schedule: their weights are zeros where the channel is made and where it
    is read, and are set to zero again, with the optimizer's momentum and moments, after every optimizer step. Shapes
    do not change in the fit. `OnnxExport` removes the channels from the file, `shrink` from a copy of the module.

    Channels that the model returns, or that a norm over channels reads, stay; `left_alone` tells which and why. The
    share of the multiply-accumulates that remains is logged as ``compress/macs``. The state travels in every
    checkpoint.

    Args:
        macs: Share of the multiply-accumulates that remains, in (0, 1); 0.5 where ``parameters`` is not given either.
        start: When the first channels go: a share of the run (float) or optimizer steps (int). Before
            `QuantizationAwareTraining` starts: ranges and scales are found for the channels that are there.
        end: When the target is reached: a share of the run (float) or optimizer steps (int).
        importance: How units are ranked, see `lightning_compress.pruning.channels.importance`: ``"l1"``, ``"l2"``,
            ``"bn_scale"``, ``"taylor"``, ``"fpgm"`` or ``"random"``.
        round_to: What numbers of channels are a multiple of: runtimes like 8, 16 or 32. Groups of fewer than four
            times as many channels are rounded more finely.
        scope: ``"global"`` compares units of all groups, ``"layer"`` prunes every group to the same share.
        exclude: Patterns of names of layers whose output channels stay.
        parameters: Share of the parameters that remains, instead of ``macs``.
        floor: Least share of its channels that every group keeps, in (0, 1].
        budget: Least share of their channels that single layers keep, by patterns of their names, such as
            `SensitivityReport.channel_budget` gives; where several patterns match, the last one wins.
        module: Name of the submodule to prune; by default the network that the training step calls.
        update_every: Optimizer steps between two choices; None for at most 32 over the rise.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If ``start`` or ``end`` is neither a float nor an int.

    Example:
        >>> import warnings
        >>> from torch.utils.data import DataLoader
        >>> from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
        >>> class TwoLayers(BoringModel):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 2))
        >>> pruning, model = ChannelPruning(macs=0.5), TwoLayers()
        >>> trainer = pl.Trainer(max_epochs=1, callbacks=[pruning], accelerator="cpu", logger=False,
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ...     limit_val_batches=0)
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     trainer.fit(model, DataLoader(RandomDataset(32, 8)))
        >>> pruning.complete, pruning.remaining, pruning.widths
        (True, 0.5, {'layer.0': (64, 32)})
    """

    max_updates = 32
    clears_optimizers_each_step = True

    def __init__(
        self,
        macs: float | None = None,
        *,
        start: int | float = 0.0,
        end: int | float = 0.5,
        importance: Importance = "l2",
        round_to: int = 16,
        scope: Scope = "global",
        exclude: Sequence[str] = (),
        parameters: float | None = None,
        floor: float = 0.1,
        budget: Mapping[str, float] | None = None,
        module: str | None = None,
        update_every: int | None = None,
    ) -> None:
        macs, start, end, round_to = plain((macs, start, end, round_to))
        parameters, floor, budget, update_every = plain((parameters, floor, budget, update_every))
        if macs is not None and parameters is not None:
            raise ValueError(f"Give `macs` or `parameters`, got macs={macs} and parameters={parameters}.")
        self.macs = 0.5 if macs is None and parameters is None else macs
        self.parameters = parameters
        for name, share in (("macs", self.macs), ("parameters", parameters)):
            if share is not None and not isinstance(share, float):
                raise TypeError(f"`{name}` is the share that remains, a float, got {type(share).__name__}.")
            if share is not None and not 0.0 < share < 1.0:
                raise ValueError(f"`{name}` is the share that remains, in (0, 1), got {share}.")
        target = self.macs if self.macs is not None else parameters
        assert target is not None
        super().__init__(1.0 - target, start, end, update_every)
        if importance not in IMPORTANCES:
            raise ValueError(f"`importance` must be one of {', '.join(IMPORTANCES)}, got {importance!r}.")
        if scope not in ("global", "layer"):
            raise ValueError(f'`scope` must be "global" or "layer", got {scope!r}.')
        if not isinstance(round_to, int):
            raise TypeError(f"`round_to` is a number of channels, an int, got {type(round_to).__name__}.")
        if round_to < 1:
            raise ValueError(f"`round_to` must be at least 1 channel, got {round_to}.")
        for name, share in (("floor", floor), *((f"budget[{key!r}]", value) for key, value in (budget or {}).items())):
            if not 0.0 < share <= 1.0:
                raise ValueError(f"`{name}` is the least share of channels that stay, in (0, 1], got {share}.")
        self.importance: Importance = importance
        self.round_to = round_to
        self.scope: Scope = scope
        self.exclude = plain(exclude)
        self.floor = floor
        self.budget = dict(budget or {})
        self.module = module
        self._state = ChannelState()
        self._tap: ForwardTap | None = None
        self._n_heard = 0
        self._cost: CostModel | None = None
        self._remaining = 1.0

    @property
    @override
    def complete(self) -> bool:
        """Whether the target is reached."""
        return self._state.complete

    @property
    @override
    def has_begun(self) -> bool:
        """Whether a channel is masked."""
        return self._state.has_removed

    @override
    def shortfall(self, pl_module: pl.LightningModule) -> str:
        """Return the share of the cost that is left, and when the target would have been reached."""
        return (
            f"`ChannelPruning` had {self._remaining:.3f} of the {self._what} left, and "
            f"{1.0 - self._schedule.final:.3f} was due after step {self._rise.end_step}"
        )

    @property
    def remaining(self) -> float:
        """The share of the multiply-accumulates, or of the parameters where these are the target, that remains."""
        return self._remaining

    @property
    def left_alone(self) -> dict[str, str]:
        """Why the output channels of layers stay, by the layer's name."""
        return {self._full_name(name): reason for name, reason in self._state.left_alone.items()}

    @property
    def widths(self) -> dict[str, tuple[int, int]]:
        """How many units each group had and has, by the name of the layer that makes them."""
        return {
            self._full_name(group.name): (group.n_units, int(mask.sum()))
            for group, mask in zip(self._state.groups, self._state.kept, strict=True)
        }

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, QuantizationAwareTraining):
                check_transform(callback.scheme)
            if isinstance(callback, QuantizationAwareTraining) and type(callback.start) is type(self.start):
                self._check_order(float(self.start), float(callback.start))
        # The channels belong to the module: a second fit finds them, a deep copy of the module has its own.
        self._state = attached_state(pl_module, STATE_KEY, ChannelState) or ChannelState()
        self._state.settings = self._settings
        attach_state(pl_module, STATE_KEY, self._state.save, self._state.load)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._remove_tap()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, QuantizationAwareTraining):
                self._check_order(
                    self._rise.begin_step, resolve_step("start", callback.start, total_steps(trainer)), " (steps)"
                )
        step = self._last_step
        if step == 0:
            self._state.forget()  # a new run begins anew
        self._cost, self._remaining = None, 1.0
        if self._state.groups:
            self._measure(pl_module)
            if step >= self._rise.end_step and not self.complete:
                self._update(trainer, pl_module, step)
        else:
            self._tap, self._n_heard = ForwardTap(pl_module, self.module), 0

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._tap is not None:
            self._tap.start()

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        self._sum_up_scores(pl_module)

    def _sum_up_scores(self, pl_module: pl.LightningModule) -> None:
        if self.importance != "taylor" or self.complete or not self._state.groups:
            return
        network, sums = pl_module.get_submodule(self._state.module), self._state.taylor
        for name, scores in taylor_scores(network, self._state.groups).items():
            scores = torch.nan_to_num(scores, nan=0.0, posinf=0.0)  # an overflow under a loss scale
            sums[name] = sums[name] + scores if name in sums else scores

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._tap is not None:
            self._find_groups(pl_module)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._remove_tap()
        super().on_train_end(trainer, pl_module)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._remove_tap()

    @property
    @override
    def _progress(self) -> tuple[str, float]:
        return f"compress/{'macs' if self.macs is not None else 'parameters'}", self._remaining

    @property
    @override
    def _decisions(self) -> tuple[str, Any]:
        return "masked channels", self._state.kept

    @property
    @override
    def _is_ready(self) -> bool:
        return bool(self._state.groups)

    @override
    def _project(self, module: nn.Module, *optimizers: Optimizer) -> None:
        self._state.apply_(module, *optimizers)

    @property
    def _settings(self) -> dict[str, Any]:
        """What a checkpoint must agree on; a schedule may change, as when a run is made longer."""
        return {
            "macs": self.macs,
            "parameters": self.parameters,
            "importance": self.importance,
            "round_to": self.round_to,
            "scope": self.scope,
            "exclude": list(self.exclude),
            "floor": self.floor,
            "budget": self.budget,
            "module": self.module,
        }

    @property
    def _what(self) -> str:
        return "multiply-accumulates" if self.macs is not None else "parameters"

    def _check_order(self, start: float, quantization_start: float, unit: str = "") -> None:
        if start >= quantization_start:
            raise ValueError(
                f"`ChannelPruning` starts at {start:g} and `QuantizationAwareTraining` at {quantization_start:g}{unit}."
                " Prune first and quantize then: ranges and scales are found for the channels that are there. Choose "
                "an earlier `start` for `ChannelPruning`, or a later one for `QuantizationAwareTraining`."
            )

    def _full_name(self, name: str) -> str:
        return f"{self._state.module}.{name}" if self._state.module else name

    def _find_groups(self, pl_module: pl.LightningModule) -> None:
        """Find the groups with the arguments that the training step has just called the network with."""
        assert self._tap is not None
        self._n_heard += 1
        if not self._tap.calls_so_far() and self._n_heard < BATCHES_HEARD:
            return  # a step may skip a batch
        call, *others = self._tap.calls()
        args, kwargs = pytree.tree_map_only(Tensor, _plain_input, (call.args, call.kwargs))
        other_calls = pytree.tree_map_only(
            Tensor, _plain_input, [(other.args, other.kwargs) for other in others[:MAX_OTHER_CALLS]]
        )
        self._remove_tap()
        state, network = self._state, pl_module.get_submodule(call.name)
        with ProgressLine("ChannelPruning") as progress:
            progress.tell("finding which channels go together")
            alone = strip(copy_of(network)).cpu().float()
            whole = self._outside(pl_module, network, alone)
            found = find_channel_groups(alone, args, kwargs, self.exclude, whole, other_calls)
            state.module, state.groups, state.costs = call.name, found.groups, found.costs
            state.total_cost = model_statistics(alone, args, kwargs).macs
            state.left_alone = found.left_alone
        if not state.groups:
            reasons = "; ".join(f"`{name}`: {reason}" for name, reason in list(self.left_alone.items())[:3])
            raise CompressionError(
                f"`{type(network).__name__}` has no channels that could be pruned ({reasons}). "
                "Exclude fewer layers, or leave `ChannelPruning` out."
            )
        state.clear()
        self._sum_up_scores(pl_module)
        self._measure(pl_module)
        self._check_reachable()
        rank_zero_info(
            f"`ChannelPruning` can prune {sum(group.n_units for group in state.groups)} units in {len(state.groups)} "
            f"groups of channels; the outputs of {len(self.left_alone)} layers stay (see `left_alone`)."
        )

    def _outside(self, pl_module: nn.Module, network: nn.Module, alone: nn.Module) -> nn.Module:
        """Return the whole of which ``alone``, a copy of ``network``, is a part, for what else uses its layers."""
        if network is pl_module:
            return alone
        whole = nn.Module()
        twins = {id(p): twin for p, twin in zip(network.parameters(), alone.parameters(), strict=True)}
        whole.add_module("network", alone)
        inside = {id(module) for module in network.modules()}
        for name, module in pl_module.named_modules():
            holds_it = any(child is network for child in module.modules())
            if id(module) in inside or holds_it:
                continue
            other = nn.Module()
            shared = [twins[id(p)] for p in module.parameters(recurse=False) if id(p) in twins]
            for number, parameter in enumerate(shared):
                other.register_parameter(str(number), parameter)
            if shared:
                whole.add_module(name.replace(".", "/"), other)
        return whole

    def _measure(self, pl_module: pl.LightningModule) -> None:
        network = pl_module.get_submodule(self._state.module)
        costs = self._state.costs if self.macs is not None else None
        self._cost = CostModel(network, self._state.groups, costs, self._state.total_cost)
        self._count()

    def _count(self) -> None:
        assert self._cost is not None
        state = self._state
        shares = [int(mask.sum()) / group.n_units for group, mask in zip(state.groups, state.kept, strict=True)]
        self._remaining = self._cost(shares) / self._cost.total

    def _floors(self) -> list[float]:
        """Return the least share of units that stays, for each group."""
        # A group goes by its own name too, where its first layer makes channels of several groups.
        names = {group: dict.fromkeys([group.name, *_makers(group)]) for group in self._state.groups}
        known = [self._full_name(name) for its_names in names.values() for name in its_names]
        floors = dict.fromkeys(known, self.floor)
        for pattern, share in self.budget.items():
            for name in match_names(known, [pattern], "budget"):
                floors[name] = share
        return [max(floors[self._full_name(name)] for name in names[group]) for group in self._state.groups]

    def _check_reachable(self) -> None:
        assert self._cost is not None
        target = 1.0 - self._schedule.final
        least = least_cost(self._state.groups, self._cost, 1, self._floors())
        if least > target + TOLERANCE:
            name = "macs" if self.macs is not None else "parameters"
            raise CompressionError(
                f"`{name}={target:g}` cannot be reached: with every group at its floor {least:.3f} of the {self._what} "
                f"remain. Ask for `{name}={least + 0.005:.2f}` or more, lower `floor` or `budget`, or exclude fewer "
                "layers."
            )

    @override
    def _update(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        """Mask the units that are worth least, as many as the schedule wants by now."""
        assert self._cost is not None
        state = self._state
        network = pl_module.get_submodule(state.module)
        scores = channel_importance(network, state.groups, self.importance, taylor=state.taylor)
        state.kept = plan_channels(
            state.groups,
            scores,
            state.kept,
            self._cost,
            1.0 - self._schedule(step),
            final_target=1.0 - self._schedule.final,
            scope=self.scope,
            round_to=self.round_to,
            floors=self._floors(),
        )
        state.complete = step >= self._rise.end_step
        self._apply(trainer, pl_module, *trainer.optimizers)
        self._count()

    def _remove_tap(self) -> None:
        if self._tap is not None:
            self._tap.remove()
            self._tap = None


def check_transform(scheme: Scheme) -> None:
    """Check that channels can be removed under a scheme.

    Raises:
        ValueError: If inputs are transformed in blocks, so that what one channel holds depends on others.

    Example:
        >>> check_transform(Scheme(weight_transform="dct"))
    """
    transform = scheme.weight_transform
    if isinstance(transform, DCT) and transform.block is not None:
        raise ValueError(
            f"`weight_transform={transform}` transforms {transform.block} inputs of a layer together: where channels "
            "are removed, the coefficients of the others would change. Transform kernels alone with "
            '`weight_transform="dct"`.'
        )


def _plain_input(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    return tensor.float() if tensor.is_floating_point() else tensor


def _makers(group: ChannelGroup) -> list[str]:
    return [member.module for member in group.members if member.side in MAKES]
