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

    Between two optimizer steps (batches whose gradients are accumulated) a weight does not change, and what was
    computed from it is still there: `holds_for` finds it.

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
        self._source: weakref.ref[Tensor] | None = None
        self._versions = (0, 0, 0)

    def like(self, x: Tensor) -> Tensor:
        """Return a tensor shaped and laid out like ``x``, with arbitrary values.

        Args:
            x: Tensor of any shape and type.
        """
        self._source = None
        if x.device.type != "cpu":
            return torch.empty_like(x)
        is_free = self._tenant is None or self._tenant() is None
        if self._memory is None or not is_free or not _is_alike(self._memory, x):
            self._memory = torch.empty_like(x)
        return self._let()

    def holds_for(self, x: Tensor) -> Tensor | None:
        """Return what was computed here from ``x``, if neither has changed since and `keep_for` said so, else None."""
        is_free = self._tenant is None or self._tenant() is None
        if self._source is None or self._source() is not x or not is_free or self._versions != self._versions_of(x):
            return None
        return self._let()

    def keep_for(self, x: Tensor) -> None:
        """Note that what lies here now was computed from ``x`` alone."""
        if x.device.type == "cpu":
            self._source, self._versions = weakref.ref(x), self._versions_of(x)

    def _versions_of(self, x: Tensor) -> tuple[int, int, int]:
        """Return what changes when the values of ``x`` do, or those that lie here."""
        assert self._memory is not None
        return x.data_ptr(), x._version, self._memory._version

    def _let(self) -> Tensor:
        assert self._memory is not None
        # A view that shares the version counter: should anyone still read the memory, autograd says so.
        tenant = self._memory.detach()
        self._tenant = weakref.ref(tenant)
        return tenant

    def __reduce__(self) -> tuple[type[KeptMemory], tuple[Any, ...]]:
        return KeptMemory, ()


def _is_alike(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and x.dtype == y.dtype and x.stride() == y.stride()
