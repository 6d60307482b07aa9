"""The masks in force on a model: made, applied, and carried in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.settings import check_same_settings


@torch.no_grad()
def apply_masks_(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Set the dropped entries of ``weights`` to zero, in place.

    The weights stay the plain leaf parameters they are: nothing is renamed and no gradient is recorded.

    Args:
        weights: Tensors by layer name.
        masks: Boolean tensors by layer name, shaped like the weights; ``True`` marks a kept entry.

    Example:
        >>> weight = torch.tensor([1.0, -2.0, 3.0])
        >>> apply_masks_({"a": weight}, {"a": torch.tensor([True, False, True])})
        >>> weight
        tensor([1., 0., 3.])
    """
    for name, mask in masks.items():
        _keep_bits_(weights[name], keep_bits(mask, weights[name]))


def keep_bits(mask: Tensor, weight: Tensor, memory: Tensor | None = None) -> Tensor:
    """Return whole numbers as wide as ``weight``'s, all bits set where ``mask`` is: their conjunction is the quickest.

    Args:
        mask: Boolean tensor, shaped like ``weight``.
        weight: What is to be masked.
        memory: What an earlier call returned for such a weight, to be overwritten: fresh memory costs more than the
            numbers in it.

    Example:
        >>> keep_bits(torch.tensor([True, False]), torch.ones(2))
        tensor([-1,  0], dtype=torch.int32)
    """
    if memory is None or not _is_for(memory, weight):
        memory = torch.empty(mask.shape, dtype=_WHOLE[weight.element_size()], device=weight.device)
    if memory.device.type == "cpu":
        np.negative(mask.cpu().view(torch.int8).numpy(), out=memory.numpy(), dtype=memory.numpy().dtype)
        return memory
    return memory.copy_(mask).neg_()


_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _is_for(bits: Tensor, weight: Tensor) -> bool:
    return bits.device == weight.device and bits.element_size() == weight.element_size() and bits.shape == weight.shape


@torch.no_grad()
def _keep_bits_(weight: Tensor, bits: Tensor) -> None:
    # The zero is +0.0, also where the weight was negative, infinite or NaN.
    weight.detach().view(bits.dtype).bitwise_and_(bits)


