"""The layers that compute with shared filters and with factors, made from a layer and its weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.decomposition.filter_groups import dim_of
from lightning_compress.decomposition.low_rank import Scheme, as_matrix, best_factors

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class GroupSum(nn.Module):
    """Sums the channels of every group of its input; what a layer with one filter for a group reads.

    The groups are no part of the state dict: they are those of the record that the layer is made by.

    Args:
        groups: Channels of each group, all of them once; only the last group may be smaller.
        dim: The dimension of the channels, counted from the end.

    Example:
        >>> GroupSum([[0, 2], [1]], -1)(torch.tensor([[1.0, 10.0, 100.0]]))
        tensor([[101.,  10.]])
    """

    order: Tensor | None

    def __init__(self, groups: Sequence[Sequence[int]], dim: int) -> None:
        super().__init__()
        order = [channel for group in groups for channel in group]
        self.dim, self.size, self.n_channels = dim, len(groups[0]), len(order)
        self.n_groups = len(groups)
        self.n_full = sum(len(group) == self.size for group in groups)
        is_in_order = order == list(range(len(order)))
        self.register_buffer("order", None if is_in_order else torch.tensor(order), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., channels, ...) to (..., groups, ...)."""
        if self.order is not None:
            x = x.index_select(self.dim, self.order)
        n_summed = self.n_full * self.size
        if n_summed == self.n_channels:
            return self._summed(x)
        rest = x.narrow(self.dim, n_summed, self.n_channels - n_summed).sum(self.dim, keepdim=True)
        return torch.cat([self._summed(x.narrow(self.dim, 0, n_summed)), rest], self.dim)

    def _summed(self, x: Tensor) -> Tensor:
        # Counted from the end, the members of a group are the dimension that the channels were.
        return torch.unflatten(x, self.dim, (self.n_full, self.size)).sum(self.dim)

    def extra_repr(self) -> str:
        """Tell how many channels become how many."""
        return f"{self.n_channels} -> {self.n_groups}, groups of {self.size}"


