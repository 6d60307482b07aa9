"""Outputs: the tensors in what a forward returns, whatever holds them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def output_tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in ``value``: in sequences, mappings, dataclasses and any other object with attributes.

    Example:
        >>> from types import SimpleNamespace
        >>> output = {"a": torch.tensor(1), "b": SimpleNamespace(c=[torch.tensor(2)])}
        >>> [tensor.item() for tensor in output_tensors(output)]
        [1, 2]
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from output_tensors(item)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from output_tensors(item)
    elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | type) and not callable(value):
        yield from output_tensors(vars(value))


@contextlib.contextmanager
def same_random_numbers() -> Iterator[None]:
    """Let all that runs inside draw the same random numbers every time, and nothing outside notice."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # `torch.manual_seed` would seed the devices too
        yield
