"""The teacher's answers during a fit: asked for, or read where they were kept before."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from lightning_compress.distillation import (
    Answer,
    CachedAnswers,
    DistillationLoss,
    IndexedDataset,
    TeacherCache,
    TeacherEnsemble,
    checksums,
    identity_of_function,
    without_numbers,
)
from lightning_compress.errors import CompressionError
from lightning_compress.processes import wait_for_all


class KeptAnswers:
    """What a teacher says of the calls of a fit, out of a cache where there is one.

    Args:
        cache: Where answers are kept, or None to ask the teacher every time.
        teacher: The teacher.
        losses: What reads its answers.

    Raises:
        ValueError: If the teacher may say something else later, or a loss needs more than is kept.
    """

    def __init__(
        self,
        cache: TeacherCache | str | os.PathLike[str] | None,
        teacher: TeacherEnsemble,
        losses: Sequence[DistillationLoss],
    ) -> None:
        self._cache = cache if isinstance(cache, TeacherCache) or cache is None else TeacherCache(cache)
        self._teacher = teacher
        self.answers: CachedAnswers | None = None
        if self._cache is None:
            return
        teacher.identity()  # raises where answers may change
        for loss in losses:
            if self._cache.top_k is not None and not loss.pairs and not loss.needs_probabilities_alone:
                raise ValueError(
                    f"`top_k` keeps the largest probabilities alone, and `{type(loss).__name__}` compares all logits "
                    "as they are. Leave `top_k` out."
                )

    @property
    def has_cache(self) -> bool:
        """Whether answers are kept at all."""
        return self._cache is not None

    def open(self, loaders: Any, output: Any, layers: Sequence[str], dtype: torch.dtype) -> None:
        """Open the cache for the data of a run; all processes must call it.

        Args:
            loaders: The training loader, or any nesting of several.
            output: How the output is selected, or False where no loss reads it.
            layers: Names of the teacher's modules that are kept too.
            dtype: Floating-point type of the student, which may be that of its inputs.

        Raises:
            CompressionError: If the data do not tell the numbers of their samples, or the cache is that of others.
            ValueError: If a sample differs between two reads.
        """
        if self._cache is None:
            return
        dataset = _indexed_dataset(loaders)
        if dataset is None:
            raise CompressionError(
                "`cache` keeps the teacher's answers by the number of the sample, which the training data do not tell. "
                "Wrap them: `DataLoader(IndexedDataset(dataset), ...)`."
            )
        dataset.check_repeats()
        identity = {
            "teachers": self._teacher.identity(),
            "views": dataset.views,
            "output": identity_of_function(output) if callable(output) else repr(output),
            "layers": list(layers),
            "precision": str(dtype),
        }
        self.answers = CachedAnswers(self._cache.folder, dataset.n_entries, identity, self._cache.top_k)
        wait_for_all()  # all have seen whether there is one before any of them makes one

    def fill(
        self,
        loader: DataLoader[Any],
        inputs: Callable[[Any], Any] | None,
        select: Callable[[Any], Tensor] | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> int:
        """Ask the teacher of every entry that is not filled yet, in order.

        Args:
            loader: A loader over an `IndexedDataset`, whose batch size, workers and collate function are taken over.
            inputs: Takes the arguments of the network out of a batch: a tensor, a tuple, or a dict of keywords; None
                for the batch itself, or for the first entry of a tuple or list.
            select: Takes the logits out of the teacher's output; None where no loss reads them.
            device: Where the teacher runs.
            dtype: What the network's inputs are cast to, where they are floats, as its step will get them.

        Returns:
            How many entries the cache has, all of them filled.
        """
        dataset = _indexed_dataset(loader)
        assert dataset is not None
        assert self.answers is not None  # `open` was called
        if loader.batch_sampler is None:
            raise _single_samples()
        every_entry = DataLoader(
            dataset.entries(),
            batch_size=loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 1,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
        )
        for batch in every_entry:
            own_batch, index = without_numbers(move_data_to_device(batch, device))
            found = _first_of(own_batch) if inputs is None else inputs(own_batch)
            found = pytree.tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, found)
            args, kwargs = ((), found) if isinstance(found, dict) else (_as_tuple(found), {})
            self.answer(args, kwargs, index, select, device)
        return self.answers.n_done

    def close(self) -> None:
        """Ask the teacher until `open`."""
        self.answers = None

    def answer(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        index: Tensor | None,
        select: Callable[[Any], Tensor] | None,
        device: torch.device,
    ) -> Answer:
        """Return what the teacher says of a call, or has said before.

        Args:
            args: Positional arguments of a call of the student's network.
            kwargs: Its keyword arguments.
            index: Numbers of the batch's samples, or None where the batch does not tell.
            select: Takes the logits out of the teacher's output; None where no loss reads them.
            device: Where the answer is wanted.

        Raises:
            CompressionError: If there is a cache and no ``index``, or the cache cannot be used.
        """
        if self.answers is None:
            return self._teacher.answer(args, kwargs, select)
        if index is None:
            raise CompressionError(
                "A training batch came without the numbers of its samples, by which `cache` keeps the teacher's "
                "answers. Wrap every training data set: `IndexedDataset(dataset)`; with a collate function of your own "
                "use `collate_fn=partial(collate_indexed, collate=mine)`."
            )
        if not isinstance(index, Tensor):
            raise _single_samples()
        tensors = [leaf for leaf in pytree.tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]
        sums = checksums(tensors, len(index))
        found = self.answers.get(index, sums)
        if found is None:
            self.answers.put(index, sums, self._teacher.answer(args, kwargs, select))
            found = self.answers.get(index, sums)  # what a later run will read
        assert found is not None
        output = None if found.output is None else found.output.to(device)
        return Answer(output, {name: [v.to(device) for v in values] for name, values in found.features.items()})


def _single_samples() -> CompressionError:
    return CompressionError(
        "The training loader gives single samples (`batch_size=None`), and `cache` keeps rows of batches. Let the "
        "loader make the batches, or train without a cache."
    )


def _first_of(batch: Any) -> Any:
    return batch[0] if isinstance(batch, tuple | list) else batch


def _as_tuple(found: Any) -> tuple[Any, ...]:
    return found if isinstance(found, tuple) else (found,)


def _indexed_dataset(loaders: Any) -> IndexedDataset | None:
    """Return the indexed data set that a loader, or one of several, draws from."""
    for loader in pytree.tree_leaves(loaders):
        found = getattr(loader, "dataset", None)
        while found is not None and not isinstance(found, IndexedDataset):
            found = getattr(found, "dataset", None)
        if found is not None:
            return found
    return None
