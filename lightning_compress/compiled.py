"""What `torch.compile` wraps around a method, and how to run what it wraps."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def uncompiled(method: Any) -> Any:
    """Return what `torch.compile` has wrapped, or ``method`` itself where it has wrapped nothing.

    Example:
        >>> import torch
        >>> uncompiled(torch.compile(abs)) is abs
        True
        >>> uncompiled(abs) is abs
        True
    """
    # Wrappers made by `functools.wraps` carry the attributes of what they wrap; the number tells whose they are.
    while getattr(method, "_torchdynamo_wrapper_id", None) == id(method):
        method = method._torchdynamo_orig_callable
        if getattr(method, "__globals__", {}).get("__name__") == "torch._dynamo.external_utils":
            method = method.__wrapped__  # a frame around code of torch's own and around objects that can be called
    return method


@contextmanager
def as_written() -> Iterator[None]:
    """Run what `torch.compile` has wrapped as it was written, and compile nothing.

    What is run once is not worth compiling, and would use up the few versions of a function that torch keeps.

    Example:
        >>> import torch
        >>> with as_written():
        ...     torch.compile(torch.nn.Identity())(1)
        1
    """
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        # A counter of operations hears a compiled network once, and torch warns that it is twice.
        warnings.filterwarnings("ignore", message=".*when there are global hooks on")
        yield
