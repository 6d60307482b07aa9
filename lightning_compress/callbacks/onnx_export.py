"""`OnnxExport`: the ONNX file at fit end, proved, measured and reported."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from typing_extensions import override

from lightning_compress.callbacks.archive import Archive
from lightning_compress.callbacks.channel_pruning import STATE_KEY as CHANNELS_KEY
from lightning_compress.callbacks.checkpoint import attached_state
from lightning_compress.callbacks.clock import completed_steps
from lightning_compress.callbacks.compacting import check_compacted, compact, compact_record, lost_layers
from lightning_compress.callbacks.complete_weights import Weights, chosen_weights
from lightning_compress.callbacks.compressor import Exporter, ended_early, has_begun, is_complete
from lightning_compress.callbacks.export_paths import (
    check_writable,
    keep_weights,
    kept_weights,
    marked_incomplete,
    writes_nothing,
)
from lightning_compress.callbacks.file_metric import FileForward
from lightning_compress.callbacks.forward_tap import ForwardTap
from lightning_compress.callbacks.own_validation import own_trainer, validated, validation_loaders
from lightning_compress.callbacks.progress import ProgressLine
from lightning_compress.callbacks.random_state import RandomState, attach_random_state
from lightning_compress.callbacks.shrinking import check_shrunk, shrink
from lightning_compress.callbacks.trainers import check_trainer
from lightning_compress.copying import copy_of
from lightning_compress.errors import CompressionError, MissingExtraError
from lightning_compress.export import ExportResult, export_onnx
from lightning_compress.export.arguments import CallArguments, plain_tensor, tensors_of
from lightning_compress.export.onnx import write_onnx
from lightning_compress.export.parts import UnexportableError
from lightning_compress.export.session import import_onnxruntime, open_session
from lightning_compress.processes import odd_ranks
from lightning_compress.pruning.channels.state import ChannelState
from lightning_compress.quantization import quantization_of, strip
from lightning_compress.report import (
    History,
    Metric,
    RunReport,
    compare_latency,
    file_sizes,
    model_statistics,
    plot_run,
)
from lightning_compress.unfinished import remove_leftovers

READ_EVERY = 50
"""Steps between two readings of logged values: reading one waits for the device."""

VERIFY_SAMPLES = 256
"""Validation samples that the file is compared on, at most."""


class OnnxExport(Exporter):
    """Write the trained network to an ONNX file when the fit ends, prove it in ONNX Runtime, measure it, report it.

    The file is written from a deep copy, on rank 0; the live module still trains, tests and saves. Masked channels are
    left out, and small layers stand for shared and factorised ones, see `shrink` and `compact`. A quantized network
    becomes standard QuantizeLinear/DequantizeLinear with int8 weights, any other a float file. It is then compared with
    the network on real validation batches, and read back from ONNX Runtime's own optimized graph to tell what runs in
    integers. A failure of any of this is an error at the end of the fit; the file stays, and the trained weights are
    saved next to it as ``<name>.onnx.ckpt`` first.

    Where the fit ends before the full compression, as by `EarlyStopping` or ``max_time``, the file at ``path`` is left
    as it is: the network is written next to it, to ``<stem>.incomplete.onnx``, and a warning tells what is missing.

    A table is printed; ``report.json`` and, with the `plots` extra, ``report.png`` lie next to the file.

    Args:
        path: The file to write; its folder is made where missing.
        weights: ``"last"``, or ``"best"``: the best checkpoint of the Trainer's `ModelCheckpoint` among those that
            had reached the full compression.
        metric: Name of a metric that the validation step logs, such as ``"val_acc"``. It is reported before
            compression, after it, and for the file itself, by the user's own validation step on ONNX Runtime.
        module: Name of the submodule to export; by default the LightningModule if its steps call it, else the one
            child that holds all layers.
        latency: Whether to time the file against its fp32 form.

    Raises:
        ValueError: If ``weights`` is none of the two.

    Attributes:
        result: The file with its parity and audit; None before the fit has ended.
        report: The report; None before the fit has ended.

    Example:
        >>> export = OnnxExport("model.onnx", metric="val_acc")
        >>> trainer = pl.Trainer(max_epochs=3, callbacks=[export], logger=False)  # trainer.fit(model, data)
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        weights: Weights = "last",
        metric: str | None = None,
        module: str | None = None,
        latency: bool = True,
    ) -> None:
        super().__init__()
        if weights not in ("last", "best"):
            raise ValueError(f'`weights` must be "last" or "best", got {weights!r}.')
        self.path = Path(path)
        self._target = self.path
        self.weights = weights
        self.metric = metric
        self.module = module
        self.latency = latency
        self.result: ExportResult | None = None
        self.report: RunReport | None = None
        self.history = History()
        self._tap: ForwardTap | None = None
        self._calls: list[CallArguments] = []
        self._called = ""
        self._are_calls_validated = False
        self._has_stepped = False
        self._metric_before: float | None = None
        self._metric_after: float | None = None
        self._last_step = -1
        self._unread: list[tuple[int, dict[str, Any]]] = []
        self._random = RandomState()
        self._notes: list[str] = []

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        check_trainer(trainer, self)
        self._random = attach_random_state(pl_module)
        import_onnxruntime()
        if trainer.is_global_zero and not writes_nothing(trainer):
            for path in (self.path, self.path.with_name("report.json"), self.path.with_name("report.png")):
                check_writable(path, "OnnxExport")
            remove_leftovers(kept_weights(self.path))

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._remove_tap()
        self._tap = ForwardTap(pl_module, self.module)
        self._calls = []
        self._are_calls_validated = self._has_stepped = False
        self._metric_after = None
        self._random.restore()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._random.begin(trainer)
        if completed_steps(trainer) == 0:  # a new run
            self.history = History()
            self._metric_before, self._last_step, self._unread = None, -1, []

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._has_stepped = True
        if self._tap is not None and not self._calls:
            self._tap.start()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._calls:
            self._collect()
        step = completed_steps(trainer)
        if step == self._last_step:
            return
        self._last_step = step
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        metrics = trainer.callback_metrics
        values = {
            "train_loss": loss,
            "distillation_loss": metrics.get("compress/distillation_loss"),
            "sparsity": metrics.get("compress/sparsity"),
            "phase": metrics.get("compress/quantization_phase"),
        }
        self._unread.append((step, values))
        if len(self._unread) >= READ_EVERY:
            self._read()

    @override
    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._are_calls_validated = False

    @override
    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._tap is not None and not trainer.sanity_checking and self._wants_more():
            self._tap.start()

    @override
    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._tap is not None and not trainer.sanity_checking and self._wants_more():
            heard = self._tap.calls_so_far()
            if heard and not self._are_calls_validated:
                self._calls = []  # of training batches
                self._are_calls_validated = True
            self._collect()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        value = _number(trainer.callback_metrics.get(self.metric)) if self.metric is not None else None
        if value is None or trainer.sanity_checking or self.metric is None:
            return
        if not has_begun(trainer):
            self._metric_before = value
        self.history.append(completed_steps(trainer), **{self.metric: value})

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._random.is_training = False
        self._read()
        self._remove_tap()
        # Not the buffers: batch norms may count on every process by themselves.
        if odd := odd_ranks(dict(pl_module.named_parameters())):
            rank_zero_warn(
                f"The weights of rank {odd} are not those of rank 0, which `OnnxExport` writes: the processes have "
                "trained different networks. It happens where parameters are unfrozen after the strategy has wrapped "
                "the module, as by `BackboneFinetuning` under DDP, whose gradients are then never exchanged."
            )

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._random.interrupt()
        self._remove_tap()

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        if writes_nothing(trainer):
            rank_zero_info(f"`OnnxExport` writes nothing in a `fast_dev_run`: {self.path} is left as it is.")
            return
        self._target, self._notes = self.path, []
        if not is_complete(trainer):
            self._target, self._notes = marked_incomplete(self.path), [ended_early(trainer)]
            rank_zero_warn(
                f"{self._notes[0]} The incomplete network goes to {self._target}; {self.path} is left as it is. Resume "
                "the run to finish, or choose earlier moments."
            )
        try:
            self._export(trainer, pl_module)
        except BaseException:
            keep_weights(trainer, pl_module, kept_weights(self._target))
            raise

    @override
    def state_dict(self) -> dict[str, Any]:
        self._read()
        return {"history": self.history.state_dict(), "metric_before": self._metric_before}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history.load_state_dict(state_dict["history"])
        self._metric_before = state_dict["metric_before"]

    def _read(self) -> None:
        for step, values in self._unread:
            self.history.append(step, **{name: _number(value) for name, value in values.items()})
        self._unread = []

    def _wants_more(self) -> bool:
        if not self._are_calls_validated:
            return True
        return sum(_batch_size(call) for call in self._calls) < VERIFY_SAMPLES

    def _collect(self) -> None:
        if self._tap is None:
            return
        for call in self._tap.calls_so_far():
            self._called = call.name
            self._calls.append(CallArguments(*pytree.tree_map_only(Tensor, _to_cpu, (call.args, call.kwargs))))
        self._tap.reset()

    def _remove_tap(self) -> None:
        if self._tap is not None:
            self._tap.remove()
            self._tap = None

    def _export(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._calls and not self._has_stepped:
            self._collect_by_validation(trainer, pl_module)
        if not self._calls and not self._has_stepped:
            raise CompressionError(
                "The run had ended before it was resumed, so no step is left that `OnnxExport` could take inputs from. "
                "Resume it with a validation dataloader, or write the file with `export_onnx(model, example_inputs, "
                "path)`."
            )
        if not self._calls:
            raise CompressionError(
                f"Neither the training nor the validation steps of `{type(pl_module).__name__}` called a network that "
                "can be exported, so `OnnxExport` has no inputs to export it with. Call `self(...)` in them, or name "
                'the network with `OnnxExport(..., module="...")`.'
            )
        with ProgressLine("OnnxExport") as progress:
            progress.tell("choosing the weights")
            chosen = chosen_weights(trainer, pl_module, self.weights, "OnnxExport")
            calls = _at_most(self._calls, VERIFY_SAMPLES)
            network = self._small(chosen, calls, progress)
            try:
                self.result = export_onnx(network, calls[0], self._target, verify_inputs=calls, progress=progress.tell)
            except UnexportableError as error:
                raise error.within(self._called) from error
            progress.tell("writing the archive")
            archives = [one for one in trainer.callbacks if isinstance(one, Archive)]  # type: ignore[attr-defined]
            for archive in archives:
                archive.write(trainer, pl_module)
            report = self._measured(trainer, chosen, network, progress)
            self.report = replace(report, archive=next((one.summary for one in archives), None))
            progress.tell("writing the report")
            json_path, picture_path = (self.path.with_name(f"report.{kind}") for kind in ("json", "png"))
            if not is_complete(trainer):
                json_path, picture_path = marked_incomplete(json_path), marked_incomplete(picture_path)
            self.report.write_json(json_path)
            self._plot(picture_path)
        print(f"\n{self.report.to_text()}")

    def _small(self, chosen: pl.LightningModule, calls: Sequence[CallArguments], progress: ProgressLine) -> nn.Module:
        """Return the network to export: without masked channels, with small layers for shared and factorised ones."""
        network = chosen.get_submodule(self._called)
        channels = attached_state(chosen, CHANNELS_KEY, ChannelState)
        if channels is None or not channels.has_removed:
            return self._compacted(chosen, network, calls, progress)
        progress.tell("removing the masked channels")
        small = shrink(chosen).model
        shrunk = small.get_submodule(self._called)
        if channels.module == self._called:
            pairs = [(call.args, call.kwargs) for call in calls]
            check_shrunk(network, shrunk, channels.groups, channels.kept, pairs)
        return shrunk

    def _compacted(
        self, chosen: pl.LightningModule, network: nn.Module, calls: Sequence[CallArguments], progress: ProgressLine
    ) -> nn.Module:
        below = f"{self._called}." if self._called else ""
        whole = compact_record(chosen)
        record = {name: found for name, found in whole.items() if name.startswith(below) or name == self._called}
        if not record:
            if lost := lost_layers(chosen):
                self._notes.append(
                    f"{len(lost)} layers are no longer shared or of a low rank, and have their full shape"
                )
            return network
        if quantization_of(chosen) is not None:
            self._notes.append(
                "filters are shared, and the layers have their full shape, as the network is quantized: for small "
                "layers in integers quantize `compact(model)` in a second fit"
            )
            return network
        progress.tell("putting small layers for shared and factorised ones")
        small = compact(chosen).model.get_submodule(self._called)
        pairs = [(call.args, call.kwargs) for call in calls]
        if self._called in record:  # the network is one such layer itself
            check_compacted(nn.Sequential(network), nn.Sequential(small), {"0": record[self._called]}, pairs)
        else:
            own = {name.removeprefix(below): found for name, found in record.items()}
            check_compacted(network, small, own, pairs)
        return small

    def _collect_by_validation(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Run the user's validation for inputs and metric: a run that had ended before it was resumed makes no step.

        It runs on this process alone.
        """
        loaders = validation_loaders(trainer)
        if loaders is None:
            return
        module = copy_of(pl_module)
        self._tap = ForwardTap(module, self.module)
        self._metric_after = validated(own_trainer(trainer, [_Listener(self)]), module, loaders, self.metric)
        self._remove_tap()

    def _measured(
        self, trainer: pl.Trainer, chosen: pl.LightningModule, network: nn.Module, progress: ProgressLine
    ) -> RunReport:
        assert self.result is not None
        example = self._calls[0]
        whole = chosen.get_submodule(self._called)  # with the channels that the file lacks
        quantization = quantization_of(network)
        is_integer = quantization is not None and quantization.is_quantizing
        bits = {_relative(name, quantization, network): bits for name, bits in _layer_bits(network).items()}
        progress.tell("counting")
        with tempfile.TemporaryDirectory() as folder:
            float_path = self._target
            if is_integer or whole is not network or self.result.shared:
                progress.tell("writing the fp32 file to compare with")
                float_path = Path(folder) / "fp32.onnx"
                write_onnx(strip(copy_of(whole)), example, float_path, shares_values=False)
            latency = None
            if self.latency:
                files = {"fp32": float_path}
                if float_path != self._target:
                    files["this file"] = self._target
                feeds = _single_sample(self._target, self.result, tensors_of(example.args, example.kwargs))
                batch_sizes = (1, 8) if self.result.has_dynamic_batch else (_batch_size(example),)
                latency = compare_latency(files, feeds, batch_sizes=batch_sizes, progress=progress.tell)
            sizes = file_sizes(self._target, float_path)
        metrics: tuple[Metric, ...] = ()
        if self.metric is not None:
            progress.tell(f"measuring {self.metric} of the file")
            metrics = (self._metric(trainer, chosen),)
        audit = self.result.audit
        statistics = model_statistics(
            strip(copy_of(network)), example.args, example.kwargs, bits=bits if is_integer else None
        )
        notes = [*self._notes, *self.result.notes]
        if whole is not network:
            before = model_statistics(strip(copy_of(whole)), example.args, example.kwargs)
            is_compact = compact_record(chosen) != {}
            done, fp32 = (
                ("small layers", "the layers of full shape") if is_compact else ("channels removed", "all channels")
            )
            notes.append(
                f"{done}: {statistics.macs / before.macs:.1%} of the multiply-accumulates and "
                f"{statistics.parameters / before.parameters:.1%} of the parameters remain; fp32 is with {fp32}"
            )
        return RunReport(
            model=type(network).__name__,
            versions={name: version(name) for name in ("torch", "lightning", "onnx", "onnxruntime")},
            statistics=statistics,
            sizes=sizes,
            latency=latency,
            metrics=metrics,
            parity=_parity(self.result),
            integer_ops={kind: integer for kind, (integer, _) in audit.counts().items() if integer},
            float_ops={f"{row.kind} {row.name}": row.reason for row in audit.floats()} if is_integer else None,
            notes=tuple(note for note in notes if note),
        )

    def _metric(self, trainer: pl.Trainer, chosen: pl.LightningModule) -> Metric:
        assert self.metric is not None
        after = _number(trainer.callback_metrics.get(self.metric))
        after = self._metric_after if after is None else after
        if validation_loaders(trainer) is None or trainer.world_size > 1:
            return Metric(self.metric, self._metric_before, after)
        return Metric(self.metric, self._metric_before, after, self._metric_of_file(trainer, chosen))

    def _metric_of_file(self, trainer: pl.Trainer, chosen: pl.LightningModule) -> float | None:
        """Run the user's own validation with the file in the place of the network."""
        assert self.result is not None
        assert self.metric is not None
        module = copy_of(chosen)
        vars(module.get_submodule(self._called))["forward"] = FileForward(self._target, self.result)
        return validated(own_trainer(trainer), module, validation_loaders(trainer), self.metric)

    def _plot(self, path: Path) -> None:
        assert self.report is not None
        assert self.report.statistics is not None
        try:
            plot_run(self.history, self.report.statistics.layers, path, self.report.model)
        except MissingExtraError as error:
            rank_zero_info(f"No picture of the run was made: {error}")


class _Listener(pl.Callback):
    """Hands the batches of a validation to an export, as those of the fit's own."""

    def __init__(self, export: OnnxExport) -> None:
        self.export = export

    @override
    def on_validation_batch_start(self, *args: Any, **kwargs: Any) -> None:
        self.export.on_validation_batch_start(*args, **kwargs)

    @override
    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        self.export.on_validation_batch_end(trainer, *args, **kwargs)
        # A metric is one of all batches.
        trainer.should_stop = self.export.metric is None and not self.export._wants_more()


def _layer_bits(network: nn.Module) -> dict[str, int]:
    quantization = quantization_of(network)
    return {} if quantization is None else quantization.layer_bits


def _relative(name: str, quantization: Any, network: nn.Module) -> str:
    """Return the name of a quantized layer as seen from ``network``."""
    layer = dict(quantization.model.named_modules()).get(name)
    return next((found for found, module in network.named_modules() if module is layer), name)


def _parity(result: ExportResult) -> dict[str, float | int | str]:
    parity = result.parity
    rows: dict[str, float | int | str] = {"validation samples": parity.samples}
    rows["largest difference"] = parity.max_abs_diff
    if parity.max_diff_steps is not None:
        rows["largest difference, steps"] = parity.max_diff_steps
    rows["signal-to-noise ratio, dB"] = parity.snr_db
    if parity.top1_agreement is not None:
        rows["top-1 agreement"] = f"{100 * parity.top1_agreement:.2f} % ({parity.distinct_top1} classes)"
    return rows


def _single_sample(path: Path, result: ExportResult, tensors: list[Tensor]) -> dict[str, Any]:
    names = {description.name for description in open_session(path).get_inputs()}
    return {
        name: (tensor[:1] if tensor.dim() and result.has_dynamic_batch else tensor).numpy()
        for name, tensor in zip(result.input_names, map(plain_tensor, tensors), strict=True)
        if name in names
    }


def _at_most(calls: list[CallArguments], samples: int) -> list[CallArguments]:
    kept: list[CallArguments] = []
    for call in calls:
        if kept and sum(_batch_size(other) for other in kept) >= samples:
            break
        kept.append(call)
    return kept


def _batch_size(call: CallArguments) -> int:
    return next((int(tensor.shape[0]) for tensor in tensors_of(call.args, call.kwargs) if tensor.dim()), 1)


def _to_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone()


def _number(value: Any) -> float | None:
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value.detach())
    return float(value) if isinstance(value, int | float) else None
