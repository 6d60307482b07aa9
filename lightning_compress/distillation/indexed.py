"""Indexed data sets: samples that tell which they are, so that what a teacher said of them can be kept."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset, default_collate

from lightning_compress.errors import CompressionError


class IndexedBatch(NamedTuple):
    """A batch and the numbers of its samples; of one sample before it is collated.

    Attributes:
        batch: What the user's data set gives.
        index: Number of the sample and of its view: int64 of shape ``(N,)``, or an int.
    """

    batch: Any
    index: Any


class IndexedDataset(Dataset[IndexedBatch]):
    """A data set whose samples carry their number, which `KnowledgeDistillation` takes off again before your step.

    Args:
        dataset: A map-style data set.
        views: How many augmentations of each sample there are. By default the data set must give the same sample at
            every read. With a number, each read draws one of that many views, and Python's, NumPy's and torch's random
            numbers begin anew for it, so that a view is the same whenever it is drawn.

    Raises:
        TypeError: If ``dataset`` has no length or no items.
        ValueError: If ``views`` is less than 1.

    Example:
        >>> dataset = IndexedDataset([torch.tensor([1.0]), torch.tensor([2.0])])
        >>> dataset[1]
        IndexedBatch(batch=tensor([2.]), index=1)
        >>> collate_indexed([dataset[0], dataset[1]]).index
        tensor([0, 1])
    """

    def __init__(self, dataset: Dataset[Any] | Sequence[Any], views: int | None = None) -> None:
        if not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__"):
            raise TypeError(f"`dataset` must have a length and items, got {type(dataset).__name__}.")
        if views is not None and views < 1:
            raise ValueError(f"`views` must be at least 1, got {views}.")
        self.dataset: Any = dataset
        self.views = views

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def n_entries(self) -> int:
        """How many different samples there are, all views counted."""
        return len(self) * (self.views or 1)

    def __getitem__(self, index: int) -> IndexedBatch:
        if self.views is None:
            return self._entry(index)
        return self._entry(index * self.views + int(torch.randint(self.views, ())))

    def _entry(self, entry: int) -> IndexedBatch:
        if self.views is None:
            return IndexedBatch(self.dataset[entry], entry)
        with _random_numbers_of(entry):
            return IndexedBatch(self.dataset[entry // self.views], entry)

    def entries(self) -> Dataset[IndexedBatch]:
        """Return every view of every sample, in order.

        Example:
            >>> [sample.index for sample in IndexedDataset([1.0, 2.0], views=2).entries()]
            [0, 1, 2, 3]
        """
        return _Entries(self)

    def check_repeats(self) -> None:
        """Check that some samples are the same at two reads.

        Raises:
            ValueError: If one is not.
        """
        for index in sorted({0, len(self) // 2, len(self) - 1}):
            reads = []
            for seed in (1, 2):
                with _random_numbers_of(seed):
                    reads.append(self.dataset[index])
            if self.views is None and not _is_same(*reads):
                raise ValueError(
                    f"Sample {index} of the training data differs between two reads, as by a random augmentation. What "
                    "the teacher said of one would be taken for what it says of the other. Declare how many views of "
                    "each sample there are, `IndexedDataset(dataset, views=4)`, or train without a cache."
                )


class _Entries(Dataset[IndexedBatch]):
    def __init__(self, indexed: IndexedDataset) -> None:
        self._indexed = indexed

    def __len__(self) -> int:
        return self._indexed.n_entries

    def __getitem__(self, entry: int) -> IndexedBatch:
        if not 0 <= entry < len(self):
            raise IndexError(f"There is no entry {entry} of {len(self)}.")
        return self._indexed._entry(entry)


@contextmanager
def _random_numbers_of(seed: int) -> Iterator[None]:
    """Begin Python's, NumPy's and torch's random numbers anew inside, and go on with them as they were outside."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would seed the devices too
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _is_same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and _is_same(first.detach().cpu().numpy(), second.detach().cpu().numpy())
    if isinstance(first, np.ndarray):
        return np.array_equal(first, second, equal_nan=first.dtype.kind in "fc")
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_is_same(first[key], second[key]) for key in first)
    if isinstance(first, tuple | list):
        return len(first) == len(second) and all(map(_is_same, first, second))
    try:
        return bool(first == second)
    except (TypeError, ValueError, RuntimeError):  # no truth value: nothing is known of it
        return True


def collate_indexed(
    samples: Sequence[IndexedBatch], collate: Callable[[list[Any]], Any] = default_collate
) -> IndexedBatch:
    """Collate samples of an `IndexedDataset`; torch's default does so too, a collate function of your own needs this.

    Args:
        samples: The samples.
        collate: Your collate function: ``DataLoader(..., collate_fn=partial(collate_indexed, collate=mine))``.
    """
    return IndexedBatch(collate([sample.batch for sample in samples]), torch.tensor([s.index for s in samples]))


def without_numbers(batch: Any) -> tuple[Any, Tensor | None]:
    """Return a batch as the user's data sets give it, and the numbers of its samples.

    Args:
        batch: What a loader, or a combination of several, gives.

    Returns:
        The batch, and int64 of shape ``(N,)``; None where no sample tells its number.

    Raises:
        CompressionError: If samples of several loaders tell theirs.

    Example:
        >>> batch, index = without_numbers({"small": IndexedBatch(torch.ones(2), torch.tensor([4, 0])), "big": 7})
        >>> batch, index
        ({'small': tensor([1., 1.]), 'big': 7}, tensor([4, 0]))
    """
    leaves, structure = pytree.tree_flatten(batch, is_leaf=_is_indexed)
    numbers = [leaf.index for leaf in leaves if isinstance(leaf, IndexedBatch)]
    if not numbers:
        return batch, None
    if len(numbers) > 1:
        raise CompressionError(
            f"{len(numbers)} loaders of this batch draw from an `IndexedDataset`, so a number may be that of any of "
            "them. Wrap the data set of the loader alone whose samples the network is distilled on."
        )
    return pytree.tree_unflatten([leaf.batch if _is_indexed(leaf) else leaf for leaf in leaves], structure), numbers[0]


def _is_indexed(leaf: Any) -> bool:
    return isinstance(leaf, IndexedBatch)
