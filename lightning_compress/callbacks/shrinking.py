"""`shrink` and `rebuild`: a network without its masked channels, and the same architecture made again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.callbacks.channel_pruning import STATE_KEY as CHANNELS_KEY
from lightning_compress.callbacks.channel_pruning import check_transform
from lightning_compress.callbacks.checkpoint import attach_state, attached_state, detach_states
from lightning_compress.callbacks.quantization import STATE_KEY as QUANTIZATION_KEY
from lightning_compress.callbacks.quantization import QuantizationSlot
from lightning_compress.callbacks.stripping import strip
from lightning_compress.copying import copy_of
from lightning_compress.errors import CompressionError
from lightning_compress.pruning.channels.attention import head_parts, made_rows
from lightning_compress.pruning.channels.groups import find_channel_groups
from lightning_compress.pruning.channels.narrowing import ChannelRecord, narrow_
from lightning_compress.pruning.channels.outputs import output_tensors, same_random_numbers
from lightning_compress.pruning.channels.places import ChannelGroup, record_of, unread_units
from lightning_compress.pruning.channels.state import ChannelState
from lightning_compress.quantization import Quantization, prepare, quantization_of
from lightning_compress.quantization.state import WEIGHT_PREFIX, narrowed_state

ModelT = TypeVar("ModelT", bound=nn.Module)

Calls = Sequence[tuple[Sequence[Any], Mapping[str, Any]]]
"""Positional and keyword arguments of calls."""

TOLERANCE = 1e-5
"""Largest difference, relative to the largest output, of the masked and the shrunk network."""


class Shrunk(NamedTuple):
    """What `shrink` returns.

    Attributes:
        model: A copy without the masked channels.
        record: The channels that stayed, for `rebuild`: by layer, and by side (``"out"``, ``"in"``, ``"both"``).
    """

    model: nn.Module
    record: ChannelRecord


def shrink(model: nn.Module, example_inputs: Any = None) -> Shrunk:
    """Return a copy of ``model`` without its masked channels: smaller layers that compute the same.

    The channels are those that `ChannelPruning` has masked, also after a checkpoint was loaded with
    `load_compressed_state`. Of any other model they are those that no layer reads, all whose weights for them being
    zeros. The copy is an ordinary module: it saves, loads, trains on and exports. A model that is quantized stays so,
    on the same grids.

    Args:
        model: The model, with the masked channels still there; it is left as it is.
        example_inputs: Inputs of its forward: a tensor, a tuple of positional or a dict of keyword arguments. Needed
            where `ChannelPruning` has not told which channels go together, unless the model is a LightningModule with
            an ``example_input_array``.

    Returns:
        The copy, and the record of the channels that stayed.

    Raises:
        CompressionError: If the channels cannot be told without inputs.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> with torch.no_grad():
        ...     net[2].weight[0, 1] = 0
        >>> small, record = shrink(net, torch.rand(4, 2))
        >>> small, record
        (Sequential(
          (0): Linear(in_features=2, out_features=2, bias=True)
          (1): ReLU()
          (2): Linear(in_features=2, out_features=1, bias=True)
        ), {'0': {'out': [0, 2]}, '2': {'in': [0, 2]}})
        >>> again = rebuild(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)), record)
        >>> again.load_state_dict(small.state_dict())
        <All keys matched successfully>
    """
    state = attached_state(model, CHANNELS_KEY, ChannelState) if isinstance(model, pl.LightningModule) else None
    if state is not None and state.groups:
        record = _below(state.module, state.record(model))
    else:
        call, groups, kept = _unread(model, example_inputs)
        record = record_of(model, groups, kept)
        small = _without(model, record)
        check_shrunk(model, small, groups, kept, [call])
        return Shrunk(small, record)
    return Shrunk(_without(model, record), record)


def rebuild(model: ModelT, record: Mapping[str, Mapping[str, Sequence[int]]]) -> ModelT:
    """Give a fresh model the widths of a shrunk one, in place; then the shrunk one's state dict fits it.

    Args:
        model: A model of the class that was trained, with all its channels.
        record: The record that `shrink` returned; it may have been written to JSON and read again.

    Returns:
        ``model`` itself; its weights are those of the channels that stay.

    Raises:
        CompressionError: If the record is that of another architecture.

    Example:
        >>> rebuild(nn.Sequential(nn.Linear(2, 3)), {"0": {"out": [0, 2]}})
        Sequential(
          (0): Linear(in_features=2, out_features=2, bias=True)
        )
    """
    narrow_(model, record)
    return model


def check_shrunk(
    masked: nn.Module,
    shrunk: nn.Module,
    groups: Sequence[ChannelGroup],
    kept: Sequence[Tensor],
    calls: Calls,
) -> float:
    """Check that a network without its masked channels computes what it computed with them.

    Both compute in float64 and without rounding: what is compared is the removal alone.

    Args:
        masked: The network with its masked channels.
        shrunk: The network without them.
        groups: Its channel groups.
        kept: For each group, whether each unit stays.
        calls: Positional and keyword arguments of real calls.

    Returns:
        The largest difference, relative to the largest output.

    Raises:
        CompressionError: If it is more than 1e-5; names the groups that break it.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2))
        >>> check_shrunk(net, net, [], [], [((torch.rand(1, 2),), {})])
        0.0
    """
    # One network at a time: the largest fit into memory in float64 once, and not twice.
    dtype, expected = expected_outputs(masked, calls)
    worst = largest_difference(expected, shrunk, calls, dtype)
    if worst <= TOLERANCE:
        return worst
    broken = []
    for number, group in enumerate(groups):
        alone = [mask if index == number else torch.ones_like(mask) for index, mask in enumerate(kept)]
        narrowed = strip(copy_of(masked))
        narrow_(narrowed, record_of(masked, groups, alone))
        if largest_difference(expected, narrowed, calls, dtype) > TOLERANCE:
            broken.append(group.name)
    names = ", ".join(f"`{name}`" for name in broken) or "several together"
    raise CompressionError(
        f"Without its masked channels the network computes something else: the largest difference is {worst:.2g} of "
        f"the largest output. The groups that break it: {names}. Leave them out with `ChannelPruning(exclude=...)`."
    )


def expected_outputs(masked: nn.Module, calls: Calls) -> tuple[torch.dtype, list[list[Tensor]]]:
    """Return the outputs of the masked network in float64, or in the precision that it can compute in."""
    try:
        return torch.float64, _outputs(masked, calls, torch.float64)
    except Exception:  # user code that computes in float32 whatever it is given
        return torch.float32, _outputs(masked, calls, torch.float32)


def largest_difference(expected: list[list[Tensor]], shrunk: nn.Module, calls: Calls, dtype: torch.dtype) -> float:
    """Return the largest difference of a network's outputs from expected ones, relative to the largest of them."""
    try:
        found = _outputs(shrunk, calls, dtype)
    except RuntimeError:  # shapes that do not fit
        return float("inf")
    return max(_difference_of(*outputs) for outputs in zip(expected, found, strict=True))


