"""Random inputs of the examples."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TensorBatch = Callable[[int, int], Tensor]
"""Makes one tensor: how many samples, and a seed."""


def random_values(*shape: int) -> TensorBatch:
    """Return batches of values in [-1.5, 1.5), each sample of ``shape``."""

    def batch(n_samples: int, seed: int) -> Tensor:
        return torch.rand(n_samples, *shape, generator=torch.Generator().manual_seed(seed)) * 3.0 - 1.5

    return batch


def random_integers(limit: int, *shape: int) -> TensorBatch:
    """Return batches of integers below ``limit``, each sample of ``shape``."""

    def batch(n_samples: int, seed: int) -> Tensor:
        return torch.randint(0, limit, (n_samples, *shape), generator=torch.Generator().manual_seed(seed))

    return batch