class GroupRepeat(nn.Module):
    """Gives every channel what was computed once for its group, and its own bias.

    Args:
        groups: Channels of each group, all of them once.
        dim: The dimension of the channels, counted from the end.
        bias: What is added to each channel, or None.

    Example:
        >>> GroupRepeat([[0, 2], [1]], -1, torch.tensor([1.0, 2.0, 3.0]))(torch.tensor([[10.0, 20.0]]))
        tensor([[11., 22., 13.]], grad_fn=<AddBackward0>)
    """

    group_of: Tensor

    def __init__(self, groups: Sequence[Sequence[int]], dim: int, bias: Tensor | None) -> None:
        super().__init__()
        group_of = {channel: number for number, group in enumerate(groups) for channel in group}
        self.dim, self.n_groups, self.n_channels = dim, len(groups), len(group_of)
        self.register_buffer("group_of", torch.tensor([group_of[n] for n in range(len(group_of))]), persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., groups, ...) to (..., channels, ...)."""
        x = x.index_select(self.dim, self.group_of)
        return x if self.bias is None else x + self.bias.view(-1, *[1] * (-self.dim - 1))

    def extra_repr(self) -> str:
        """Tell how many channels become how many."""
        return f"{self.n_groups} -> {self.n_channels}, bias={self.bias is not None}"


def shared_layer(layer: nn.Module, over: str, groups: Sequence[Sequence[int]]) -> nn.Sequential:
    """Return what computes as ``layer`` does whose filters are one within each group, with one filter for each.

    Over inputs the channels of a group are summed and convolved once; over outputs each group is computed once, and
    repeated.

    Args:
        layer: A convolution or linear layer.
        over: ``"inputs"`` or ``"outputs"``.
        groups: Channels of each group.

    Example:
        >>> shared_layer(nn.Conv2d(4, 8, 3), "inputs", [[0, 1], [2, 3]])
        Sequential(
          (0): GroupSum(4 -> 2, groups of 2)
          (1): Conv2d(2, 8, kernel_size=(3, 3), stride=(1, 1))
        )
    """
    weight, bias = _weight(layer), layer.bias
    assert bias is None or isinstance(bias, Tensor)
    dim = dim_of("inputs" if over == "inputs" else "outputs")
    first = torch.tensor([group[0] for group in groups], device=weight.device)
    one = weight.detach().index_select(dim, first)
    channels = -1 if isinstance(layer, nn.Linear) else -weight.dim() + 1
    if over == "inputs":
        small = _layer(layer, one, bias)
        return _placed(layer, GroupSum(groups, channels), small)
    return _placed(layer, _layer(layer, one, None), GroupRepeat(groups, channels, bias))


def factor_layers(layer: nn.Module, scheme: Scheme, rank: int) -> nn.Sequential:
    """Return the two layers whose product is the best approximation of ``layer`` of a rank.

    Args:
        layer: A linear layer, or a convolution without groups; one over two dimensions for ``"spatial"``.
        scheme: How the weight is cut in two, see `as_matrix`.
        rank: Channels between the two.

    Example:
        >>> factor_layers(nn.Conv2d(4, 8, 3, stride=2, padding=1), "spatial", 3)
        Sequential(
          (0): Conv2d(4, 3, kernel_size=(3, 1), stride=(2, 1), padding=(1, 0), bias=False)
          (1): Conv2d(3, 8, kernel_size=(1, 3), stride=(1, 2), padding=(0, 1))
        )
    """
    weight, bias = _weight(layer), layer.bias
    assert bias is None or isinstance(bias, Tensor)
    left, right = best_factors(as_matrix(weight.detach(), scheme), rank)
    if isinstance(layer, nn.Linear):
        return _placed(layer, _layer(layer, right, None), _layer(layer, left, bias))
    if scheme == "channel":
        second = left.view(*left.shape, *[1] * (weight.dim() - 2))
        return _placed(
            layer,
            _layer(layer, right.view(rank, *weight.shape[1:]), None),
            _layer(layer, second, bias, stride=1, padding=0, dilation=1, padding_mode="zeros"),
        )
    n_out, n_in, height, width = weight.shape
    down = right.view(rank, n_in, height, 1)
    along = left.view(n_out, width, rank).transpose(1, 2).unsqueeze(2)
    return _placed(layer, _layer(layer, down, None, **_side(layer, 0)), _layer(layer, along, bias, **_side(layer, 1)))


def factor_macs(layer: nn.Module, scheme: Scheme, rank: int) -> tuple[int, int]:
    """Return the multiply-accumulates of the two factors and of the layer itself, for each position of its output.

    Example:
        >>> factor_macs(nn.Conv2d(4, 8, 3), "channel", 3), factor_macs(nn.Conv2d(4, 8, 3, stride=2), "spatial", 3)
        ((132, 288), (144, 288))
    """
    shape = _weight(layer).shape
    if scheme == "channel":
        return rank * (math.prod(shape[1:]) + shape[0]), math.prod(shape)
    n_out, n_in, height, width = shape
    # The first one does not stride along the rows yet.
    return rank * (n_in * height * int(layer.stride[1]) + n_out * width), math.prod(shape)  # type: ignore[index]


def _side(layer: Any, side: int) -> dict[str, Any]:
    """Return the settings of a convolution along one of its two dimensions."""
    padding = layer.padding
    settings: dict[str, Any] = {"padding": padding}
    if not isinstance(padding, str):
        settings["padding"] = tuple(value if dim == side else 0 for dim, value in enumerate(padding))
    for name in ("stride", "dilation"):
        settings[name] = tuple(value if dim == side else 1 for dim, value in enumerate(getattr(layer, name)))
    return settings


def _layer(layer: Any, weight: Tensor, bias: Tensor | None, **changed: Any) -> nn.Module:
    """Return a layer of the same kind with another weight."""
    small: nn.Module
    if isinstance(layer, nn.Linear):
        small = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    else:
        names = ("stride", "padding", "dilation", "padding_mode")
        settings = {name: getattr(layer, name) for name in names} | changed
        small = type(layer)(
            weight.shape[1], weight.shape[0], weight.shape[2:], bias=bias is not None, device="meta", **settings
        )
    small.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    if bias is not None:
        small.bias = nn.Parameter(bias.detach().clone())
    return small


def _placed(layer: nn.Module, *parts: nn.Module) -> nn.Sequential:
    """Return the parts one after the other, on the device, in the mode and as frozen as the layer was."""
    made = nn.Sequential(*parts).to(_weight(layer).device).train(layer.training)
    frozen = {name: not parameter.requires_grad for name, parameter in layer.named_parameters(recurse=False)}
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(not frozen[name.rpartition(".")[2]])
    return made


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight
