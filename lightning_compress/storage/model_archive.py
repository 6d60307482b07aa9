"""`save_compressed` and `load_compressed`: a network as it ships in one small file, and back."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.copying import copy_of
from lightning_compress.decomposition.compaction import compact_
from lightning_compress.decomposition.filter_groups import OVERS
from lightning_compress.decomposition.low_rank import SCHEMES
from lightning_compress.errors import ArchiveError, CompressionError
from lightning_compress.pruning.channels.narrowing import narrow_
from lightning_compress.quantization import quantization_of
from lightning_compress.quantization.affine import integer_weight
from lightning_compress.quantization.coefficients import decoded_weight
from lightning_compress.quantization.weights import WeightQuantizer
from lightning_compress.storage.archive import LARGEST, ArchiveReader, write_archive
from lightning_compress.storage.coding import Coder
from lightning_compress.storage.size import ArchiveSize
from lightning_compress.storage.tensors import FrequencyWeight, IntegerWeight, check_storable

CHANNELS = "lightning_compress.channels"
"""Under which name of the metadata the channels lie that a shrunk network has kept."""

LAYERS = "lightning_compress.layers"
"""Under which name of the metadata it lies what stands for the layers of a compact network."""


def save_compressed(
    model: nn.Module | Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    coders: Sequence[Coder] = ("fixed", "huffman"),
    metadata: Mapping[str, str] | None = None,
    channels: Mapping[str, Mapping[str, Sequence[int]]] | None = None,
    layers: Mapping[str, Mapping[str, Any]] | None = None,
) -> ArchiveSize:
    """Write the weights of a network into a small file: pruned, shared and quantized ones take what they hold.

    Each tensor is written in the form that takes the fewest bytes: as it is, without its zeros (gaps of fixed-width
    runs), as indices into a table of shared values, or as integers with scales; then gaps and indices are coded. Every
    value comes back as it was, but for the sign of zeros; the file is read back to check that. A network that is
    quantized is written as it computes: with rounded weights. Source: Han, Mao & Dally 2016, "Deep Compression",
    arXiv:1510.00149.

    Args:
        model: A model, or a state dict.
        path: The file; its folder is made where missing.
        coders: What to try for gaps and indices: ``"fixed"`` width, ``"huffman"`` codes, and ``"ans"``, which is within
            a few bytes of the entropy and needs the extra ``ans``, to be read too. The smallest is taken.
        metadata: Text to keep beside the weights.
        channels: The record that `shrink` returned for ``model``, so that `load_compressed` can narrow a fresh model.
        layers: The record that `compact` returned for ``model``, so that `load_compressed` can make a fresh model's
            layers as small.

    Returns:
        What each tensor takes after every stage.

    Raises:
        ValueError: If a tensor has a dtype that cannot be kept, or a coder is unknown; what lay at ``path`` stays.
        MissingExtraError: If ``"ans"`` is asked for and its library is not installed.

    Example:
        >>> import torch
        >>> from tempfile import TemporaryDirectory
        >>> net = nn.Linear(100, 100)
        >>> with torch.no_grad():
        ...     _ = net.weight.mul_(net.weight.abs() > 0.09).sign_()
        >>> with TemporaryDirectory() as folder:
        ...     size = save_compressed(net, f"{folder}/net.lcz")
        ...     weights = load_compressed(f"{folder}/net.lcz")
        >>> size.ratio > 20, torch.equal(weights["weight"], net.weight)
        (True, True)
    """
    tensors: Mapping[str, Any] = model.state_dict() if isinstance(model, nn.Module) else model
    check_storable(tensors)
    integers = _integer_weights(model, tensors) if isinstance(model, nn.Module) else {}
    text = dict(metadata or {})
    if channels is not None:
        record = {name: {side: list(kept) for side, kept in sides.items()} for name, sides in channels.items()}
        text[CHANNELS] = json.dumps(record)
    if layers is not None:
        text[LAYERS] = json.dumps({name: dict(found) for name, found in layers.items()})
    made: dict[int, Tensor] = {}  # tied weights stay one
    shipped = dict(tensors)
    for name, weight in integers.items():
        shipped[name] = made.setdefault(tensors[name].data_ptr(), weight.values().to(tensors[name].dtype))
    return write_archive(shipped, path, coders=coders, integers=integers, metadata=text)


def load_compressed(
    path: str | os.PathLike[str], model: nn.Module | None = None, *, largest: int = LARGEST
) -> dict[str, Tensor]:
    """Read the weights that `save_compressed` wrote; nothing that is read is ever run.

    Args:
        path: The file.
        model: A model to load them into. Where a shrunk or compact one was written, give a fresh one, with all its
            channels and layers: it is made as small first.
        largest: Bytes that the weights may take in memory; a file that says it takes more is refused at once.

    Returns:
        The state dict.

    Raises:
        ArchiveError: If the file is no archive, is damaged, or of a newer version, or ``model`` is another network;
            then ``model`` is as it was.
        FileNotFoundError: If there is no file.
        MissingExtraError: If it was written with a library that is not installed.

    Example:
        >>> import torch
        >>> from tempfile import TemporaryDirectory
        >>> first, second = nn.Linear(3, 2), nn.Linear(3, 2)
        >>> with TemporaryDirectory() as folder:
        ...     size = save_compressed(first, f"{folder}/net.lcz")
        ...     weights = load_compressed(f"{folder}/net.lcz", second)
        >>> torch.equal(first.weight, second.weight)
        True
    """
    with ArchiveReader(path, largest) as archive:
        change_ = None
        if model is not None and (differing := _differing(model, archive.shapes)):
            change_ = _recorded_change(archive.metadata)
            if LAYERS not in archive.metadata and change_ is not None:  # then names are those of a fresh model
                differing = [name for name in differing if "of the shape" not in name]
            if change_ is None or (differing and LAYERS not in archive.metadata):
                more = f", and {len(differing) - 3} more" if len(differing) > 3 else ""
                raise ArchiveError(
                    f"{os.fspath(path)} holds another network than this `{type(model).__name__}`: "
                    f"{', '.join(differing[:3])}{more}."
                )
            _check_change(model, change_, archive.shapes, path)
        weights = dict(archive)  # all of it, before anything is changed
    if model is not None:
        if change_ is not None:
            change_(model)
        model.load_state_dict(weights)
    return weights


def _recorded_change(metadata: Mapping[str, str]) -> Callable[[nn.Module], None] | None:
    """Return what makes a fresh model as small as the one that was written, or None where nothing is told of it."""
    channels = _checked_channels(metadata[CHANNELS]) if CHANNELS in metadata else None
    layers = _checked_layers(metadata[LAYERS]) if LAYERS in metadata else None
    if channels is None and layers is None:
        return None

    def change_(model: nn.Module) -> None:
        narrow_(model, channels or {})
        compact_(model, layers or {})

    return change_


def _check_change(
    model: nn.Module,
    change_: Callable[[nn.Module], None],
    shapes: Mapping[str, tuple[int, ...]],
    path: str | os.PathLike[str],
) -> None:
    """Check on a copy that a model takes the weights when it is made smaller."""
    smaller = copy_of(model)
    try:
        change_(smaller)
    except (CompressionError, RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError) as error:
        raise ArchiveError(
            f"{os.fspath(path)} tells of channels or layers that this `{type(model).__name__}` does not have: {error}"
        ) from error
    differing = _differing(smaller, shapes)
    if differing:
        raise ArchiveError(
            f"{os.fspath(path)} holds another network than this `{type(model).__name__}`, which has {differing[0]} "
            "when it is made as small."
        )


def _integer_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, IntegerWeight | FrequencyWeight]:
    """Return what the weights of a quantized model are made of, by their names in its state dict.

    A weight that is rounded for some of its uses alone stays as it is, and a warning names it: so do those that a
    function reads, and the parts of one that attention reads.
    """
    state = quantization_of(model)
    found: dict[str, IntegerWeight | FrequencyWeight] = {}
    if state is None or not state.is_quantizing:
        return found
    prefix = next((f"{name}." if name else "" for name, module in model.named_modules() if module is state.model), "")
    left = []
    for name, quantizer in state.weights.items():
        key = f"{prefix}{name}.weight"
        if key not in tensors:
            left.append(f"`{prefix}{name}`")
            continue
        found[key] = _parts(quantizer, tensors[key])
    for names in _tied(tensors):
        uses = [found.pop(name, None) for name in names]
        first = uses[0]
        if first is not None and all(use is not None and torch.equal(use.values(), first.values()) for use in uses):
            found |= dict.fromkeys(names, first)
        elif any(use is not None for use in uses):
            left.append(" and ".join(f"`{name}`" for name in names))
    if left:
        warnings.warn(
            f"The weights that {', '.join(left)} read are written in float, not as they are rounded there: an archive "
            "holds parameters, and these are not rounded as a whole.",
            stacklevel=3,
        )
    return found


def _parts(quantizer: WeightQuantizer, tensor: Tensor) -> IntegerWeight | FrequencyWeight:
    integers, scales = quantizer.integers(tensor)  # output channels first
    own_order = integers if quantizer.axis == 0 else integers.transpose(0, quantizer.axis)
    weight = IntegerWeight(own_order.cpu().contiguous(), scales.detach().cpu(), quantizer.axis)
    coefficients = quantizer.coefficients_of(tensor)
    if coefficients is None:
        return weight
    rows, steps = tensor.transpose(0, quantizer.axis), quantizer.coefficient_step(tensor).detach()
    codes = coefficients.integers(rows, steps)
    assert coefficients.ratios is not None
    block, bits = coefficients.transform.block, quantizer.integer_bits
    decoded = decoded_weight(codes, steps, coefficients.ratios, rows.shape, block)
    is_whole = torch.equal(integer_weight(decoded, bits)[0], integers)
    return FrequencyWeight(codes.cpu(), steps.cpu(), coefficients.ratios.cpu(), weight, block, bits, is_whole)


def _tied(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    places: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            places.setdefault((tensor.data_ptr(), tuple(tensor.shape)), []).append(name)
    return [names for names in places.values() if len(names) > 1]


def _differing(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    own = model.state_dict()
    return [
        *(f"no `{name}` in the file" for name in own if name not in shapes),
        *(f"no `{name}` in the model" for name in shapes if name not in own),
        *(
            f"`{name}` of the shape {shapes[name]} for {tuple(tensor.shape)}"
            for name, tensor in own.items()
            if name in shapes and shapes[name] != tuple(tensor.shape)
        ),
    ]


def _checked_channels(text: str) -> dict[str, dict[str, list[int]]]:
    try:
        record = json.loads(text)
        found = {name: {side: [int(i) for i in kept] for side, kept in on.items()} for name, on in record.items()}
        if any(i < 0 for on in found.values() for kept in on.values() for i in kept):
            raise ValueError("a channel has a negative number")
        return found
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ArchiveError(f"The record of channels of an archive cannot be read: {error}") from error


def _checked_layers(text: str) -> dict[str, dict[str, Any]]:
    try:
        record = {str(name): dict(found) for name, found in json.loads(text).items()}
        for found in record.values():
            if "groups" in found:
                found["groups"] = [[int(channel) for channel in group] for group in found["groups"]]
                if found["over"] not in OVERS or not all(found["groups"]):
                    raise ValueError("a group is empty, or over something unknown")
            elif found["scheme"] not in SCHEMES or not isinstance(found["rank"], int) or found["rank"] < 1:
                raise ValueError("a rank is no positive number, or its scheme is unknown")
        return record
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise ArchiveError(f"The record of layers of an archive cannot be read: {error}") from error
