"""The channels in force on a model: which are masked, applied after every step, and carried in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.pruning.channels.narrowing import ChannelRecord
from lightning_compress.pruning.channels.places import ChannelGroup, Place, record_of, removed_places
from lightning_compress.pruning.state import pack_mask, unpack_mask
from lightning_compress.settings import check_same_settings


class ChannelState:
    """Which channels of one model are masked; it holds plain tensors and no reference to the model.

    Attributes:
        module: Name of the submodule that is pruned; empty for the model itself.
        groups: The channel groups, in that submodule's names; empty before they are found.
        kept: For each group, whether each unit stays: boolean, shape (units,).
        complete: Whether the target is reached.
        settings: What the channels are chosen by, as plain types; empty where nobody chooses any.
        taylor: Scores that were summed up over steps, by group name.
        costs: Multiply-accumulates of one sample in each convolution and linear layer.
        total_cost: Multiply-accumulates of one sample in the whole model.
        left_alone: Why the output channels of other layers stay, by the layer's name.

    Example:
        >>> from lightning_compress.pruning.channels.groups import find_channel_groups
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> state = ChannelState()
        >>> state.groups = find_channel_groups(net, [torch.rand(1, 2)]).groups
        >>> state.kept = [torch.tensor([True, False, True])]
        >>> state.apply_(net)
        >>> net[0].weight[1].tolist(), state.record(net)
        ([0.0, 0.0], {'0': {'out': [0, 2]}, '2': {'in': [0, 2]}})
    """

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {}
        self._places: tuple[list[Tensor], list[Place]] | None = None
        self.forget()

    def forget(self) -> None:
        """Forget the groups, so that they are found anew."""
        self.module = ""
        self.groups: tuple[ChannelGroup, ...] = ()
        self.costs: dict[str, int] = {}
        self.total_cost = 0
        self.left_alone: dict[str, str] = {}
        self.clear()

    @property
    def has_removed(self) -> bool:
        """Whether a channel is masked."""
        return any(not bool(mask.all()) for mask in self.kept)

    def clear(self) -> None:
        """Let all channels stay."""
        self.kept: list[Tensor] = [torch.ones(group.n_units, dtype=torch.bool) for group in self.groups]
        self.taylor: dict[str, Tensor] = {}
        self.complete = False

    def apply_(self, model: nn.Module, *optimizers: Optimizer) -> None:
        """Set the masked channels to zero in ``model``, and in what ``optimizers`` remember of them, in place.

        Args:
            model: The model that holds the submodule.
            *optimizers: Optimizers of its parameters.
        """
        network = model.get_submodule(self.module)
        for place in self._places_in(network):
            parameter = network.get_parameter(place.parameter)
            place.clear_(parameter)
            for optimizer in optimizers:
                if parameter in optimizer.state:  # reading a missing key of this defaultdict would add it
                    for value in optimizer.state[parameter].values():
                        if isinstance(value, Tensor) and value.shape == parameter.shape:
                            place.clear_(value)

    def is_obeyed(self, model: nn.Module) -> bool:
        """Tell whether ``model`` has zeros wherever channels are masked."""
        network = model.get_submodule(self.module)
        for place in self._places_in(network):
            tensor = network.get_parameter(place.parameter).detach()
            part = tensor if place.rows is None else tensor[place.rows[0] : place.rows[1]]
            if bool(part.index_select(place.dim, place.index.to(tensor.device)).any()):
                return False
        return True

    def record(self, model: nn.Module) -> ChannelRecord:
        """Return which channels of which layers of the submodule stay."""
        return record_of(model.get_submodule(self.module), self.groups, self.kept)

    def _places_in(self, network: nn.Module) -> list[Place]:
        if (
            self._places is None
            or len(self._places[0]) != len(self.kept)
            or any(known is not mask for known, mask in zip(self._places[0], self.kept, strict=True))
        ):
            self._places = list(self.kept), removed_places(network, self.groups, self.kept)
        return self._places[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_places": None}

    def save(self) -> dict[str, Any]:
        """Return the state as tensors and plain Python types, one bit a unit."""
        return {
            "module": self.module,
            "groups": [group.save() for group in self.groups],
            "kept": [pack_mask(mask) for mask in self.kept],
            "complete": self.complete,
            "settings": self.settings,
            "taylor": self.taylor,
            "costs": self.costs,
            "total_cost": self.total_cost,
            "left_alone": self.left_alone,
        }

    def load(self, saved: Mapping[str, Any]) -> None:
        """Take over what :meth:`save` returned; an empty dict is a module that was never pruned.

        Raises:
            CompressionError: If it was saved under other settings.
        """
        if not saved:
            self.forget()
            return
        check_same_settings(saved["settings"], self.settings)
        self.module = saved["module"]
        self.groups = tuple(ChannelGroup.load(group) for group in saved["groups"])
        self.kept = [unpack_mask(bits, [group.n_units]) for bits, group in zip(saved["kept"], self.groups, strict=True)]
        self.complete = saved["complete"]
        self.settings = saved["settings"]
        self.taylor = {name: scores.cpu() for name, scores in saved["taylor"].items()}
        self.costs = dict(saved["costs"])
        self.total_cost = saved["total_cost"]
        self.left_alone = dict(saved["left_alone"])