@torch.no_grad()
def clear_optimizer_state_(optimizer: Optimizer, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Set the optimizer's momentum and moments to zero at the dropped entries of ``weights``, in place.

    Every tensor of the optimizer's state that has the weight's shape counts, whatever the optimizer calls it.

    Args:
        optimizer: An optimizer; weights that it does not hold are passed over.
        weights: The parameters by layer name.
        masks: Boolean tensors by layer name, shaped like the weights; ``True`` marks a kept entry.

    Example:
        >>> weight = nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> clear_optimizer_state_(optimizer, {"a": weight}, {"a": torch.tensor([True, False])})
        >>> optimizer.state[weight]["momentum_buffer"]
        tensor([1., 0.])
    """
    for name, mask in masks.items():
        for value in _remembered(optimizer, weights[name]):
            _keep_bits_(value, keep_bits(mask, value))


def _remembered(optimizer: Optimizer, weight: Tensor) -> list[Tensor]:
    if weight not in optimizer.state:
        return []  # reading a missing key of this defaultdict would add it
    values = optimizer.state[weight].values()
    return [value for value in values if isinstance(value, Tensor) and value.shape == weight.shape]


class PruningState:
    """The masks in force on one model, and whether they are the final ones.

    It holds plain tensors and no reference to the model, so a deep copy of a model that carries it owns its masks.

    Attributes:
        masks: Boolean tensors by layer name; ``True`` marks a kept entry. Empty before the first mask is made.
        complete: Whether the masks have reached the full target.
        settings: What the masks are made by, as plain types; empty where nobody makes any.

    Example:
        >>> state = PruningState()
        >>> state.masks = {"a": torch.tensor([True, False, True])}
        >>> saved = state.save()
        >>> saved["masks"]
        {'a': tensor([160], dtype=torch.uint8)}
        >>> resumed = PruningState()
        >>> resumed.load(saved)
        >>> resumed.masks, resumed.complete
        ({'a': tensor([ True, False,  True])}, False)
    """

    def __init__(self) -> None:
        self.masks: dict[str, Tensor] = {}
        self.complete = False
        self.settings: dict[str, Any] = {}
        self._bits: dict[str, tuple[Tensor | None, Tensor | None, Tensor | None]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_bits": {}}

    def clear(self) -> None:
        """Forget all masks."""
        self.masks = {}
        self.complete = False

    def apply_(self, weights: Mapping[str, nn.Parameter], *optimizers: Optimizer) -> None:
        """Put ``weights``, and what ``optimizers`` remember of them, under the masks, in place.

        Args:
            weights: The parameters by layer name; each layer that has a mask must be among them.
            *optimizers: The optimizers that train them.

        Example:
            >>> state, weight = PruningState(), nn.Parameter(torch.tensor([1.0, 2.0]))
            >>> state.masks = {"a": torch.tensor([True, False])}
            >>> state.apply_({"a": weight})
            >>> weight.tolist()
            [1.0, 0.0]
        """
        for name, mask in self.masks.items():
            bits = self._bits_for(name, mask, weights[name])
            if bits is None:
                continue
            _keep_bits_(weights[name], bits)
            for value in (value for optimizer in optimizers for value in _remembered(optimizer, weights[name])):
                _keep_bits_(value, bits if _is_for(bits, value) else keep_bits(mask, value))

    def is_obeyed(self, weights: Mapping[str, Tensor]) -> bool:
        """Tell whether ``weights`` are zero wherever the masks say so.

        Example:
            >>> state = PruningState()
            >>> state.masks = {"a": torch.tensor([True, False])}
            >>> state.is_obeyed({"a": torch.tensor([1.0, 0.0])}), state.is_obeyed({"a": torch.tensor([1.0, 2.0])})
            (True, False)
        """
        return not any(bool(weights[name][~mask.to(weights[name].device)].any()) for name, mask in self.masks.items())

    def rest(self) -> None:
        """Free the memory that applying the masks in every step takes."""
        self._bits = {}

    def _bits_for(self, name: str, mask: Tensor, weight: Tensor) -> Tensor | None:
        """Return `keep_bits` of a mask, made once as long as the mask and the weight's place stay; None if all stay."""
        known, bits, memory = self._bits.get(name, (None, None, None))
        if known is not mask or (bits is not None and not _is_for(bits, weight)):
            bits = None if mask.all() else keep_bits(mask, weight, memory)
            self._bits[name] = mask, bits, memory if bits is None else bits
        return bits

    def save(self) -> dict[str, Any]:
        """Return the state as tensors and plain Python types, one bit a weight."""
        return {
            "masks": {name: pack_mask(mask) for name, mask in self.masks.items()},
            "shapes": {name: list(mask.shape) for name, mask in self.masks.items()},
            "complete": self.complete,
            "settings": self.settings,
        }

    def load(self, saved: Mapping[str, Any]) -> None:
        """Take over what :meth:`save` returned; the masks come back on the CPU. An empty dict clears them.

        Raises:
            CompressionError: If it was saved under other settings.
        """
        if not saved:
            self.clear()
            return
        check_same_settings(saved["settings"], self.settings)
        self.settings = saved["settings"]
        self.masks = {name: unpack_mask(bits, saved["shapes"][name]) for name, bits in saved["masks"].items()}
        self.complete = saved["complete"]


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a boolean tensor to one bit an entry.

    Args:
        mask: Boolean tensor of any shape.

    Returns:
        Tensor of ``ceil(mask.numel() / 8)`` uint8 on the CPU; the first entry is the highest bit of the first byte.

    Example:
        >>> pack_mask(torch.tensor([True, False, False, False, False, False, False, True, True]))
        tensor([129, 128], dtype=torch.uint8)
    """
    return torch.from_numpy(np.packbits(mask.flatten().cpu().numpy()))


def unpack_mask(bits: Tensor, shape: list[int]) -> Tensor:
    """Undo :func:`pack_mask`.

    Args:
        bits: uint8 tensor as of :func:`pack_mask`.
        shape: Shape of the mask.

    Returns:
        Boolean tensor of that shape on the CPU.

    Example:
        >>> unpack_mask(torch.tensor([129, 128], dtype=torch.uint8), [3, 3]).int()
        tensor([[1, 0, 0],
                [0, 0, 0],
                [0, 1, 1]], dtype=torch.int32)
    """
    n_entries = torch.Size(shape).numel()
    return torch.from_numpy(np.unpackbits(bits.cpu().numpy(), count=n_entries)).bool().view(shape)
