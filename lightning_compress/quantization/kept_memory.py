"""Memory for a tensor that is computed anew at every training step: kept, instead of mapped afresh each time."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor


class KeptMemory:
    """Hands out the same memory again and again, each time only once whoever had it before is gone.

    The allocator of a CPU gives large tensors back to the operating system, which zeroes and maps their pages anew:
    that costs more than the arithmetic on them. A training step frees its graph, and with it the tensor that lies
    here; a tensor that is still alive (a second call before the backward pass, a graph that is retained) keeps its
    memory, and the next one gets other memory. Devices other than the CPU keep their memory themselves.

    A copy, and what is unpickled, starts without memory.

    Example:
        >>> memory = KeptMemory()
        >>> first = memory.like(torch.ones(3))
        >>> address = first.data_ptr()
        >>> memory.like(torch.ones(3)).data_ptr() == address  # `first` is in use
        False
        >>> second = memory.like(torch.ones(3))
        >>> address = second.data_ptr()
        >>> del second
        >>> memory.like(torch.ones(3)).data_ptr() == address
        True
    """

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        self._tenant: weakref.ref[Tensor] | None = None

    def like(self, x: Tensor) -> Tensor:
        """Return a tensor shaped and laid out like ``x``, with arbitrary values.

        Args:
            x: Tensor of any shape and type.
        """
        if x.device.type != "cpu":
            return torch.empty_like(x)
        is_free = self._tenant is None or self._tenant() is None
        if self._memory is None or not is_free or not _is_alike(self._memory, x):
            self._memory = torch.empty_like(x)
        # A view that shares the version counter: should anyone still read the memory, autograd says so.
        tenant = self._memory.detach()
        self._tenant = weakref.ref(tenant)
        return tenant

    def __reduce__(self) -> tuple[type[KeptMemory], tuple[Any, ...]]:
        return KeptMemory, ()


def _is_alike(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and x.dtype == y.dtype and x.stride() == y.stride()
