"""What every test shares."""

from __future__ import annotations

import torch

# The networks here are tiny: more threads than one only wait for one another, and sums come out in another order.
torch.set_num_threads(1)
