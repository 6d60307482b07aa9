"""Random inputs of the examples."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.any_model.journey import Batch


def random_values(*shape: int) -> Batch:
    """Return batches of values in [-1.5, 1.5), each sample of ``shape``."""

    def batch(n_samples: int, seed: int) -> Tensor:
        return torch.rand(n_samples, *shape, generator=torch.Generator().manual_seed(seed)) * 3.0 - 1.5

    return batch


def random_integers(limit: int, *shape: int) -> Batch:
    """Return batches of integers below ``limit``, each sample of ``shape``."""

    def batch(n_samples: int, seed: int) -> Tensor:
        return torch.randint(0, limit, (n_samples, *shape), generator=torch.Generator().manual_seed(seed))

    return batch
