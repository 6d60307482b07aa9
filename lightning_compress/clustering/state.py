"""Shared weights of a model: which weights are one, kept one over steps, and carried in a checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.clustering.kmeans import Init, kmeans
from lightning_compress.errors import CompressionError
from lightning_compress.selection import TRANSPOSED_LAYERS
from lightning_compress.settings import check_same_settings

Per = Literal["layer", "channel", "group"]
"""What shares a codebook: a layer, an output channel, or so many output channels."""

PERS: tuple[Per, ...] = get_args(Per)

Gradient = Literal["mean", "sum"]
"""What each member of a cluster takes for its gradient."""

GRADIENTS: tuple[Gradient, ...] = get_args(Gradient)


def books_of(layer: nn.Module, per: Per, group_size: int) -> Tensor:
    """Return for every weight of a layer the number of its codebook, int64 in a shape that goes with the weight's.

    Args:
        layer: A convolution or linear layer.
        per: What shares a codebook.
        group_size: Output channels of a group.

    Example:
        >>> books_of(nn.Linear(3, 4), "group", 2).flatten().tolist()
        [0, 0, 1, 1]
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    shape = [1] * weight.dim()
    if per == "layer":
        return torch.zeros(shape, dtype=torch.long)
    axis = 1 if isinstance(layer, TRANSPOSED_LAYERS) else 0
    shape[axis] = weight.shape[axis]
    return (torch.arange(weight.shape[axis]) // (1 if per == "channel" else group_size)).view(shape)


def check_enough_weights(name: str, weight: Tensor, books: Tensor, n_clusters: int) -> None:
    """Check that no codebook has more entries than weights.

    Raises:
        ValueError: If one has.
    """
    n_books = int(books.max()) + 1
    least = int(torch.bincount(books.expand(weight.shape).flatten(), minlength=n_books).min())
    if least < n_clusters:
        raise ValueError(
            f"Layer `{name}` has {least} weights in a codebook, fewer than the {n_clusters} clusters they shall share. "
            f'Ask for fewer clusters, let more weights share a codebook (`per="layer"`), or leave it out with '
            f'`exclude=["{name}"]`.'
        )


def cluster_codes(name: str, weight: Tensor, books: Tensor, n_clusters: int, init: Init) -> Tensor:
    """Return for every weight the number of the value it shares: 0 for zeros, which stay zeros, and one for each.

    Args:
        name: The layer's name, for the message.
        weight: Its weight.
        books: As of `books_of`.
        n_clusters: Values of each codebook, zero not counted.
        init: How centroids begin, see `kmeans`.

    Returns:
        Int32 in the weight's shape; numbers of different codebooks differ, but for the zero.

    Raises:
        CompressionError: If a weight is not finite.

    Example:
        >>> weight = torch.tensor([[0.0, 1.0, 1.2], [5.0, 0.0, 1.1]])
        >>> cluster_codes("fc", weight, torch.zeros(1, 1, dtype=torch.long), 2, "linear")
        tensor([[0, 1, 1],
                [2, 0, 1]], dtype=torch.int32)
    """
    weight = weight.detach().cpu()
    if not bool(torch.isfinite(weight).all()):
        raise CompressionError(f"The weight of layer `{name}` holds NaN or infinite values, which cannot be clustered.")
    codes = torch.zeros(weight.shape, dtype=torch.int32)
    # Books follow one another along one dimension; a book for all lies along the first.
    axis = next((dim for dim, size in enumerate(books.shape) if size > 1), 0)
    channels, firsts = weight.movedim(axis, 0), torch.bincount(books.flatten()).cumsum(0).tolist()
    rows = codes.movedim(axis, 0)
    for book, end in enumerate(firsts if books.numel() > 1 else [len(channels)]):
        part = slice(firsts[book - 1] if book else 0, end)
        members = channels[part] != 0
        if bool(members.any()):
            found = kmeans(channels[part][members], n_clusters, init, seed=book)
            rows[part][members] = (1 + book * n_clusters + found.codes).int()
    return codes


class ClusteringState:
    """Which weights of one model are one.

    It holds plain tensors and no reference to the model, so a deep copy of a model that carries it owns its codes. The
    shared values are those of the weights themselves.

    Attributes:
        codes: By layer name, as of `cluster_codes`; empty before the weights are clustered.
        settings: What the codes are made by, as plain types; empty where nobody makes any.

    Example:
        >>> state, weight = ClusteringState(), nn.Parameter(torch.tensor([1.0, 3.0, 9.0, 5.0]))
        >>> state.codes = {"fc": torch.tensor([1, 1, 0, 2])}
        >>> state.apply_({"fc": weight})
        >>> weight.tolist()
        [2.0, 2.0, 0.0, 5.0]
    """

    def __init__(self) -> None:
        self.codes: dict[str, Tensor] = {}
        self.settings: dict[str, Any] = {}
        self._members: dict[str, _Members] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_members": {}}

    def clear(self) -> None:
        """Forget all codes."""
        self.codes, self._members = {}, {}

    @torch.no_grad()
    def apply_(self, weights: Mapping[str, Tensor], *optimizers: Optimizer) -> None:
        """Put the mean of its members in the place of every clustered weight, in place; zeros stay zeros.

        Where the members are one already, as after the step of an optimizer that treats every weight alike, nothing
        changes, to the bit.

        Args:
            weights: The parameters by layer name; each layer that has codes must be among them.
            *optimizers: The optimizers whose momentum and moments of the weights become one too.
        """
        for name in self.codes:
            weight = weights[name]
            self._unite_(name, weight.detach())
            for optimizer in optimizers:
                for value in _remembered(optimizer, weight):
                    self._unite_(name, value)

    @torch.no_grad()
    def unite_gradients_(self, weights: Mapping[str, Tensor], how: Gradient, names: Collection[str]) -> None:
        """Give all members of a cluster one gradient, in place.

        Args:
            weights: The parameters by layer name.
            how: The mean or the sum of the members' own.
            names: The layers whose gradients these are.
        """
        for name in self.codes:
            gradient = weights[name].grad
            if gradient is not None and name in names:
                self._unite_(name, gradient, how)

    def n_values(self) -> dict[str, int]:
        """Return how many different values each layer's weights have, zero not counted."""
        return {name: int(torch.unique(codes[codes > 0]).numel()) for name, codes in self.codes.items()}

    def _unite_(self, name: str, tensor: Tensor, how: Gradient = "mean") -> None:
        members = self._members.get(name)
        if members is None or members.codes.device != tensor.device:
            members = self._members[name] = _Members(self.codes[name], tensor.device)
        members.unite_(tensor, how)

    def rest(self) -> None:
        """Free the memory that uniting the weights in every step takes."""
        self._members = {}

    def save(self) -> dict[str, Any]:
        """Return the state as tensors and plain types."""
        codes = {name: _narrow(codes.cpu()) for name, codes in self.codes.items()}
        return {"codes": codes, "settings": self.settings}

    def load(self, saved: Mapping[str, Any]) -> None:
        """Take over what `save` returned; an empty dict clears it.

        Raises:
            CompressionError: If it was saved under other settings.
        """
        self.clear()
        if not saved:
            return
        check_same_settings(saved["settings"], self.settings)
        self.settings = saved["settings"]
        self.codes = {name: codes.int() for name, codes in saved["codes"].items()}


class _Members:
    """The members of every cluster of one weight, on one device.

    Args:
        codes: As of `cluster_codes`.
        device: Where the weight is.
    """

    def __init__(self, codes: Tensor, device: torch.device) -> None:
        self.codes = codes.reshape(-1).long().to(device)
        self.lengths = torch.bincount(self.codes)
        self.order = self.codes.argsort(stable=True)
        first = (self.lengths.cumsum(0) - self.lengths).clamp_max(len(self.order) - 1)
        self.first = self.order[first]  # one member of each
        self.counts = self.lengths.clamp_min(1)

    def unite_(self, tensor: Tensor, how: Gradient) -> None:
        """Put the mean or the sum over its cluster in the place of every value; zeros for the members of none."""
        precise = torch.float32 if tensor.device.type == "mps" else torch.float64
        flat = tensor.reshape(-1).to(precise)
        # What they differ by from one of them: members that are equal stay as they are, whatever rounds.
        anchors = flat[self.first]
        found = anchors + self.sums(flat - anchors[self.codes]) / self.counts
        if how == "sum":
            found = found * self.counts
        found[0] = 0.0
        tensor.copy_(found.to(tensor.dtype)[self.codes].view(tensor.shape))

    def sums(self, values: Tensor) -> Tensor:
        """Return the sum of every cluster; in one order everywhere, so that processes come to one result."""
        if values.device.type != "cpu":
            return torch.segment_reduce(values[self.order], "sum", lengths=self.lengths)
        return values.new_zeros(len(self.lengths)).index_add_(0, self.codes, values)


def _narrow(codes: Tensor) -> Tensor:
    return codes.to(torch.uint8 if int(codes.max()) < 256 else torch.int16 if int(codes.max()) < 2**15 else torch.int32)


def _remembered(optimizer: Optimizer, weight: Tensor) -> Iterator[Tensor]:
    if weight in optimizer.state:  # reading a missing key of this defaultdict would add it
        for value in optimizer.state[weight].values():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                yield value
