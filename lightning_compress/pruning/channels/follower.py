"""Following channels: one run of a model in which every value carries the labels of the channels of its entries.

Each output channel of a convolution or linear layer gets a label. What moves values (views, permutations,
concatenations, slices) moves their labels by the very same function; what combines values entry by entry makes labels
one; convolutions and linear layers write down which labels they read. Everything else that meets a label freezes it:
nothing is taken to be harmless without being known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from lightning_compress.pruning.channels.attention import attention_macs, head_parts
from lightning_compress.pruning.channels.labels import LabelledRun, Reads, Side
from lightning_compress.pruning.channels.outputs import output_tensors, same_random_numbers


def _names(words: str) -> frozenset[str]:
    return frozenset(words.split())


MOVES = _names(
    "view reshape flatten permute transpose swapaxes swapdims movedim moveaxis contiguous chunk split unbind "
    "cat concat concatenate stack getitem unflatten squeeze unsqueeze expand expand_as narrow select roll "
    "clone detach t get view_as reshape_as tensor_split hsplit vsplit hstack vstack repeat tile flip "
    "pixel_shuffle pixel_unshuffle"
)
"""Functions that only move values: applied to the labels, they give the labels of the result."""

EVEN_CUTS = frozenset({"chunk", "tensor_split", "hsplit", "vsplit"})
"""Functions that cut a dimension into parts of equal length, whatever its length is."""

SELECTIONS = frozenset({"getitem", "narrow", "select", "unbind", "split"})
"""Functions that take parts of a dimension by their places: where that takes some labels and not others, all stay."""

ELEMENTWISE = _names(
    "add sub subtract mul multiply div divide true_divide radd rsub rmul rdiv rtruediv truediv iadd isub imul idiv "
    "itruediv rpow ipow maximum minimum where lerp addcmul addcdiv relu relu6 hardtanh hardswish hardsigmoid sigmoid "
    "silu gelu mish elu selu celu leaky_relu rrelu softplus softsign tanh tanhshrink softshrink hardshrink threshold "
    "logsigmoid exp expm1 log log1p sqrt rsqrt pow square abs absolute neg negative reciprocal sign clamp clamp_min "
    "clamp_max clip round floor ceil trunc erf sin cos dropout dropout1d dropout2d dropout3d alpha_dropout "
    "feature_dropout feature_alpha_dropout to float double half bfloat16 type type_as masked_fill nan_to_num copy "
    "requires_grad positive pos"
)
"""Functions whose result at an entry hangs on the same entry of their arguments alone."""

SPATIAL = frozenset(
    f"{kind}_pool{n}d{suffix}"
    for kind in ("max", "avg", "lp", "adaptive_avg", "adaptive_max", "fractional_max")
    for n in (1, 2, 3)
    for suffix in ("", "_with_indices")
) | frozenset({"interpolate", "upsample", "upsample_nearest", "upsample_bilinear"})
"""Functions that combine values of one channel, at dimension 1, over the dimensions behind it."""

REDUCTIONS = _names("mean sum amax amin max min std var prod softmax log_softmax logsumexp norm cumsum")
"""Functions that combine values along dimensions that they are given."""

WRITES = frozenset({"setitem", "set", "index_put", "scatter", "index_copy", "index_fill"})

CONVOLUTIONS = frozenset(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3))


def run_with_labels(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    run: LabelledRun | None = None,
    *,
    is_training: bool = False,
) -> LabelledRun:
    """Run ``model`` once and follow its channels.

    Args:
        model: A module in float, whose forwards are its own.
        args: Positional inputs of its forward.
        kwargs: Keyword inputs.
        run: What earlier runs told, which this one adds to; multiply-accumulates are those of the first.
        is_training: Whether it runs in train mode.

    Returns:
        What the runs told.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(), nn.Conv2d(3, 2, 1))
        >>> run = run_with_labels(net, [torch.rand(1, 1, 4, 4)], {})
        >>> [(name, read.side, read.labels.tolist()) for name, reads in run.reads.items() for read in reads]
        [('0', 'in', [0]), ('0', 'out', [1, 2, 3]), ('2', 'in', [1, 2, 3]), ('2', 'out', [4, 5])]
        >>> run.reasons()
        {4: 'the model returns them', 5: 'the model returns them'}
    """
    is_first, run = run is None, run or LabelledRun()
    follower = _Follower(model, run, counts=is_first)
    modes = [(module, module.training) for module in model.modules()]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    model.train(is_training)
    torch.backends.mha.set_fastpath_enabled(False)  # the fused encoder layer hides its linear layers
    try:
        with same_random_numbers(), torch.no_grad(), follower.watching(), follower:
            outputs = model(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for module, mode in modes:
            module.training = mode
    for tensor in output_tensors(outputs):
        run.freeze(follower.labels(tensor), "the model returns them")
    return run


class _Follower(TorchFunctionMode):
    """Gives every tensor that a run makes its labels: a tensor of numbers that broadcasts to its shape."""

    def __init__(self, model: nn.Module, run: LabelledRun, *, counts: bool) -> None:
        super().__init__()
        self.counts = counts
        self.model = model
        self.run = run
        self.path: list[str] = [""]
        self.n_inside = 0
        self._labels: dict[int, tuple[Tensor, Tensor]] = {}  # holds the tensors too, so that their ids stay theirs
        self._owners: dict[int, str] = {}
        self._outputs: dict[int, Tensor] = {}
        self._parameters = {id(parameter): name for name, parameter in model.named_parameters()}
        for name, module in model.named_modules():
            for tensor in chain(module.parameters(recurse=False), module.buffers(recurse=False)):
                self._owners.setdefault(id(tensor), name)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Know which module is running."""
        # Compiled code cannot be followed, and a scripted module takes no hooks of its own.
        handles: list[RemovableHandle] = [register_module_forward_pre_hook(self._enter_script)]
        for name, module in self.model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            if head_parts(module):
                attention = _Attention(self, name)
                handles.append(module.register_forward_pre_hook(attention.enter, with_kwargs=True))
                handles.append(module.register_forward_hook(attention.leave, with_kwargs=True))
            handles.append(module.register_forward_pre_hook(_Enter(self.path, name)))
            handles.append(module.register_forward_hook(_Leave(self.path), always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter_script(self, module: nn.Module, args: Any) -> None:
        if isinstance(module, torch.jit.ScriptModule):
            self._freeze_all(args, {}, "a scripted module reads them")

    def labels(self, tensor: Tensor) -> Tensor:
        """Return the labels of a tensor; those of one that nothing labelled are zeros."""
        known = self._labels.get(id(tensor))
        if known is not None:
            return known[1]
        if id(tensor) in self._parameters:
            return self._label_parameter(tensor)
        return torch.zeros([1] * tensor.dim(), dtype=torch.long)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").strip("_")
        result = func(*args, **kwargs)
        if self.n_inside:
            return result  # the attention module as a whole is followed
        outputs = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        if outputs:
            self._follow(name, func, args, kwargs, outputs)
        elif name in WRITES:
            self._freeze_all(args, kwargs, f"`{name}` writes into them")
        return result

    def _follow(
        self, name: str, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], outputs: list[Tensor]
    ) -> None:
        if name in CONVOLUTIONS:
            self._convolve(name, args, kwargs, outputs[0])
        elif name == "linear":
            self._apply_linear(args, kwargs, outputs[0])
        elif name in ("batch_norm", "instance_norm"):
            self._normalize(name, args, kwargs, outputs[0])
        elif name in MOVES:
            self._move(name, func, args, kwargs, outputs)
        elif name in SPATIAL:
            labels = self._of_channels(_tensor(args, kwargs, "input"), name)
            for output in outputs:
                self._set(output, labels)
        elif name == "pad":
            self._pad(args, kwargs, outputs[0])
        elif name in REDUCTIONS:
            self._reduce(name, args, kwargs, outputs)
        elif name == "prelu":
            self._rectify(args, outputs[0])
        elif name in ELEMENTWISE:
            self._combine((args, kwargs), outputs[0])
        else:
            self._freeze_all(args, kwargs, f"`{name}` reads them")

    def follow_attention(self, owner: str, inputs: Any, output: Any) -> None:
        """Follow an attention module whose heads are known: it reads its inputs whole, and its heads are its own."""
        module = self.model.get_submodule(owner)
        reading = next(part for part in head_parts(module) if part.role == "reads")
        self._freeze_all((inputs,), {}, "an attention module reads them")
        self._read(owner, "heads", self._own(owner, len(reading.index)))
        leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        makers, result = f"{owner}.{reading.parameter.rpartition('.')[0]}", leaves[0]
        args, kwargs = inputs
        macs = attention_macs(module, args, kwargs)
        self._count(owner, macs[0])
        self._count(makers, macs[1])
        made = self._own(makers, len(reading.of(module)))
        self._read(makers, "out", made)
        self._set(result, _along(made, result.dim() - 1, result.dim()))

    def _convolve(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor) -> None:
        x, weight = _tensor(args, kwargs, "input"), _tensor(args, kwargs, "weight", 1)
        is_transposed = "transpose" in name
        groups = int(kwargs.get("groups", args[6] if len(args) > 6 else 1))
        owner = self._owner(weight)
        n_in = x.shape[1 if x.dim() == weight.dim() else 0]
        n_out = weight.shape[1] * groups if is_transposed else weight.shape[0]
        if owner is None or x.dim() != weight.dim():
            self._freeze(x, "a convolution with weights that are no parameter of a layer reads them")
            return
        labels = self._channels(x, 1)
        if labels is None:
            return
        spatial = output[0, 0].numel() if not is_transposed else x[0, 0].numel()
        self._count(owner, weight.numel() * spatial)
        if groups == n_in == n_out and groups > 1 and not is_transposed:
            own = self._own(owner, n_out)
            self.run.unite(own, labels)
            self._freeze_constants(own, labels)
            self._read(owner, "both", own)
            self._set(output, _along(own, 1, output.dim()))
            return
        self._read(owner, "in", labels, groups)
        own = self._own(owner, n_out)
        if is_transposed and groups > 1:  # rounding has one scale for the same column of all groups
            for row in own.view(groups, -1)[1:]:
                self.run.unite(own.view(groups, -1)[0], row)
            self._read(owner, "out", own)
        else:
            self._read(owner, "out", own, groups)
        self._set(output, _along(own, 1, output.dim()))

    def _apply_linear(self, args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor) -> None:
        x, weight = _tensor(args, kwargs, "input"), _tensor(args, kwargs, "weight", 1)
        owner = self._owner(weight)
        if owner is None:
            self._freeze(x, "a matrix product with weights that are no layer's reads them")
            return
        labels = self._channels(x, x.dim() - 1)
        if labels is None:
            return
        self._count(owner, weight.numel() * (output.numel() // max(1, output.shape[-1] * output.shape[0])))
        self._read(owner, "in", labels)
        own = self._own(owner, weight.shape[0])
        self._read(owner, "out", own)
        self._set(output, _along(own, output.dim() - 1, output.dim()))

    def _normalize(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor) -> None:
        x = _tensor(args, kwargs, "input")
        parts = [value for value in [*args[1:], *kwargs.values()] if isinstance(value, Tensor)]
        labels = self._channels(x, 1)
        if labels is None:
            return
        owners = {self._owners.get(id(part)) for part in parts}
        if None in owners or len(owners) > 1:
            self._freeze(x, f"`{name}` with numbers that are no layer's reads them")
            return
        for owner in owners:
            self._read(str(owner), "both", labels)
        self._set(output, _along(labels, 1, output.dim()))

    def _move(
        self, name: str, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], outputs: list[Tensor]
    ) -> None:
        tensors = [leaf for leaf in pytree.tree_leaves((tuple(args), dict(kwargs))) if isinstance(leaf, Tensor)]
        if not any(bool(self.labels(tensor).any()) for tensor in tensors):
            return
        source = tensors[0]
        if name == "get" and outputs[0].shape == source.shape:
            self._set(outputs[0], self.labels(source))  # `.data`
            return

        def full(tensor: Tensor) -> Tensor:
            return self.labels(tensor).expand(tensor.shape).contiguous() if tensor.is_floating_point() else tensor

        moved_args, moved_kwargs = pytree.tree_map_only(Tensor, full, (tuple(args), dict(kwargs)))
        try:
            moved = func(*moved_args, **moved_kwargs)
        except RuntimeError:
            self._freeze_all(args, kwargs, f"`{name}` moves them in a way that cannot be followed")
            return
        parts = [leaf for leaf in pytree.tree_leaves(moved) if isinstance(leaf, Tensor)]
        for output, labels in zip(outputs, parts, strict=True):
            self._set(output, _compressed(labels))
        if name in SELECTIONS or (name in EVEN_CUTS and len({part.shape for part in parts}) > 1):
            before = set(self.labels(source).flatten().tolist())
            if any(set(part.flatten().tolist()) != before for part in parts):
                self._freeze(source, f"`{name}` takes some of them by their place")
        elif name in EVEN_CUTS or (name in ("view", "reshape", "unflatten") and outputs[0].dim() > source.dim()):
            self._cut(name, source, outputs, parts)

    def _cut(self, name: str, source: Tensor, outputs: list[Tensor], parts: list[Tensor]) -> None:
        """Note that the labels of one dimension are cut into parts of equal length, or into rows."""
        if name in EVEN_CUTS:
            blocks = [_compressed(part).flatten() for part in parts]
            if len({len(block) for block in blocks}) == 1 and len(blocks) > 1 and _cuts(self.labels(source), outputs):
                self.run.blocks.append(torch.stack(blocks))
            return
        labels = _compressed(parts[0])
        varying = [dim for dim, size in enumerate(labels.shape) if size > 1]
        before = [dim for dim, size in enumerate(self.labels(source).shape) if size > 1]
        if len(before) == 1 and len(varying) == 2:
            # Whatever comes next, such as a shuffle, finds every row as it was if all rows lose the same columns.
            rows = labels.reshape(labels.shape[varying[0]], labels.shape[varying[1]])
            for row in rows[1:]:
                self.run.unite(rows[0], row)
                self._freeze_constants(rows[0], row)
        elif varying and len(varying) != len(before):
            self._freeze(source, f"`{name}` cuts them up")

    def _reduce(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], outputs: list[Tensor]) -> None:
        x = _tensor(args, kwargs, "input")
        labels = self.labels(x)
        if name in ("max", "min") and len(args) > 1 and isinstance(args[1], Tensor):
            self._combine((args, kwargs), outputs[0])
            return
        dims = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else None))
        if name == "norm":
            dims = kwargs.get("dim", args[2] if len(args) > 2 else None)
        dims = range(x.dim()) if dims is None or dims == () else [dims] if isinstance(dims, int) else dims
        dims = [dim % x.dim() for dim in dims]
        if any(labels.shape[dim] > 1 for dim in dims):
            self._freeze(x, f"`{name}` combines them")
            return
        for output in outputs:
            kept = output.dim() == x.dim()
            spread = labels if kept else labels.reshape([size for d, size in enumerate(labels.shape) if d not in dims])
            self._set(output, spread)

    def _rectify(self, args: Sequence[Any], output: Tensor) -> None:
        """Follow a PReLU, whose slopes may be one for each channel."""
        x, slopes = args[0], args[1]
        labels = self._channels(x, 1)
        if labels is None:
            return
        if slopes.numel() > 1:
            owner = self._owners.get(id(slopes))
            if owner is None:
                self._freeze(x, "a PReLU whose slopes are no layer's reads them")
                return
            self._read(owner, "both", labels)
        self._set(output, self.labels(x))

    def _pad(self, args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor) -> None:
        x = _tensor(args, kwargs, "input")
        labels = self.labels(x)
        if any(size > 1 and output.shape[dim] != x.shape[dim] for dim, size in enumerate(labels.shape)):
            self._freeze(x, "`pad` adds to them")
            return
        self._set(output, labels)

    def _combine(self, values: Any, output: Tensor) -> None:
        """Make the labels of the arguments one, entry by entry, as they are broadcast to the result."""
        tensors = [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]
        parts = [(tensor, _aligned(self.labels(tensor), output), _aligned_shape(tensor, output)) for tensor in tensors]
        if not any(bool(labels.any()) for _, labels, _ in parts):
            return
        varying = [dim for dim in range(output.dim()) if any(labels.shape[dim] > 1 for _, labels, _ in parts)]
        # What takes part has as many entries as the result along every dimension where labels vary; what is broadcast
        # along all of them takes no part, unless it has a label itself.
        takes_part = [bool(varying) and all(sizes[dim] == output.shape[dim] for dim in varying) for *_, sizes in parts]
        is_spread = [
            not takes and (bool(labels.any()) or any(sizes[dim] > 1 for dim in varying))
            for takes, (_, labels, sizes) in zip(takes_part, parts, strict=True)
        ]
        if any(is_spread) or not varying:
            for tensor, _, _ in parts:
                self._freeze(tensor, "they meet values of another shape")
            return
        shape = [max(labels.shape[dim] for _, labels, _ in parts) for dim in range(output.dim())]
        whole = [labels for takes, (_, labels, _) in zip(takes_part, parts, strict=True) if takes]
        rows = [labels.expand(shape) for labels in whole]
        for row in rows[1:]:
            self.run.unite(rows[0], row)
            self._freeze_constants(rows[0], row)
        self._set(output, _compressed(torch.stack(rows).amax(0)))

    def _channels(self, x: Tensor, dim: int) -> Tensor | None:
        """Return the labels along one dimension, or None, with all frozen, where they vary along others."""
        labels = self.labels(x)
        if any(size > 1 for d, size in enumerate(labels.shape) if d != dim):
            self._freeze(x, "their places differ inside a tensor that a layer reads")
            return None
        return labels.flatten().expand(x.shape[dim]).clone()

    def _of_channels(self, x: Tensor, name: str) -> Tensor:
        labels = self.labels(x)
        channel = 1 if labels.dim() > 1 else 0
        if any(size > 1 for d, size in enumerate(labels.shape) if d > channel):
            self._freeze(x, f"`{name}` combines them")
            return torch.zeros_like(labels[..., :1])
        return labels

    def _label_parameter(self, parameter: Tensor) -> Tensor:
        name = self._parameters[id(parameter)]
        if name not in self.run.parameters:
            self.run.parameters[name] = self.run.new_labels(parameter.numel()).view(parameter.shape)
        labels = self.run.parameters[name]
        self._set(parameter, labels)
        return labels

    def _own(self, owner: str, count: int) -> Tensor:
        """Return the labels of a layer's output channels, the same ones at every call."""
        for read in self.run.reads.get(owner, []):
            if read.side != "in":
                return read.labels
        return self.run.new_labels(count) if count > 1 else torch.zeros(1, dtype=torch.long)

    def _read(self, owner: str, side: Side, labels: Tensor, blocks: int = 1) -> None:
        reads = self.run.reads.setdefault(owner, [])
        for known in reads:
            if known.side == side:
                self.run.unite(known.labels, labels)  # another call of the same layer
                self._freeze_constants(known.labels, labels)
                return
        reads.append(Reads(side, labels, blocks))

    def _freeze_constants(self, first: Tensor, second: Tensor) -> None:
        reason = "they meet values that belong to no channel of a layer"
        self.run.freeze(first[second == 0], reason)
        self.run.freeze(second[first == 0], reason)

    def _count(self, owner: str, macs: int) -> None:
        self.run.costs[owner] = self.run.costs.get(owner, 0) + macs * self.counts

    def _owner(self, weight: Tensor) -> str | None:
        """Return the name of the convolution or linear layer whose weight this is."""
        name = self._owners.get(id(weight))
        if name is None:
            return None
        module = self.model.get_submodule(name)
        is_layer = isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and module.weight is weight
        return name if is_layer else None

    def _set(self, tensor: Tensor, labels: Tensor) -> None:
        self._labels[id(tensor)] = (tensor, labels)

    def _freeze(self, tensor: Tensor, what: str) -> None:
        where = f" in `{self.path[-1]}`" if self.path[-1] else ""
        self.run.freeze(self.labels(tensor), f"{what}{where}")

    def _freeze_all(self, args: Sequence[Any], kwargs: Mapping[str, Any], what: str) -> None:
        for leaf in pytree.tree_leaves((tuple(args), dict(kwargs))):
            if isinstance(leaf, Tensor) and id(leaf) in self._labels:
                self._freeze(leaf, what)


