"""`sensitivity`: one layer after the other is pruned or rounded alone, and the user's validation says what it costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from typing_extensions import override

from lightning_compress.callbacks.file_metric import quiet_lightning
from lightning_compress.callbacks.forward_tap import ForwardTap
from lightning_compress.callbacks.progress import ProgressLine
from lightning_compress.callbacks.stripping import strip
from lightning_compress.copying import copy_of
from lightning_compress.pruning.channels.groups import find_channel_groups
from lightning_compress.pruning.channels.importance import Importance, channel_importance
from lightning_compress.pruning.channels.places import ChannelGroup, removed_places
from lightning_compress.quantization.weights import WeightQuantizer
from lightning_compress.report.sensitivity import SensitivityReport, SensitivityRow
from lightning_compress.selection import TRANSPOSED_LAYERS, weight_layers


def sensitivity(
    model: pl.LightningModule,
    datamodule: Any,
    metric: str,
    *,
    channels: Sequence[float] = (0.75, 0.5, 0.25),
    bits: Sequence[int] = (4, 2),
    higher_is_better: bool = True,
    importance: Importance = "l2",
    limit_batches: int | float = 1.0,
) -> SensitivityReport:
    """Prune the channels of one group, or round the weights of one layer, at a time, and measure what that costs.

    Every trial is a validation of a copy of ``model`` by its own ``validation_step``; nothing is trained. Channels go
    by ``importance``; weights are rounded per output channel with the least squared error. ``model`` stays as it is.

    Args:
        model: A trained LightningModule; what is quantized or masked in it is taken as it stands, in float.
        datamodule: A LightningDataModule with a validation loader, or the loader itself.
        metric: Name of a metric that the validation step logs.
        channels: Shares of channels that stay, in (0, 1); empty to leave channels out.
        bits: Bits of weights, 2 to 8; empty to leave rounding out.
        higher_is_better: Whether a larger value of the metric is better.
        importance: How units are ranked, see `channel_importance`.
        limit_batches: Validation batches of each trial: a number (int) or a share (float).

    Returns:
        The report: tables, a picture, a budget for `ChannelPruning` and bits for `QuantizationAwareTraining`.

    Raises:
        ValueError: If a share or bits are out of range, ``importance`` needs gradients, or the validation step does
            not log ``metric``.
        CompressionError: If it cannot be told which network the validation step calls.

    Example:
        >>> report = sensitivity(model, datamodule, "val_acc")  # doctest: +SKIP
        >>> print(report.to_text())  # doctest: +SKIP
        >>> ChannelPruning(macs=0.5, budget=report.channel_budget(max_drop=0.02))  # doctest: +SKIP
        >>> QuantizationAwareTraining(overrides=report.weight_bits(max_drop=0.01))  # doctest: +SKIP
    """
    for share in channels:
        if not 0.0 < share < 1.0:
            raise ValueError(f"`channels` are shares that stay, in (0, 1), got {share}.")
    for number in bits:
        if not 2 <= number <= 8:
            raise ValueError(f"`bits` must be 2 to 8, got {number}.")
    if importance == "taylor":
        raise ValueError('`importance="taylor"` needs the gradients of a training. Choose another one.')
    module = strip(copy_of(model))
    assert isinstance(module, pl.LightningModule)
    trial = _Trial(module, datamodule, metric, limit_batches)
    with ProgressLine("sensitivity") as progress:
        progress.tell("the model as it is")
        baseline, (name, args, kwargs) = trial.first()
        network = module.get_submodule(name)
        prefix = f"{name}." if name else ""
        rows: list[SensitivityRow] = []
        if channels:
            alone = copy_of(network).cpu().float()
            groups = find_channel_groups(alone, args, kwargs).groups
            scores = channel_importance(alone, groups, importance)
            for number, group in enumerate(groups):
                for share in channels:
                    progress.tell(f"channels of {prefix}{group.name}, {number + 1} of {len(groups)}")
                    with _masked(network, group, scores[group.name], share):
                        rows.append(SensitivityRow(prefix + group.name, "channels", share, trial.run()))
        layers = weight_layers(network) if bits else {}
        for number, (layer_name, layer) in enumerate(layers.items()):
            for n_bits in bits:
                progress.tell(f"weights of {prefix}{layer_name}, {number + 1} of {len(layers)}")
                with _rounded(layer, n_bits):
                    rows.append(SensitivityRow(prefix + layer_name, "bits", n_bits, trial.run()))
    return SensitivityReport(metric, baseline, higher_is_better, tuple(rows))


class _Trial:
    """Validations of one module, each on the same batches."""

    def __init__(self, module: pl.LightningModule, datamodule: Any, metric: str, limit_batches: int | float) -> None:
        self.module = module
        self.metric = metric
        self.limit_batches = limit_batches
        is_module = isinstance(datamodule, pl.LightningDataModule)
        self.data = {"datamodule": datamodule} if is_module else {"dataloaders": datamodule}

    def run(self, callback: pl.Callback | None = None) -> float:
        """Return the metric of the module as it is now."""
        with quiet_lightning():
            trainer = pl.Trainer(
                accelerator="auto",
                devices=1,
                logger=False,
                callbacks=[] if callback is None else [callback],
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                limit_val_batches=self.limit_batches,
            )
            found = trainer.validate(self.module, **self.data, verbose=False)
        value = next((float(row[self.metric]) for row in found if self.metric in row), None)
        if value is None:
            logged = ", ".join(f"`{name}`" for row in found for name in row) or "nothing"
            raise ValueError(
                f"The validation step of `{type(self.module).__name__}` does not log `{self.metric}`; it logs {logged}."
            )
        return value

    def first(self) -> tuple[float, tuple[str, tuple[Any, ...], dict[str, Any]]]:
        """Return the metric, and a call of the network: its name and arguments."""
        listener = _Listener(self.module)
        try:
            metric = self.run(listener)
        finally:
            listener.tap.remove()
        assert listener.call is not None
        return metric, listener.call


class _Listener(pl.Callback):
    """Keeps the first call of the network in a validation."""

    def __init__(self, module: nn.Module) -> None:
        self.tap = ForwardTap(module)
        self.call: tuple[str, tuple[Any, ...], dict[str, Any]] | None = None

    @override
    def on_validation_batch_start(self, *args: Any, **kwargs: Any) -> None:
        if self.call is None:
            self.tap.start()

    @override
    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        if self.call is None:
            heard = self.tap.calls()[0]
            on_cpu = pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().cpu(), (heard.args, heard.kwargs))
            self.call = (heard.name, *on_cpu)
            self.tap.reset()


@contextmanager
def _masked(network: nn.Module, group: ChannelGroup, scores: Tensor, share: float) -> Iterator[None]:
    """Mask the least important units of a group, as many of each block, for as long as the block lasts."""
    n_kept = max(group.n_blocks, round(share * group.n_units / group.n_blocks) * group.n_blocks)
    mask = torch.zeros(group.n_units, dtype=torch.bool)
    mask[group.ranked(scores)[:n_kept]] = True
    places = removed_places(network, [group], [mask])
    saved = {place.parameter: network.get_parameter(place.parameter).detach().clone() for place in places}
    for place in places:
        place.clear_(network.get_parameter(place.parameter))
    try:
        yield
    finally:
        for name, value in saved.items():
            network.get_parameter(name).data.copy_(value)


@contextmanager
def _rounded(layer: nn.Module, bits: int) -> Iterator[None]:
    """Round the weights of a layer for as long as the block lasts."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    saved = weight.detach().clone()
    quantizer = WeightQuantizer(bits, axis=int(isinstance(layer, TRANSPOSED_LAYERS)), method="mse")
    with torch.no_grad():
        weight.copy_(quantizer.rounded(saved))
    try:
        yield
    finally:
        weight.data.copy_(saved)
