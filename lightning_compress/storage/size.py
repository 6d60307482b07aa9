"""What an archive takes: bits of every weight after pruning, sharing and coding."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_compress.storage.tensors import TensorSize


@dataclass(frozen=True)
class ArchiveSize:
    """The stages of Deep Compression in numbers, tensor by tensor.

    Attributes:
        tensors: What each tensor takes.
        file_bytes: Size of the file, with its header.

    Example:
        >>> size = ArchiveSize((TensorSize("w", (4, 4), 4, 2, "sparse shared", 512, 144, 84, 30.0, 64),), 40)
        >>> size.ratio, size.bound_bytes
        (1.6, 3.75)
        >>> print(size.to_text())
        tensor  shape  nonzero, %  values  bits: dense  pruned  shared  coded  bound  written as
        w       4x4          25.0       2        32.00    9.00    5.25   4.00   1.88  sparse shared
        16 entries, 64 bytes as they are, 40 bytes in the file: 1.60 times smaller; the entropy bound is 4 bytes.
    """

    tensors: tuple[TensorSize, ...]
    file_bytes: int

    @property
    def dense_bytes(self) -> int:
        """Bytes of all tensors as they are."""
        return sum(tensor.dense_bits for tensor in self.tensors) // 8

    @property
    def bound_bytes(self) -> float:
        """Zero-order entropy of gaps and indices, with tables and what is written as it is, in bytes."""
        return sum(tensor.bound_bits for tensor in self.tensors) / 8

    @property
    def ratio(self) -> float:
        """How many times smaller than the tensors as they are."""
        return self.dense_bytes / self.file_bytes

    def to_text(self) -> str:
        """Return the table: one line a tensor, bits per entry after each stage."""
        heads = ("tensor", "shape", "nonzero, %", "values", "bits: dense", "pruned", "shared", "coded", "bound")
        rows = [
            (
                tensor.name,
                "x".join(map(str, tensor.shape)) or "1",
                f"{100 * tensor.n_nonzero / n:.1f}",
                "-" if tensor.n_values is None else str(tensor.n_values),
                *(
                    f"{bits / n:.2f}"
                    for bits in (
                        tensor.dense_bits,
                        tensor.pruned_bits,
                        tensor.shared_bits,
                        tensor.coded_bits,
                        tensor.bound_bits,
                    )
                ),
            )
            for tensor in self.tensors
            if (n := math.prod(tensor.shape))
        ]
        widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
        forms = ["written as", *(tensor.form for tensor in self.tensors if math.prod(tensor.shape))]
        lines = [
            "  ".join(
                [
                    *(cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)),
                    *(cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)),
                    form,
                ]
            )
            for row, form in zip((heads, *rows), forms, strict=True)
        ]
        n = sum(math.prod(tensor.shape) for tensor in self.tensors)
        return "\n".join(
            [
                *lines,
                f"{n:,} entries, {self.dense_bytes:,} bytes as they are, {self.file_bytes:,} bytes in the file: "
                f"{self.ratio:.2f} times smaller; the entropy bound is {self.bound_bytes:,.0f} bytes.",
            ]
        )