@dataclass(frozen=True)
class _Enter:
    path: list[str]
    name: str

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.path.append(self.name)


@dataclass(frozen=True)
class _Leave:
    path: list[str]

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.path.pop()


@dataclass(frozen=True)
class _Attention:
    """The hooks of an attention module whose heads are known."""

    follower: _Follower
    name: str

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.follower.n_inside += 1

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.follower.n_inside -= 1
        if not self.follower.n_inside:
            self.follower.follow_attention(self.name, (args, kwargs), output)


def _along(labels: Tensor, dim: int, n_dims: int) -> Tensor:
    return labels.reshape([-1 if d == dim else 1 for d in range(n_dims)])


def _compressed(labels: Tensor) -> Tensor:
    """Return the labels with length 1 in every dimension along which they do not vary."""
    for dim in range(labels.dim()):
        if labels.shape[dim] > 1 and bool((labels == labels.narrow(dim, 0, 1)).all()):
            labels = labels.narrow(dim, 0, 1)
    return labels


def _cuts(labels: Tensor, outputs: Sequence[Tensor]) -> bool:
    """Tell whether cutting into ``outputs`` cuts a dimension along which the labels vary."""
    return any(
        size > 1 and any(output.shape[dim] != size for output in outputs) for dim, size in enumerate(labels.shape)
    )


def _aligned(labels: Tensor, output: Tensor) -> Tensor:
    return labels.reshape([1] * (output.dim() - labels.dim()) + list(labels.shape))


def _aligned_shape(tensor: Tensor, output: Tensor) -> list[int]:
    return [1] * (output.dim() - tensor.dim()) + list(tensor.shape)


def _tensor(args: Sequence[Any], kwargs: Mapping[str, Any], name: str, index: int = 0) -> Tensor:
    value = kwargs[name] if name in kwargs else args[index]
    assert isinstance(value, Tensor)
    return value