def _difference_of(expected: list[Tensor], found: list[Tensor]) -> float:
    if not expected or [tensor.shape for tensor in expected] != [tensor.shape for tensor in found]:
        return float("inf")
    return max(
        float((one - other).abs().max()) / max(float(one.abs().max()), 1e-30) if one.numel() else 0.0
        for one, other in zip(expected, found, strict=True)
    )


@torch.no_grad()
def _outputs(network: nn.Module, calls: Calls, dtype: torch.dtype) -> list[list[Tensor]]:
    """Return what a copy of a network computes without rounding, for each call."""
    network = strip(copy_of(network)).cpu().to(dtype).eval()

    def placed(tensor: Tensor) -> Tensor:
        return tensor.detach().cpu().to(dtype, copy=True) if tensor.is_floating_point() else tensor.cpu().clone()

    found = []
    for call in calls:
        args, kwargs = pytree.tree_map_only(Tensor, placed, (tuple(call[0]), dict(call[1])))
        with same_random_numbers():
            outputs = output_tensors(network(*args, **kwargs))
        found.append([tensor for tensor in outputs if tensor.is_floating_point()])
    return found


def _unread(
    model: nn.Module, example_inputs: Any
) -> tuple[tuple[Sequence[Any], Mapping[str, Any]], tuple[ChannelGroup, ...], list[Tensor]]:
    """Return a call of a model, its channel groups, and which units stay: what is read, as much of each block."""
    if example_inputs is None and isinstance(model, pl.LightningModule):
        example_inputs = model.example_input_array
    if example_inputs is None:
        raise CompressionError(
            f"Nothing tells which channels of `{type(model).__name__}` go together: it was not trained with "
            "`ChannelPruning`. Give `shrink(model, example_inputs)` inputs that its forward runs on."
        )
    args: Sequence[Any] = () if isinstance(example_inputs, Mapping) else (example_inputs,)
    args = tuple(example_inputs) if isinstance(example_inputs, tuple | list) else args
    kwargs = dict(example_inputs) if isinstance(example_inputs, Mapping) else {}
    args, kwargs = pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().cpu(), (args, kwargs))
    groups = find_channel_groups(strip(copy_of(model)).cpu().float(), args, kwargs).groups
    kept = []
    for group in groups:
        unread = unread_units(model, group)
        blocks = torch.zeros(group.n_units, dtype=torch.long) if group.blocks is None else group.blocks
        rows = [(unread & (blocks == block)).nonzero().flatten() for block in range(group.n_blocks)]
        n_gone = min(*(len(row) for row in rows), group.n_units // group.n_blocks - 1)
        mask = torch.ones(group.n_units, dtype=torch.bool)
        mask[torch.cat([row[:n_gone] for row in rows])] = False
        kept.append(mask)
    return (args, kwargs), groups, kept


def _without(model: nn.Module, record: ChannelRecord) -> nn.Module:
    """Return a copy of ``model`` with the channels of ``record`` alone, on the grids that it is quantized on."""
    copied = copy_of(model)
    quantization = quantization_of(copied)
    root = "" if quantization is None else _name_in(copied, quantization.model)
    saved = None if quantization is None else quantization.state_dict()
    if quantization is not None and any("in" in sides or "both" in sides for sides in record.values()):
        check_transform(quantization.scheme)
    strip(copied)
    for module in copied.modules():
        if isinstance(module, pl.LightningModule):
            detach_states(module)
    narrow_(copied, record)
    if quantization is None or saved is None:
        return copied
    prefix = f"{root}." if root else ""
    made = {name.removeprefix(prefix): rows for name, rows in _made_channels(model, record, saved).items()}
    narrowed: Quantization = prepare(copied.get_submodule(root), quantization.scheme)
    narrowed.load_state_dict(narrowed_state(saved, made))
    if isinstance(copied, pl.LightningModule):
        slot = QuantizationSlot()
        slot.module = root or None
        slot.take(narrowed)
        attach_state(copied, QUANTIZATION_KEY, slot.save, slot.load)
    return copied


def _made_channels(model: nn.Module, record: ChannelRecord, quantized: Mapping[str, Any]) -> dict[str, Sequence[int]]:
    """Return the output channels that stay, by layer; of an attention module the rows of its heads.

    Query, key and value are projected by parts of one parameter, each of which is rounded under a name of its own.
    """
    made: dict[str, Sequence[int]] = {}
    rounded = [name.removeprefix(WEIGHT_PREFIX) for name in quantized["steps"]["steps"]]
    for name, sides in record.items():
        for side in ("out", "both"):
            if side in sides:
                made[name] = sides[side]
        if "heads" in sides:
            attention = model.get_submodule(name)
            joint = made_rows(attention, sides["heads"])
            made |= {f"{name}.{layer}": rows for layer, rows in joint.items()}
            reading = next(part for part in head_parts(attention) if part.role == "reads")
            rows = joint.get("qkv") or reading.index[sides["heads"]].flatten().tolist()
            projections = [part for part in rounded if f".{part}".rpartition(".linear")[0].endswith(f".{name}")]
            made |= dict.fromkeys([f"{name}.{part.rpartition('.')[2]}" for part in projections], rows)
    return made


def _below(module: str, record: ChannelRecord) -> ChannelRecord:
    return {f"{module}.{name}": sides for name, sides in record.items()} if module else record


def _name_in(model: nn.Module, part: nn.Module) -> str:
    return next(str(name) for name, module in model.named_modules() if module is part)
