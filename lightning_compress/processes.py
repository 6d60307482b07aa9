"""What several training processes have to agree on."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.utils import _pytree as pytree

from lightning_compress.errors import CompressionError

T = TypeVar("T", bound=Hashable)


def n_processes() -> int:
    """Return the number of processes that train together.

    Example:
        >>> n_processes()
        1
    """
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Return the number of this process among those that train together, from 0.

    Example:
        >>> rank()
        0
    """
    return distributed.get_rank() if n_processes() > 1 else 0


def wait_for_all() -> None:
    """Wait until all processes have come here; all must call it.

    Example:
        >>> wait_for_all()
    """
    if n_processes() > 1:
        distributed.barrier()


@contextmanager
def alone() -> Iterator[None]:
    """Let this process compute as if there were no others: what it runs inside waits for nobody.

    Metrics exchange their states wherever a process group is initialized; one process alone would wait for ever.

    Example:
        >>> with alone():
        ...     n_processes()
        1
    """
    if n_processes() == 1:
        yield
        return
    world = distributed.group.WORLD
    distributed.group.WORLD = None
    try:
        yield
    finally:
        distributed.group.WORLD = world


def collective_device() -> torch.device:
    """Return the device that tensors must lie on to be exchanged between the processes."""
    return torch.device("cuda" if distributed.get_backend() == "nccl" else "cpu")


def union(items: Sequence[T]) -> list[T]:
    """Return what the processes have found, in the order of the processes, each item once; all must call it.

    Example:
        >>> union(["a", "b"])
        ['a', 'b']
    """
    if n_processes() == 1:
        return list(items)
    has_items = torch.tensor([float(bool(items))], device=collective_device())
    distributed.all_reduce(has_items, distributed.ReduceOp.MAX)
    if not has_items.item():
        return []
    found: list[list[T]] = [[] for _ in range(n_processes())]
    distributed.all_gather_object(found, list(items))
    return list(dict.fromkeys(item for part in found for item in part))


@torch.no_grad()
def average_(tensors: Sequence[Tensor]) -> None:
    """Put the mean over the processes in the place of each tensor; all must call it.

    Example:
        >>> average_([torch.ones(2)])
    """
    if n_processes() == 1:
        return
    for tensor in tensors:
        distributed.all_reduce(tensor)
        tensor /= n_processes()


def check_alike(what: str, state: Any) -> None:
    """Check that ``state`` is the same in all processes; all must call it.

    Args:
        what: What the state is, for the message.
        state: Any nesting of tensors and plain types.

    Raises:
        CompressionError: If it is not; in every process.

    Example:
        >>> check_alike("masks", {"conv": torch.ones(3)})
    """
    if odd := odd_ranks(state):
        raise CompressionError(
            f"The {what} of rank {odd} are not those of rank 0, so the processes have trained "
            "different networks. Let every process take the same path through the training step, with weights that "
            "began alike."
        )


def odd_ranks(state: Any) -> str:
    """Return the ranks whose ``state`` is not that of rank 0, for a sentence; all must call it.

    Args:
        state: Any nesting of tensors and plain types.

    Example:
        >>> odd_ranks({"conv": torch.ones(3)})
        ''
    """
    if n_processes() == 1:
        return ""
    digests: list[str] = [""] * n_processes()
    distributed.all_gather_object(digests, digest(state))
    return ", ".join(str(rank) for rank, found in enumerate(digests) if found != digests[0])


def digest(state: Any) -> str:
    """Return a number that is the same for the same values.

    Example:
        >>> digest({"a": torch.ones(2)}) == digest({"a": torch.ones(2)})
        True
        >>> digest({"a": torch.ones(2)}) == digest({"a": torch.zeros(2)})
        False
    """
    leaves, structure = pytree.tree_flatten(state)
    found = hashlib.sha256(str(structure).encode())
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            found.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            found.update(leaf.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        else:
            found.update(repr(leaf).encode())
    return found.hexdigest()
