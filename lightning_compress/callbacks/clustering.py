"""`WeightClustering`: weights that share a few values, which are trained on as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_compress.callbacks.checkpoint import attach_state, attached_state
from lightning_compress.callbacks.clock import total_steps
from lightning_compress.callbacks.gradual import GradualCompressor
from lightning_compress.callbacks.trainers import has_late_layers
from lightning_compress.clustering.kmeans import INITS, Init
from lightning_compress.clustering.state import (
    GRADIENTS,
    PERS,
    ClusteringState,
    Gradient,
    Per,
    books_of,
    check_enough_weights,
    cluster_codes,
)
from lightning_compress.errors import CompressionError
from lightning_compress.schedules import resolve_step
from lightning_compress.selection import match_names, plain_weights
from lightning_compress.settings import plain

STATE_KEY = "clustering"
"""Where the codes lie in a checkpoint: ``checkpoint["lightning_compress"]["clustering"]``."""

MOST_CLUSTERS = 4096


class WeightClustering(GradualCompressor):
    """Let the weights of a layer share a few values, and train these (Han, Mao & Dally 2016, arXiv:1510.00149).

    At ``start`` the weights that are not zero are clustered by one-dimensional k-means, and every weight takes the
    value of its centroid. From then on all members of a cluster have one gradient, one momentum and one value: a
    centroid is trained like a single weight. Zeros, as of `MagnitudePruning`, stay zeros and need no centroid, so prune
    before. The weights of convolution and linear layers are clustered, biases and normalisations never.

    The parameters stay plain leaf parameters under their own names; which weights are one travels in every checkpoint
    of the module. `save_compressed`, `Archive` and the exported ONNX file keep a table of values and small indices.

    Args:
        n_clusters: Values of a codebook besides zero, 2 to 4096. In an ONNX file up to 16 values take four bits a
            weight, and up to 256 eight, the zero of pruned weights counted.
        start: When the weights are clustered: a share of the run (float) or optimizer steps (int).
        per: What shares a codebook: a ``"layer"``, an output ``"channel"``, or a ``"group"`` of output channels.
        group_size: Output channels of a group.
        init: How centroids begin: evenly spaced (``"linear"``, best in the paper, as it keeps large weights),
            ``"density"``, ``"random"``, or ``"kmeans++"``.
        gradient: What a centroid learns from: the ``"mean"`` of its members' gradients, at which a learning rate means
            what it means without clusters; or their ``"sum"``, the derivative of the loss by the centroid, as in the
            paper, for which the learning rate must be smaller by the number of members. To optimizers that divide by
            the gradient's size, such as Adam, the two are nearly the same.
        overrides: Other numbers of clusters, by patterns of layer names; the last that matches counts.
        exclude: Patterns of layer names to leave out; a pattern covers everything below the name it matches.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If ``start`` is neither a float nor an int, or a number of clusters no int.

    Example:
        >>> clustering = WeightClustering(n_clusters=32, start=0.5, overrides={"conv*": 256})
        >>> trainer = pl.Trainer(max_epochs=3, callbacks=[clustering], logger=False)  # trainer.fit(model, data)
    """

    max_updates = 1
    clears_optimizers_each_step = False

    def __init__(
        self,
        n_clusters: int = 16,
        *,
        start: int | float = 0.5,
        per: Per = "layer",
        group_size: int = 32,
        init: Init = "linear",
        gradient: Gradient = "mean",
        overrides: Mapping[str, int] | None = None,
        exclude: Sequence[str] = (),
    ) -> None:
        n_clusters, start, group_size = plain((n_clusters, start, group_size))
        super().__init__(1.0, start, start, None)
        self.overrides = dict(plain(overrides or {}))
        for name, number in (("n_clusters", n_clusters), *self.overrides.items()):
            if isinstance(number, bool) or not isinstance(number, int):
                raise TypeError(f"`{name}` is a number of clusters, an int, got {type(number).__name__}.")
            if not 2 <= number <= MOST_CLUSTERS:
                raise ValueError(f"`{name}` is a number of clusters, 2 to {MOST_CLUSTERS}, got {number}.")
        for name, value, known in (("per", per, PERS), ("init", init, INITS), ("gradient", gradient, GRADIENTS)):
            if value not in known:
                raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {value!r}.")
        if group_size < 1:
            raise ValueError(f"`group_size` must be at least 1 output channel, got {group_size}.")
        self.n_clusters = n_clusters
        self.per: Per = per
        self.group_size = group_size
        self.init: Init = init
        self.gradient: Gradient = gradient
        self.exclude = plain(exclude)
        self._state = ClusteringState()
        self._clusters: dict[str, int] = {}
        self._n_values = 0.0

    @property
    @override
    def complete(self) -> bool:
        """Whether the weights are clustered."""
        return bool(self._state.codes)

    @property
    @override
    def has_begun(self) -> bool:
        """Whether the weights are clustered."""
        return bool(self._state.codes)

    @override
    def shortfall(self, pl_module: pl.LightningModule) -> str:
        """Return when the weights would have been clustered."""
        return f"`WeightClustering` left the weights as they are, as they were due after step {self._rise.end_step}"

    @property
    def n_values(self) -> dict[str, int]:
        """How many different values each layer's weights have, zero not counted; empty before ``start``."""
        return self._state.n_values()

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._state = attached_state(pl_module, STATE_KEY, ClusteringState) or ClusteringState()
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
        if self._last_step == 0:
            self._state.clear()  # a new run follows its schedule from the beginning
        self._check_others_end(trainer)
        self._check_codes_fit(pl_module)
        self._count()
        overdue = self._last_step >= self._rise.begin_step and not self.complete
        if overdue and all(other.complete for other in self._others(trainer)):  # else after the first step
            self._update(trainer, pl_module, self._last_step)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Give the members of each cluster one gradient, before it is clipped."""
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        weights = self._weights(pl_module)
        self._state.unite_gradients_(weights, self.gradient, [n for n, weight in weights.items() if id(weight) in held])

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_end(trainer, pl_module)
        self._state.rest()

    @property
    def _settings(self) -> dict[str, Any]:
        """What a checkpoint must agree on; ``start`` may change, as when a run is made longer."""
        return {
            "n_clusters": self.n_clusters,
            "per": self.per,
            "group_size": self.group_size,
            "init": self.init,
            "gradient": self.gradient,
            "overrides": self.overrides,
            "exclude": list(self.exclude),
        }

    @property
    @override
    def _progress(self) -> tuple[str, float]:
        return "compress/n_values", self._n_values

    @property
    @override
    def _decisions(self) -> tuple[str, Any]:
        return "codes of clustered weights", self._state.codes

    @override
    def _project(self, module: nn.Module, *optimizers: Optimizer) -> None:
        self._state.apply_(self._weights(module), *optimizers)

    @override
    def _update(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        for other in self._others(trainer):
            if not other.complete:  # it comes after this callback, and ends with this very step
                other._update(trainer, pl_module, step)
            other._project(pl_module)  # the optimizer's step has moved its zeros
        weights = self._weights(pl_module)
        self._state.clear()
        self._state.codes = {
            name: cluster_codes(name, weight, self._books(pl_module, name), self._clusters[name], self.init)
            for name, weight in weights.items()
        }
        self._apply(trainer, pl_module, *trainer.optimizers)
        self._count()

    def _count(self) -> None:
        self._n_values = float(max(self._state.n_values().values(), default=0))

    def _others(self, trainer: pl.Trainer) -> list[GradualCompressor]:
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        return [one for one in callbacks if isinstance(one, GradualCompressor) and one is not self]

    def _check_others_end(self, trainer: pl.Trainer) -> None:
        for other in self._others(trainer):
            end_step = resolve_step("end", other.end, total_steps(trainer))
            if end_step > self._rise.begin_step:
                raise ValueError(
                    f"`WeightClustering` clusters the weights after step {self._rise.begin_step}, before "
                    f"`{type(other).__name__}` has made its last zeros after step {end_step}: they would be taken into "
                    f"clusters. Let it end before: `WeightClustering(start={other.end})` or later."
                )

    def _select_layers(self, pl_module: pl.LightningModule) -> None:
        weights = plain_weights(pl_module, self.exclude)
        if not weights:
            raise CompressionError(
                f"`{type(pl_module).__name__}` has no convolution or linear layer to cluster. "
                "Give it one, or exclude fewer."
            )
        self._clusters = dict.fromkeys(weights, self.n_clusters)
        for pattern, number in self.overrides.items():
            self._clusters |= dict.fromkeys(match_names(weights, [pattern], "overrides"), number)
        for name, weight in weights.items():
            check_enough_weights(name, weight, self._books(pl_module, name), self._clusters[name])

    def _books(self, pl_module: nn.Module, name: str) -> Tensor:
        return books_of(pl_module.get_submodule(name), self.per, self.group_size)

    def _weights(self, pl_module: nn.Module) -> dict[str, nn.Parameter]:
        return {name: pl_module.get_parameter(f"{name}.weight") for name in self._clusters}

    def _check_codes_fit(self, pl_module: pl.LightningModule) -> None:
        found = {name: tuple(codes.shape) for name, codes in self._state.codes.items()}
        ours = {name: tuple(weight.shape) for name, weight in self._weights(pl_module).items()}
        if found and found != ours:
            raise CompressionError(
                f"The checkpoint holds clusters of the layers {sorted(found)}, but this run clusters {sorted(ours)}. "
                "Resume with the model and the `exclude` of the run that wrote it."
            )
