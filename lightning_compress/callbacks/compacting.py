"""`compact` and `compact_like`: a network with small layers for shared and factorised ones, and made again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import lightning.pytorch as pl
from torch import nn

from lightning_compress.callbacks.checkpoint import attached_state
from lightning_compress.callbacks.factorize import STATE_KEY as FACTORS_KEY
from lightning_compress.callbacks.filter_sharing import STATE_KEY as SHARING_KEY
from lightning_compress.callbacks.shrinking import Calls, expected_outputs, largest_difference
from lightning_compress.callbacks.stripping import strip
from lightning_compress.copying import copy_of
from lightning_compress.decomposition.compaction import CompactRecord, compact_
from lightning_compress.decomposition.factor_state import FactorState
from lightning_compress.decomposition.sharing_state import SharingState
from lightning_compress.errors import CompressionError
from lightning_compress.pruning.channels.proof import first_line
from lightning_compress.quantization import quantization_of

ModelT = TypeVar("ModelT", bound=nn.Module)

SHARED_TOLERANCE = 1e-5
"""Largest difference, relative to the largest output, of shared filters and one filter for each group."""

FACTOR_TOLERANCE = 1e-4
"""The same of a weight that is of a rank up to rounding, and its factors."""


class Compacted(NamedTuple):
    """What `compact` returns.

    Attributes:
        model: A copy with small layers.
        record: What stands for each layer, for `compact_like`: the groups of its channels, or scheme and rank.
    """

    model: nn.Module
    record: CompactRecord


def compact(model: nn.Module) -> Compacted:
    """Return a copy of ``model`` with small layers for shared and factorised ones, which compute the same.

    The layers are those that `FilterSharing` has tied and `Factorize` has brought to a low rank, also after a
    checkpoint was loaded with `load_compressed_state`. In the copy a ``nn.Sequential`` stands in the place of each:
    sums of input channels and one layer of fewer inputs, a layer of fewer outputs and their repetition, or two layers
    one after the other. It is an ordinary module: it saves, loads, trains on, exports, and can be quantized, clustered
    and pruned by magnitudes in a fit of its own; channels can be removed from factors, not from sums of channels. Hooks
    of the user's on these layers are not on the small ones, and no code may read the layers' weights, as a penalty on
    them in ``training_step`` would.

    Args:
        model: The LightningModule after the fit; it is left as it is.

    Returns:
        The copy, and the record of what stands for each layer.

    Raises:
        CompressionError: If no layer is shared or factorised, or not to the end, or no longer; if it is quantized.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_compress.callbacks.checkpoint import attach_state
        >>> model, state = BoringModel(), SharingState()
        >>> state.groups = {"layer": [[n, n + 1] for n in range(0, 32, 2)]}
        >>> state.close_({"layer": model.layer.weight}, 1.0)  # as `FilterSharing` does in a fit
        >>> attach_state(model, SHARING_KEY, state.save, state.load)
        >>> small, record = compact(model)
        >>> small.layer
        Sequential(
          (0): GroupSum(32 -> 16, groups of 2)
          (1): Linear(in_features=16, out_features=2, bias=True)
        )
        >>> again = compact_like(BoringModel(), record)
        >>> again.load_state_dict(small.state_dict())
        <All keys matched successfully>
    """
    record = compact_record(model)
    if not record:
        raise CompressionError(_why_none(model))
    if quantization_of(model) is not None:
        raise CompressionError(
            f"`{type(model).__name__}` is quantized, and small layers would round other values than those that were "
            "trained. Fit without `QuantizationAwareTraining`, take the small module by `compact(model)`, and quantize "
            "that in a second fit."
        )
    small = strip(copy_of(model))
    compact_(small, record)
    return Compacted(small, record)


def compact_like(model: ModelT, record: Mapping[str, Mapping[str, Any]]) -> ModelT:
    """Give a fresh model the small layers of a compact one, in place; then the compact one's state dict fits it.

    Args:
        model: A model of the class that was trained, with all its layers.
        record: The record that `compact` returned; it may have been written to JSON and read again.

    Returns:
        ``model`` itself; its weights are those that its layers had, as far as the small ones can hold them.

    Raises:
        CompressionError: If the record is that of another architecture.

    Example:
        >>> compact_like(nn.Sequential(nn.Linear(6, 4)), {"0": {"scheme": "channel", "rank": 2}})
        Sequential(
          (0): Sequential(
            (0): Linear(in_features=6, out_features=2, bias=False)
            (1): Linear(in_features=2, out_features=4, bias=True)
          )
        )
    """
    compact_(model, record)
    return model


def compact_record(model: nn.Module) -> CompactRecord:
    """Return what stands for each layer of a model that has its form; empty where there is none.

    Example:
        >>> compact_record(nn.Linear(2, 2))
        {}
    """
    found: CompactRecord = {}
    for state in _states(model):
        if state.complete and state.is_obeyed(_weights(model)):
            found |= state.record()
    return found


def lost_layers(model: nn.Module) -> list[str]:
    """Return the layers that had reached their form and have lost it, as where a model was trained on without it.

    Example:
        >>> lost_layers(nn.Linear(2, 2))
        []
    """
    return [layer for state in _states(model) if state.complete for layer in state.broken(_weights(model))]


def check_compacted(whole: nn.Module, small: nn.Module, record: CompactRecord, calls: Calls) -> float:
    """Check that a network with small layers computes what it computed with those that they stand for.

    Both compute in float64: what is compared is the replacement alone.

    Args:
        whole: The network with shared or factorised layers.
        small: The network with small ones.
        record: What stands for each layer, by its name in ``whole``.
        calls: Positional and keyword arguments of real calls.

    Returns:
        The largest difference, relative to the largest output.

    Raises:
        CompressionError: If it is more than 1e-5, or than 1e-4 where there are factors; names the layers that break it.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(2, 2))
        >>> check_compacted(net, net, {}, [((torch.rand(1, 2),), {})])
        0.0
    """
    tolerance = FACTOR_TOLERANCE if any("rank" in found for found in record.values()) else SHARED_TOLERANCE
    dtype, expected = expected_outputs(whole, calls)

    failures: list[Exception] = []

    def difference(other: nn.Module) -> float:
        try:
            return largest_difference(expected, other, calls, dtype)
        except (AttributeError, TypeError) as error:  # a forward that reads the layer's weight
            failures.append(error)
            return float("inf")

    worst = difference(small)
    if worst <= tolerance:
        return worst
    what = f"the largest difference is {worst:.2g} of the largest output"
    if failures:
        what = f"its forward fails ({first_line(failures[0]).rstrip('.')})"
    cause = failures[0] if failures else None
    broken = []
    for name, found in record.items():
        alone = strip(copy_of(whole))
        compact_(alone, {name: found})
        if difference(alone) > tolerance:
            broken.append(name)
    names = ", ".join(f"`{name}`" for name in broken) or "several together"
    raise CompressionError(
        f"With small layers the network computes something else: {what}. The layers that break it: {names}. Leave "
        "them out with `exclude=[...]` of `FilterSharing` or `Factorize`."
    ) from cause


def _states(model: nn.Module) -> list[SharingState | FactorState]:
    if not isinstance(model, pl.LightningModule):
        return []
    found = attached_state(model, SHARING_KEY, SharingState), attached_state(model, FACTORS_KEY, FactorState)
    return [state for state in found if state is not None and state.decided]


def _why_none(model: nn.Module) -> str:
    name = f"`{type(model).__name__}`"
    states = _states(model)
    if not states:
        return (
            f"Nothing is known of shared or factorised layers of {name}: it is no LightningModule that was trained "
            "with `FilterSharing` or `Factorize` in this process, or it was stripped since. Load a checkpoint with "
            "`load_compressed_state`; `compact_like(model, record)` takes the record of one that was."
        )
    if lost := lost_layers(model):
        return (
            f"The layers {', '.join(f'`{layer}`' for layer in lost[:3])} of {name} are no longer shared or of a low "
            "rank: they were replaced, trained on without `FilterSharing` or `Factorize`, or have become NaN. Fit with "
            "the callback again, from finite weights."
        )
    return (
        f"The layers of {name} are not yet what small ones could stand for: the fit ended before the `end` of "
        "`FilterSharing` or `Factorize`. Resume it, or choose an earlier `end`."
    )


def _weights(model: nn.Module) -> dict[str, nn.Parameter]:
    named = dict(model.named_parameters(remove_duplicate=False))
    return {name.removesuffix(".weight"): weight for name, weight in named.items() if name.endswith(".weight")}
