"""`load_compressed_state`: masks, ranges and weights of a checkpoint in a model, without a Trainer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import lightning.pytorch as pl
import torch
from torch import nn

from lightning_compress.callbacks.channel_pruning import STATE_KEY as CHANNELS_KEY
from lightning_compress.callbacks.checkpoint import COMPRESSION_KEY, attach_state, detach_states
from lightning_compress.callbacks.factorize import STATE_KEY as FACTORS_KEY
from lightning_compress.callbacks.filter_sharing import STATE_KEY as SHARING_KEY
from lightning_compress.callbacks.pruning import STATE_KEY as PRUNING_KEY
from lightning_compress.callbacks.quantization import STATE_KEY as QUANTIZATION_KEY
from lightning_compress.callbacks.quantization import QuantizationSlot
from lightning_compress.decomposition import FactorState, SharingState
from lightning_compress.errors import CompressionError
from lightning_compress.pruning.channels.state import ChannelState
from lightning_compress.pruning.state import PruningState
from lightning_compress.quantization import prepare, strip
from lightning_compress.quantization.scheme import Scheme

ModelT = TypeVar("ModelT", bound=nn.Module)


def load_compressed_state(model: ModelT, checkpoint: str | os.PathLike[str] | Mapping[str, Any]) -> ModelT:
    """Bring weights, masks and ranges of a checkpoint into ``model``, which then computes as it did when it was saved.

    The model is evaluated, exported with `export_onnx` or trained on as after the fit that wrote the checkpoint; no
    callback is needed for it. The settings are those of the checkpoint. Nothing but tensors and plain types is read.

    Args:
        model: A model of the class that was trained.
        checkpoint: Path of a checkpoint that a Trainer wrote, weights-only or whole, or what it holds.

    Returns:
        ``model`` itself.

    Raises:
        CompressionError: If the checkpoint holds nothing of ours, or is of another architecture.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> load_compressed_state(BoringModel(), {"state_dict": BoringModel().state_dict()})
        Traceback (most recent call last):
            ...
        lightning_compress.errors.CompressionError: The checkpoint holds no masks, no ranges, no groups and no ranks: it
        was written without `MagnitudePruning`, `ChannelPruning`, `QuantizationAwareTraining`, `FilterSharing` and
        `Factorize`. Load it as ever, with `load_from_checkpoint`.
    """
    content = checkpoint
    if isinstance(content, str | os.PathLike):
        content = cast(Mapping[str, Any], torch.load(content, map_location="cpu", weights_only=True))
    states = content.get(COMPRESSION_KEY, {})
    pruning, channels, quantization = PruningState(), ChannelState(), QuantizationSlot()
    decompositions: dict[str, SharingState | FactorState] = {SHARING_KEY: SharingState(), FACTORS_KEY: FactorState()}
    if not any(states.get(key) for key in (PRUNING_KEY, CHANNELS_KEY, QUANTIZATION_KEY, *decompositions)):
        raise CompressionError(
            "The checkpoint holds no masks, no ranges, no groups and no ranks: it was written without "
            "`MagnitudePruning`, `ChannelPruning`, `QuantizationAwareTraining`, `FilterSharing` and `Factorize`. Load "
            "it as ever, with `load_from_checkpoint`."
        )
    strip(model)
    if isinstance(model, pl.LightningModule):
        detach_states(model)
        model.configure_model()
        model.on_load_checkpoint(dict(content))
    _load_weights(model, content["state_dict"])
    if PRUNING_KEY in states:
        pruning.load(states[PRUNING_KEY])
        weights = {name: model.get_parameter(f"{name}.weight") for name in pruning.masks}
        if not pruning.is_obeyed(weights):
            pruning.clear()  # trained on without the callback
    if states.get(CHANNELS_KEY):
        channels.load(states[CHANNELS_KEY])
        if not channels.is_obeyed(model):
            channels.clear()
    for key, state in decompositions.items():
        state.load(states.get(key, {}))
        if not state.is_obeyed({name: model.get_parameter(f"{name}.weight") for name in state.record()}):
            state.clear()
    if states.get(QUANTIZATION_KEY):
        saved = states[QUANTIZATION_KEY]
        quantization.module = saved["module"]
        quantization.load(saved)
        quantization.take(prepare(model.get_submodule(saved["module"] or ""), Scheme(**saved["scheme"])))
    if isinstance(model, pl.LightningModule):
        attach_state(model, PRUNING_KEY, pruning.save, pruning.load)
        attach_state(model, CHANNELS_KEY, channels.save, channels.load)
        attach_state(model, QUANTIZATION_KEY, quantization.save, quantization.load)
        for key, state in decompositions.items():
            attach_state(model, key, state.save, state.load)
    return model


def _load_weights(model: nn.Module, weights: Mapping[str, Any]) -> None:
    strict = model.strict_loading if isinstance(model, pl.LightningModule) else True
    try:
        model.load_state_dict(weights, strict=strict)
    except RuntimeError as error:
        raise CompressionError(
            f"The checkpoint was written for another architecture than this `{type(model).__name__}`: {error}"
        ) from error
