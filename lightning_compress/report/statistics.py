"""Statistics: what a model holds (weights, zeros, bits) and what one sample costs (multiply-accumulates)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_compress.compiled import as_written
from lightning_compress.selection import weight_layers


@dataclass(frozen=True)
class LayerStatistics:
    """The weight of one convolution or linear layer, counted.

    Args:
        name: Name of the layer, as of ``named_modules()``.
        kind: Name of its class, such as ``"Conv2d"``.
        shape: Shape of its weight.
        parameters: Entries of its weight; the bias does not count.
        nonzeros: Entries of its weight that are not zero.
        bits: Bits a weight is stored with.

    Example:
        >>> LayerStatistics("fc", "Linear", (2, 5), parameters=10, nonzeros=2, bits=8).sparsity
        0.8
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    nonzeros: int
    bits: int = 32

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in the weight, in [0, 1]."""
        return _share_of_zeros(self.parameters, self.nonzeros)


@dataclass(frozen=True)
class ModelStatistics:
    """A whole model, counted; a tensor that several layers share counts once.

    Args:
        parameters: Entries of all parameters.
        nonzeros: Entries of all parameters that are not zero.
        weight_parameters: Entries of the weights of convolution and linear layers.
        weight_nonzeros: Entries of those weights that are not zero.
        macs: Multiply-accumulates for one sample.
        layers: One row per convolution or linear layer, in the order of ``named_modules()``.
    """

    parameters: int
    nonzeros: int
    weight_parameters: int
    weight_nonzeros: int
    macs: int
    layers: tuple[LayerStatistics, ...]

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in the weights of convolution and linear layers, in [0, 1]."""
        return _share_of_zeros(self.weight_parameters, self.weight_nonzeros)


def model_statistics(
    model: nn.Module,
    example_args: Sequence[Any],
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    bits: Mapping[str, int] | None = None,
) -> ModelStatistics:
    """Count the parameters, zeros and multiply-accumulates of ``model``.

    The model runs once, in eval mode and without gradients; every module is back in its own mode afterwards.
    Multiply-accumulates are those of convolutions, matrix products and attention, zeros included; elementwise
    operations and torch's fused LSTM kernel are not counted.

    Args:
        model: Any module, on the device of its example inputs.
        example_args: Positional inputs of ``forward``; the first tensor among all inputs has the batch as its
            first axis.
        example_kwargs: Keyword inputs of ``forward``.
        bits: Bits of a layer's weight by the layer's name, 32 where not given.

    Returns:
        The counts.

    Raises:
        ValueError: If no input holds a tensor with a batch axis.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 5))
        >>> counted = model_statistics(net, (torch.zeros(7, 1, 4, 4),), bits={"0": 8})
        >>> counted.parameters, counted.macs  # 2 * 9 + 2 + 8 * 5 + 5, and 2 * 9 * (2 * 2) + 8 * 5
        (65, 112)
        >>> [(layer.name, layer.shape, layer.bits) for layer in counted.layers]
        [('0', (2, 1, 3, 3), 8), ('2', (5, 8), 32)]
    """
    layers = weight_layers(model)
    weights = {name: _weight(layer) for name, layer in layers.items()}
    rows = tuple(
        LayerStatistics(
            name=name,
            kind=type(layer).__name__,
            shape=tuple(weights[name].shape),
            parameters=weights[name].numel(),
            nonzeros=_nonzeros(weights[name]),
            bits=(bits or {}).get(name, 32),
        )
        for name, layer in layers.items()
    )
    distinct_weights = {id(weight): weight for weight in weights.values()}.values()
    return ModelStatistics(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        nonzeros=sum(_nonzeros(parameter) for parameter in model.parameters()),
        weight_parameters=sum(weight.numel() for weight in distinct_weights),
        weight_nonzeros=sum(_nonzeros(weight) for weight in distinct_weights),
        macs=_macs_per_sample(model, example_args, example_kwargs or {}),
        layers=rows,
    )


def _macs_per_sample(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    batched = next((tensor for tensor in _tensors((args, kwargs)) if tensor.dim() > 0), None)
    if batched is None:
        raise ValueError(
            "The example inputs hold no tensor with a batch axis. "
            "Pass the inputs of one `forward` call, such as `(images,)` with images of shape (batch, channels, ...)."
        )
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), _eval_mode(model), _countable_attention(), as_written(), counter:
        model(*args, **kwargs)
    return round(counter.get_total_flops() / 2 / len(batched))


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    # Module by module: a frozen batch norm inside a training model has to stay frozen afterwards.
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _countable_attention() -> Iterator[None]:
    # The counter knows matrix products, but neither the fused encoder layer nor the fused attention of the CPU.
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, Iterable) and not isinstance(value, str | bytes):
        for item in value:
            yield from _tensors(item)


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def _nonzeros(tensor: Tensor) -> int:
    return int(torch.count_nonzero(tensor.detach()))


def _share_of_zeros(total: int, nonzeros: int) -> float:
    return (total - nonzeros) / total if total else 0.0
