"""What every test shares."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

# The networks here are tiny: more threads than one only wait for one another, and sums come out in another order.
torch.set_num_threads(1)


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    """Forget what was compiled: torch keeps few versions of a function, over all the tests of a process."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
