"""Channel groups: which channels of which layers can only go together."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.copying import copy_of
from lightning_compress.errors import CompressionError
from lightning_compress.pruning.channels.follower import run_with_labels
from lightning_compress.pruning.channels.labels import LabelledRun
from lightning_compress.pruning.channels.places import ChannelGroup, Member
from lightning_compress.pruning.channels.proof import first_line, proved
from lightning_compress.selection import match_names

N_SAMPLES = 2
"""Samples on which a network is followed: the fewer, the quicker."""

MAKES, READS = ("out", "both", "heads"), ("in", "heads")
"""The sides on which a layer makes its channels, and those on which they are read."""


@dataclass(frozen=True)
class ChannelGroups:
    """What of a model can be pruned by channels.

    Args:
        groups: The groups, in the order in which the forward makes them.
        left_alone: Why the output channels of other layers stay, by the layer's name.
        costs: Multiply-accumulates of one sample in every convolution and linear layer, by its name.
    """

    groups: tuple[ChannelGroup, ...]
    left_alone: dict[str, str]
    costs: dict[str, int]


def find_channel_groups(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    exclude: Sequence[str] = (),
    whole: nn.Module | None = None,
    other_calls: Sequence[tuple[Sequence[Any], Mapping[str, Any]]] = (),
) -> ChannelGroups:
    """Find which channels of ``model`` can only go together, and prove that they can.

    Runs in eval and in train mode follow every channel (`lightning_compress.pruning.channels.follower`). Then random
    units of all groups are removed from a copy, which must compute what the model computes with these channels masked;
    a group that breaks it is left alone.

    Args:
        model: Any module in float, with its own forwards, on the device of its inputs; it is left as it is.
        args: Positional inputs of its forward, with the batch as first dimension.
        kwargs: Keyword inputs.
        exclude: Patterns of names of layers whose output channels stay.
        whole: What ``model`` is a part of: layers that other parts of it use as well keep their channels.
        other_calls: Arguments of other calls that go other ways through the forward.

    Returns:
        The groups, and why other layers keep their channels.

    Raises:
        CompressionError: If the forward fails on the inputs.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
        >>> found = find_channel_groups(net, [torch.rand(2, 1, 4, 4)])
        >>> [(group.name, group.n_units, [member.module for member in group.members]) for group in found.groups]
        [('0', 4, ['0', '1', '4'])]
        >>> found.left_alone
        {'4': 'the model returns them'}
    """
    original = model
    calls = [(tuple(args), dict(kwargs or {})), *((tuple(more), dict(named)) for more, named in other_calls)]
    model, samples, run = _followed(model, calls)
    for name, user in _shared_layers(original, whole or original, run).items():
        for read in run.reads.get(name, []):
            run.freeze(read.labels, f"`{user}` uses the layer too, which is another network")
    excluded = match_names(run.costs, exclude, "exclude") if exclude else set()
    for name in excluded:
        for read in run.reads[name]:
            if read.side != "in":
                run.freeze(read.labels, "`exclude` names it")
    groups, left_alone = _groups(run)
    _fill_zeros_(model)
    for sample in samples:
        groups = proved(model, *sample, groups, left_alone)
    return ChannelGroups(tuple(groups), left_alone, run.costs)


Call = tuple[tuple[Any, ...], dict[str, Any]]


def _followed(original: nn.Module, calls: Sequence[Call]) -> tuple[nn.Module, list[Call], LabelledRun]:
    """Follow a copy of a model in float64 on two samples; where that fails in float32, or on the whole batch."""
    failure: Exception | None = None
    for dtype in (torch.float64, torch.float32):
        for n_samples in (N_SAMPLES, None):
            model = copy_of(original).to(dtype)
            samples = [_inputs(call, n_samples, dtype) for call in calls]
            try:
                run: LabelledRun | None = None
                for sample in samples:
                    run = run_with_labels(model, *copy.deepcopy(sample), run)
            except Exception as error:  # user code may raise anything
                failure = failure or error
                continue
            assert run is not None
            for sample in samples:
                # What is there in training alone, such as auxiliary heads, reads channels too.
                with contextlib.suppress(Exception):  # as a batch norm's on single values
                    run_with_labels(copy_of(model), *copy.deepcopy(sample), run, is_training=True)
            return model.eval(), samples, run
    raise CompressionError(
        f"The forward of `{type(original).__name__}` fails on the inputs in eval mode, so its channels cannot be "
        f"followed: {first_line(failure)} Give inputs that it runs on, or prune a submodule of it."  # type: ignore[arg-type]
    ) from failure


def _inputs(call: Call, n_samples: int | None, dtype: torch.dtype) -> Call:
    """Return the first samples of the inputs, where they have the batch as first dimension, in one precision."""
    sizes = [leaf.shape[0] for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor) and leaf.dim()]

    def prepared(tensor: Tensor) -> Tensor:
        tensor = tensor[:n_samples] if tensor.dim() and tensor.shape[0] == sizes[0] else tensor
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    found: Call = pytree.tree_map_only(Tensor, prepared, call)
    return found


def _groups(run: LabelledRun) -> tuple[list[ChannelGroup], dict[str, str]]:
    """Return the groups that the labels make, and why other layers keep their channels."""
    reasons = run.reasons()
    sides: dict[tuple[str, str], Tensor] = {
        (name, read.side): run.roots(read.labels) * (read.labels != 0)
        for name, reads in run.reads.items()
        for read in reads
    }
    for name, labels in run.parameters.items():
        roots = run.roots(labels)
        dim = next((d for d in range(roots.dim()) if roots.shape[d] > 1 and _varies_alone(roots, d)), None)
        if dim is None:
            for label in set(roots.flatten().tolist()):
                reasons.setdefault(label, f"they meet the parameter `{name}`, which has no dimension for them")
        else:
            sides[name, f"dim{dim}"] = roots.movedim(dim, 0).reshape(roots.shape[dim], -1)[:, 0]
    partitions = _partitions(run, reasons)
    frozen_sets = {partitions[label][0]: reason for label, reason in reasons.items() if label in partitions}
    for label, (number, _) in partitions.items():
        if number in frozen_sets:  # as many of each block must stay, and some have to
            reasons.setdefault(label, frozen_sets[number])
    made = {label for (_, side), roots in sides.items() if side in MAKES for label in roots.tolist()}
    read_by_layers = {label for (_, side), roots in sides.items() if side in READS for label in roots.tolist()}
    usable = (made & read_by_layers) - reasons.keys() - {0}
    signatures: dict[int, list[tuple[str, str]]] = {label: [] for label in usable}
    for key, roots in sides.items():
        for label in roots.tolist():
            if label in usable:
                signatures[label].append(key)
    # Labels that lie in the same places make a group; those that must stay equal in number are one group too.
    group_of: dict[Any, list[int]] = {}
    for label, signature in signatures.items():
        group_of.setdefault(partitions.get(label, (tuple(signature), None))[0], []).append(label)
    groups: list[ChannelGroup] = []
    taken: set[str] = set()
    for alike in group_of.values():
        ours = sorted(alike)
        units = {label: unit for unit, label in enumerate(ours)}
        members = tuple(
            Member(name, side, torch.tensor([units[label] for _, label in hits]), torch.tensor([at for at, _ in hits]))
            for (name, side), roots in sides.items()
            if (hits := [(at, label) for at, label in enumerate(roots.tolist()) if label in units])
        )
        makers = [member.module for member in members if member.side in MAKES]
        names = [*makers, *(f"{makers[0]}#{number}" for number in range(2, len(groups) + 3))]
        name = next(name for name in names if name not in taken)  # two groups may begin in one layer
        taken.add(name)
        blocks = None
        if ours[0] in partitions:
            _, numbers = zip(*[partitions[label] for label in ours], strict=True)
            blocks = torch.tensor(numbers)
        if len(ours) > 1:
            groups.append(ChannelGroup(name, len(ours), members, blocks))
    grouped = {member.module for group in groups for member in group.members if member.side in MAKES}
    left_alone = {
        name: next((reasons[label] for label in roots.tolist() if label in reasons), "no layer reads them")
        for (name, side), roots in sides.items()
        if side in MAKES and name in run.costs and name not in grouped
    }
    return groups, left_alone


def _varies_alone(roots: Tensor, dim: int) -> bool:
    rows = roots.movedim(dim, 0).reshape(roots.shape[dim], -1)
    return bool((rows == rows[:, :1]).all()) and len(set(rows[:, 0].tolist())) == len(rows)


def _partitions(run: LabelledRun, reasons: dict[int, str]) -> dict[int, tuple[int, int]]:
    """Return, for labels that are cut into equal parts somewhere, which set of them they belong to and their block."""
    found: dict[int, tuple[int, int]] = {}
    cuts = [run.roots(rows) * (rows != 0) for rows in run.blocks]
    for reads in run.reads.values():
        cuts += [(run.roots(r.labels) * (r.labels != 0)).view(r.blocks, -1) for r in reads if r.blocks > 1]
    for number, rows in enumerate(cuts):
        if len({tuple(sorted(row)) for row in rows.tolist()}) == 1:
            continue  # the parts have become one
        labels = rows.flatten().tolist()
        blocks = [block for block, row in enumerate(rows.tolist()) for _ in row]
        known = {found[label] for label in labels if label in found}
        if not known:
            if len(set(labels)) == len(labels) and 0 not in labels:
                found.update({label: (number, block) for label, block in zip(labels, blocks, strict=True)})
                continue
        elif all(label in found for label in labels):
            again = {(found[label], block) for label, block in zip(labels, blocks, strict=True)}
            if len(again) == len(rows) == len({key for key, _ in again}):
                continue  # cut in the same way
        for label in [*labels, *[label for label, (other, _) in found.items() if other in {n for n, _ in known}]]:
            reasons.setdefault(label, "they are cut into equal parts in two different ways")
    return found


@torch.no_grad()
def _fill_zeros_(model: nn.Module) -> None:
    """Give what is nothing but zeros random values: behind a head or a gate of zeros anything would be proved."""
    generator = torch.Generator().manual_seed(0)
    for values in chain(model.parameters(), model.buffers()):
        if values.is_floating_point() and not values.any():
            values.copy_(0.1 * torch.randn(values.shape, generator=generator, dtype=values.dtype))


def _shared_layers(model: nn.Module, whole: nn.Module, run: LabelledRun) -> dict[str, str]:
    """Return the layers of ``model`` that parts of ``whole`` hold which its forward does not call, with those parts."""
    called = {name.partition(".")[0] for name in run.reads}
    inside = {id(module): name for name, module in model.named_modules()}
    others: dict[str, nn.Module] = {}
    if whole is model:
        others = {
            name: child for name, child in model.named_children() if _is_called_at_all(child) and name not in called
        }
    else:
        others = {
            name: module
            for name, module in whole.named_modules()
            if name and id(module) not in inside and all(id(child) != id(model) for child in module.modules())
        }
    owners = {
        id(parameter): name for name in run.reads for parameter in model.get_submodule(name).parameters(recurse=False)
    }
    found: dict[str, str] = {}
    for user, module in others.items():
        for parameter in module.parameters():
            if id(parameter) in owners:
                found.setdefault(owners[id(parameter)], user)
    return found


def _is_called_at_all(module: nn.Module) -> bool:
    return not isinstance(module, nn.ModuleList | nn.ModuleDict)
