"""What an archive takes, for a report: bits of a weight after every stage, and the values that weights share."""

from __future__ import annotations

from dataclasses import dataclass

STAGES = ("dense", "pruned", "shared", "coded")
"""The stages of Deep Compression, in order; each is named as in `ArchivedTensor`."""


@dataclass(frozen=True)
class ArchivedTensor:
    """One tensor of an archive.

    Attributes:
        name: Its name in the state dict.
        shape: Its shape.
        form: How it is written.
        entries: Number of its entries.
        nonzeros: Those that are not zero.
        dense: Bits of an entry as it is.
        pruned: Bits of an entry, in the mean, once zeros are left out.
        shared: The same with small indices for values that are shared.
        coded: The same in the file.
        bound: The zero-order entropy.
        codebook: Of matrices and kernels in floating point the values but zero, in order, where there are at most 256;
            else empty.
    """

    name: str
    shape: tuple[int, ...]
    form: str
    entries: int
    nonzeros: int
    dense: float
    pruned: float
    shared: float
    coded: float
    bound: float
    codebook: tuple[float, ...] = ()


@dataclass(frozen=True)
class ArchivedNetwork:
    """All tensors of an archive.

    Attributes:
        file: Name of the file.
        file_bytes: Its size.
        tensors: What each takes.

    Example:
        >>> tensor = ArchivedTensor("fc.weight", (2, 4), "sparse shared", 8, 4, 32.0, 17.0, 6.0, 4.0, 3.0, (-1.0, 1.0))
        >>> network = ArchivedNetwork("net.lcz", 8, (tensor,))
        >>> network.dense_bytes, network.bits("shared")
        (32, 6.0)
    """

    file: str
    file_bytes: int
    tensors: tuple[ArchivedTensor, ...]

    @property
    def dense_bytes(self) -> int:
        """Bytes of all tensors as they are."""
        return round(sum(tensor.entries * tensor.dense for tensor in self.tensors) / 8)

    def bits(self, stage: str) -> float:
        """Return the bits of an entry after a stage, or of the ``"bound"``, in the mean over all tensors."""
        n = sum(tensor.entries for tensor in self.tensors)
        return float(sum(tensor.entries * getattr(tensor, stage) for tensor in self.tensors) / max(n, 1))
