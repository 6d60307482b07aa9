"""`Archive`: the weights in one small file at fit end."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_compress.callbacks.channel_pruning import STATE_KEY as CHANNELS_KEY
from lightning_compress.callbacks.checkpoint import attached_state
from lightning_compress.callbacks.compacting import compact, compact_record
from lightning_compress.callbacks.complete_weights import Weights, chosen_weights
from lightning_compress.callbacks.compressor import Exporter, ended_early, is_complete
from lightning_compress.callbacks.export_paths import (
    check_writable,
    keep_weights,
    kept_weights,
    marked_incomplete,
    writes_nothing,
)
from lightning_compress.callbacks.shrinking import shrink
from lightning_compress.callbacks.trainers import check_trainer, has_late_layers
from lightning_compress.errors import MissingExtraError
from lightning_compress.pruning.channels.state import ChannelState
from lightning_compress.quantization import quantization_of
from lightning_compress.report.archived import ArchivedNetwork, ArchivedTensor
from lightning_compress.report.run_report import as_json
from lightning_compress.report.weights_plot import plot_weights
from lightning_compress.storage import ArchiveSize, load_compressed, save_compressed
from lightning_compress.storage.coding import Coder, check_coders
from lightning_compress.storage.tensors import check_storable
from lightning_compress.unfinished import remove_leftovers, written_whole

_LARGEST_BOOK = 256


class Archive(Exporter):
    """Write the weights of the trained module to one small file when the fit ends, read it back, and report its size.

    Pruned, clustered and quantized weights take what they hold, see `save_compressed`; masked channels are left out,
    and small layers stand for shared and factorised ones of a network in float.
    `load_compressed(path, model)` gives a fresh module of the same class the weights that computed at the end of the
    fit. Beside the file lie ``<name>.json``, the table with every codebook, and, where matplotlib is installed,
    ``<name>.png``, a picture of bits and values; `OnnxExport` of the same run has the table in its report.

    The file is written on rank 0. Where the fit ends before the full compression, it goes to
    ``<stem>.incomplete<suffix>``. Where writing fails, the trained weights are saved next to it as ``<name>.ckpt``.

    Args:
        path: The file to write; its folder is made where missing.
        weights: ``"last"``, or ``"best"``: the best checkpoint of the Trainer's `ModelCheckpoint` among those that
            had reached the full compression.
        coders: What to try for gaps and indices, see `save_compressed`.

    Raises:
        ValueError: If ``weights`` is none of the two, or a coder is unknown.
        MissingExtraError: If the library of a coder is not installed.

    Attributes:
        size: What every tensor takes after each stage; None before the fit has ended.
        summary: The same for reports, with the codebooks.

    Example:
        >>> archive = Archive("model.lcz")
        >>> trainer = pl.Trainer(max_epochs=3, callbacks=[archive], logger=False)  # trainer.fit(model, data)
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        weights: Weights = "last",
        coders: Sequence[Coder] = ("fixed", "huffman"),
    ) -> None:
        super().__init__()
        if weights not in ("last", "best"):
            raise ValueError(f'`weights` must be "last" or "best", got {weights!r}.')
        check_coders(coders)
        self.path = Path(path)
        self.weights: Weights = weights
        self.coders = tuple(coders)
        self.size: ArchiveSize | None = None
        self.summary: ArchivedNetwork | None = None
        self._is_written = False

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        check_trainer(trainer, self)
        self._is_written, self.size, self.summary = False, None, None
        if not has_late_layers(pl_module):
            check_storable(pl_module.state_dict())
        if trainer.is_global_zero and not writes_nothing(trainer):
            check_writable(self.path, "Archive")
            remove_leftovers(kept_weights(self.path))

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.write(trainer, pl_module)

    def write(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file, if this fit has not yet; `OnnxExport` asks for it, whichever of the two comes first."""
        if not trainer.is_global_zero or self._is_written:
            return
        self._is_written = True
        if writes_nothing(trainer):
            rank_zero_info(f"`Archive` writes nothing in a `fast_dev_run`: {self.path} is left as it is.")
            return
        path = self.path
        if not is_complete(trainer):
            path = marked_incomplete(path)
            rank_zero_warn(f"{ended_early(trainer)} The weights go to {path}; {self.path} is left as it is.")
        try:
            self._write(trainer, pl_module, path)
        except BaseException:
            keep_weights(trainer, pl_module, kept_weights(path))
            raise

    def _write(self, trainer: pl.Trainer, pl_module: pl.LightningModule, path: Path) -> None:
        chosen = chosen_weights(trainer, pl_module, self.weights, "Archive")
        channels = attached_state(chosen, CHANNELS_KEY, ChannelState)
        module: nn.Module = chosen
        records: dict[str, Any] = {}
        if channels is not None and channels.has_removed:
            module, records["channels"] = shrink(chosen)
        elif compact_record(chosen) and quantization_of(chosen) is None:
            module, records["layers"] = compact(chosen)
        self.size = save_compressed(module, path, coders=self.coders, **records)
        stored = load_compressed(path)
        self.summary = _summary(path.name, self.size, stored)
        table = json.dumps(as_json(self.summary), indent=1, allow_nan=False)
        with written_whole(path.with_name(f"{path.name}.json")) as temporary:
            temporary.write_text(f"{table}\n", encoding="utf-8")
        try:
            title = f"{type(chosen).__name__}: {self.size.ratio:.1f} times smaller"
            plot_weights(self.summary.tensors, stored, path.with_name(f"{path.name}.png"), title)
        except MissingExtraError as error:
            rank_zero_info(f"No picture of the weights was made: {error}")
        print(f"\n{path}\n{self.size.to_text()}")


def _summary(name: str, size: ArchiveSize, stored: Mapping[str, Tensor]) -> ArchivedNetwork:
    tensors = []
    for tensor in size.tensors:
        n = max(math.prod(tensor.shape), 1)
        tensors.append(
            ArchivedTensor(
                name=tensor.name,
                shape=tensor.shape,
                form=tensor.form,
                entries=math.prod(tensor.shape),
                nonzeros=tensor.n_nonzero,
                dense=tensor.dense_bits / n,
                pruned=tensor.pruned_bits / n,
                shared=tensor.shared_bits / n,
                coded=tensor.coded_bits / n,
                bound=tensor.bound_bits / n,
                codebook=_codebook(stored[tensor.name]),
            )
        )
    return ArchivedNetwork(name, size.file_bytes, tuple(tensors))


def _codebook(tensor: Tensor) -> tuple[float, ...]:
    if tensor.dim() < 2 or not tensor.is_floating_point():
        return ()
    flat = tensor.flatten()
    if len(torch.unique(flat[: 2 * _LARGEST_BOOK + 2])) > _LARGEST_BOOK + 1:
        return ()  # as most have: no need to sort all of it
    values = torch.unique(flat[flat != 0])
    return tuple(values.tolist()) if len(values) <= _LARGEST_BOOK else ()
