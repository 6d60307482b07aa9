"""The teacher's cache: what it said of each sample, on disk, so that it need not be asked again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_compress.distillation.taps import Features
from lightning_compress.distillation.teacher import Answer
from lightning_compress.errors import CompressionError
from lightning_compress.processes import rank, wait_for_all

FORMAT = 2
"""Version of the files."""


@dataclass(frozen=True)
class TeacherCache:
    """Where the answers of a teacher are kept, and how much of them.

    Args:
        folder: A folder of its own; made where it does not exist.
        top_k: How many of the largest logits of each sample are kept, of more than twice as many classes, as log
            probabilities; the rest of the probability is spread evenly over the others. None for all logits.

    Raises:
        ValueError: If ``top_k`` is less than 1.

    Example:
        >>> TeacherCache("teacher_cache", top_k=20).top_k
        20
    """

    folder: str | os.PathLike[str]
    top_k: int | None = None

    def __post_init__(self) -> None:
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"`top_k` must be at least 1, got {self.top_k}.")


_META, _DONE, _INPUTS = "cache.json", "done", "inputs"


class CachedAnswers:
    """Answers by the number of the sample, memory-mapped, in half precision.

    Every entry is written before it is marked as done, so that a fill that was interrupted goes on where it ended. With
    every entry the checksum of the network's inputs is kept: a sample that is not what it was is noticed.

    Args:
        folder: Where the files lie; made where it does not exist.
        n_entries: How many samples there are, all views counted.
        identity: What made the answers: settings that must be the same, as plain types.
        top_k: How many of the largest logits of each sample are kept, of more than twice as many classes; None for all.
            The rest of the probability is spread evenly over the others.

    Raises:
        CompressionError: If the folder holds the cache of something else, or files of the wrong size.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> folder = TemporaryDirectory()
        >>> cache = CachedAnswers(folder.name, n_entries=3, identity={"teacher": "a"})
        >>> index, inputs = torch.tensor([2, 0]), torch.tensor([7, 8])
        >>> cache.put(index, inputs, Answer(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), {}))
        >>> cache.get(torch.tensor([0]), torch.tensor([8])).output
        tensor([[3., 4.]])
        >>> cache.get(torch.tensor([1]), torch.tensor([9])) is None
        True
        >>> folder.cleanup()
    """

    def __init__(
        self, folder: str | os.PathLike[str], n_entries: int, identity: Mapping[str, Any], top_k: int | None = None
    ) -> None:
        self.folder = Path(folder)
        self.n_entries = n_entries
        self.top_k = top_k
        self._identity = {"format": FORMAT, "entries": n_entries, "top_k": top_k, **identity}
        self._shapes: dict[str, list[int]] | None = None
        self._arrays: dict[str, npt.NDArray[Any]] = {}
        meta = self.folder / _META
        if meta.exists():
            self._check_is_ours(meta)
        else:
            self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def n_done(self) -> int:
        """How many entries are filled."""
        return int(self._arrays[_DONE].sum()) if _DONE in self._arrays else 0

    def _check_is_ours(self, meta: Path) -> None:
        try:
            saved = json.loads(meta.read_text())
            shapes, prefix, known = saved.pop("shapes"), str(saved.pop("files")), dict(saved)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CompressionError(f"{meta} is no description of a teacher's cache. Delete the folder.") from error
        different = [name for name in {**known, **self._identity} if known.get(name) != self._identity.get(name)]
        if different:
            what = ", ".join(
                f"{name} {known.get(name)!r} instead of {self._identity.get(name)!r}" for name in different
            )
            raise CompressionError(
                f"The cache in {self.folder} was made for something else: {what}. Delete the folder, or give another."
            )
        self._open(shapes, prefix, is_new=False)

    def _open(self, shapes: dict[str, list[int]], prefix: str, *, is_new: bool) -> None:
        self._shapes = shapes
        files: dict[str, tuple[Any, list[int]]] = {_DONE: (np.uint8, []), _INPUTS: (np.int64, [])}
        for name, shape in shapes.items():
            is_cut = name == "" and self.top_k is not None
            files[f"{name}\0values"] = (np.float16, [self.top_k + 1] if is_cut and self.top_k else shape)
            if is_cut and self.top_k:
                files["\0classes"] = (np.int32, [self.top_k])
        for number, (name, (dtype, shape)) in enumerate(files.items()):
            path = self.folder / f"{prefix}-{name if name in (_DONE, _INPUTS) else number}.bin"
            size = self.n_entries * int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
            if is_new:
                with path.open("wb") as file:
                    file.truncate(size)
            found = path.stat().st_size if path.exists() else 0
            if found != size:
                raise CompressionError(
                    f"The cache in {self.folder} is damaged: {path.name} has {found} bytes instead of {size}. Delete "
                    "the folder."
                )
            self._arrays[name] = np.memmap(path, dtype, "r+", shape=(self.n_entries, *shape))

    def get(self, index: Tensor, inputs: Tensor) -> Answer | None:
        """Return what the teacher said of these samples, or None where it has not been asked of all.

        Args:
            index: Their numbers, shape ``(N,)``.
            inputs: Checksums of the network's inputs, see `checksums`.

        Returns:
            The answer on the CPU, in float32.

        Raises:
            CompressionError: If a number is that of no sample, or a sample is not what it was.
        """
        rows = self._rows(index)
        if self._shapes is None or not self._arrays[_DONE][rows].all():
            return None
        self._check_inputs(rows, inputs)
        features: Features = {}
        output = None
        for name, shape in self._shapes.items():
            if name == "":
                output = self._logits(rows, shape[0]) if self.top_k is not None else self._read("\0values", rows)
            else:
                features.setdefault(name.rpartition("#")[0], []).append(self._read(f"{name}\0values", rows))
        return Answer(output, features)

    def put(self, index: Tensor, inputs: Tensor, answer: Answer) -> None:
        """Keep an answer.

        Args:
            index: Numbers of its samples, shape ``(N,)``.
            inputs: Checksums of the network's inputs, see `checksums`.
            answer: What the teacher said of the whole batch.

        Raises:
            CompressionError: If a number is that of no sample, or the answer cannot be kept.
        """
        rows = self._rows(index)
        tensors = {
            f"{name}#{call}": value for name, values in answer.features.items() for call, value in enumerate(values)
        }
        if answer.output is not None:
            tensors = {"": answer.output, **tensors}
        for name, tensor in tensors.items():
            if tensor.dim() == 0 or len(tensor) != len(rows):
                raise CompressionError(
                    f"The teacher's {name.partition('#')[0] or 'output'} has the shape {tuple(tensor.shape)}, which is "
                    f"not one row for each of {len(rows)} samples: it cannot be kept. Train without a cache."
                )
        if self._shapes is None:
            self._create({name: list(tensor.shape[1:]) for name, tensor in tensors.items()})
        assert self._shapes is not None
        if {name: list(tensor.shape[1:]) for name, tensor in tensors.items()} != self._shapes:
            raise CompressionError("The teacher's answers differ in shape between batches: they cannot be kept.")
        done = self._arrays[_DONE][rows].astype(bool)
        self._check_inputs(rows[done], inputs[torch.from_numpy(done)])
        for name, tensor in tensors.items():
            if name == "" and self.top_k is not None:
                self._keep_largest(rows, tensor)
            else:
                halved = tensor.detach().to("cpu", torch.float16)
                if not bool(torch.isfinite(halved).all()):
                    raise CompressionError(
                        f"The teacher's {name.partition('#')[0] or 'output'} holds values up to "
                        f"{float(tensor.abs().max()):.3g}, more than half precision can keep. Train without a cache."
                    )
                self._arrays[f"{name}\0values"][rows] = halved.numpy()
        self._arrays[_INPUTS][rows] = inputs.cpu().numpy()
        self._arrays[_DONE][rows] = 1

    def _create(self, shapes: dict[str, list[int]]) -> None:
        if self.top_k is not None and "" in shapes and (len(shapes[""]) != 1 or shapes[""][0] <= 2 * self.top_k):
            raise CompressionError(
                f"`top_k={self.top_k}` of logits of the shape {(len(shapes['']), *shapes[''])} saves nothing. Leave it "
                "out, or keep fewer than half of the classes."
            )
        if rank() == 0:
            self._write(shapes)
        wait_for_all()
        if self._shapes is None:
            self._check_is_ours(self.folder / _META)

    def _write(self, shapes: dict[str, list[int]]) -> None:
        """Make the files, unless another run has made them in the meantime."""
        prefix = uuid4().hex[:8]
        self._open(shapes, prefix, is_new=True)
        part = self.folder / f"{prefix}-{_META}.part"
        part.write_text(json.dumps({**self._identity, "shapes": shapes, "files": prefix}, indent=2) + "\n")
        try:
            os.link(part, self.folder / _META)  # last: without it there is no cache; and the first of several stays
        except FileExistsError:
            self._shapes = None
            self._arrays = {}
            for path in self.folder.glob(f"{prefix}-*.bin"):
                path.unlink()
        except OSError:  # a file system without hard links
            part.replace(self.folder / _META)
        part.unlink(missing_ok=True)

    def _rows(self, index: Tensor) -> npt.NDArray[np.int64]:
        rows: npt.NDArray[np.int64] = index.cpu().numpy()
        if rows.size and (int(rows.min()) < 0 or int(rows.max()) >= self.n_entries):
            raise CompressionError(
                f"The batch holds sample {int(rows.max())}, and the cache has {self.n_entries} entries: it was made "
                "for another data set."
            )
        return rows

    def _check_inputs(self, rows: npt.NDArray[np.int64], inputs: Tensor) -> None:
        changed = rows[self._arrays[_INPUTS][rows] != inputs.cpu().numpy()] if rows.size else rows
        if changed.size:
            raise CompressionError(
                f"Sample {int(changed[0])} reaches the network as something else than when the cache in {self.folder} "
                "was filled: it is augmented after the data set, mixed with others, or the data have changed. Declare "
                "random augmentations as views of an `IndexedDataset`, delete the folder, or train without a cache."
            )

    def _read(self, name: str, rows: npt.NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(self._arrays[name][rows].astype(np.float32))

    def _keep_largest(self, rows: npt.NDArray[np.int64], logits: Tensor) -> None:
        assert self.top_k is not None
        log_p = logits.detach().float().cpu().log_softmax(1)
        largest, classes = log_p.topk(self.top_k, 1)
        rest = log_p.scatter(1, classes, -torch.inf).logsumexp(1, keepdim=True) - np.log(log_p.shape[1] - self.top_k)
        self._arrays["\0classes"][rows] = classes.to(torch.int32).numpy()
        self._arrays["\0values"][rows] = torch.cat([largest, rest], 1).clamp_min(-6e4).to(torch.float16).numpy()

    def _logits(self, rows: npt.NDArray[np.int64], n_classes: int) -> Tensor:
        values = self._read("\0values", rows)
        classes = torch.from_numpy(self._arrays["\0classes"][rows].astype(np.int64))
        return values[:, -1:].expand(-1, n_classes).scatter(1, classes, values[:, :-1])


def checksums(tensors: list[Tensor], n_samples: int) -> Tensor:
    """Return one number for each sample that tells its inputs from others; order and place of values count.

    Args:
        tensors: The network's inputs; those with one row a sample count.
        n_samples: Samples of the batch.

    Returns:
        Int64 of shape ``(n_samples,)`` on the CPU.

    Raises:
        CompressionError: If no input has a row for each sample.

    Example:
        >>> x = torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0]])
        >>> a, b, c = checksums([x], 3).tolist()
        >>> a == c, a == b
        (True, False)
    """
    total = torch.zeros(n_samples, dtype=torch.int64)
    known = [(number, tensor) for number, tensor in enumerate(tensors) if tensor.dim() and len(tensor) == n_samples]
    if not known:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise CompressionError(
            f"No input of the network has a row for each of the {n_samples} samples, so `cache` cannot tell whether "
            f"they are what they were: the shapes are {shapes}. Put the samples first, or train without a cache."
        )
    for number, tensor in known:
        rows = tensor.detach().reshape(n_samples, -1).contiguous()
        # No word has more than 32 bits: of longer ones, the product would lose the highest bits, such as the sign.
        words = rows.to(torch.uint8) if rows.dtype == torch.bool else rows.view(_INTEGERS[min(rows.element_size(), 4)])
        total += (words.to(torch.int64) * _weights(number, words.shape[1], words.device)).sum(1).cpu()
    return total


@lru_cache(maxsize=8)
def _weights(number: int, n_words: int, device: torch.device) -> Tensor:
    """Return what the words of the input of this number are multiplied by, the same in every step and run."""
    generator = torch.Generator().manual_seed(number)
    return torch.randint(1, 2**31, (n_words,), generator=generator).to(device)


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
