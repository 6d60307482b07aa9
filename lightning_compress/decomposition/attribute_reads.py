"""Layers whose attributes a forward reads, where two layers in their place could only be called."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from types import CodeType

from torch import nn

LOADS = ("LOAD_ATTR", "LOAD_METHOD")
"""Instructions that load an attribute, as the versions of Python name them."""


def why_read(model: nn.Module, name: str) -> str:
    """Return in which forward a layer is asked for what a `nn.Sequential` lacks; empty where none is found.

    The forwards of the modules around the layer, and the methods that these call, are searched for ``layer.weight`` and
    the like; what other functions read cannot be seen.

    Args:
        model: The model.
        name: Name of the layer.

    Example:
        >>> why_read(nn.TransformerEncoderLayer(4, 2, 8), "linear1")
        'has its `weight` read in the forward of a `TransformerEncoderLayer`'
    """
    *path, own = name.split(".")
    for depth in range(len(path) + 1):
        kind = type(model.get_submodule(".".join(path[:depth])))
        for owner, attribute in attribute_reads(kind):  # type: ignore[arg-type]
            if owner == own and not hasattr(nn.Sequential(), attribute):
                return f"has its `{attribute}` read in the forward of a `{kind.__name__}`"
    return ""


@cache
def attribute_reads(kind: type[nn.Module]) -> tuple[tuple[str, str], ...]:
    """Return pairs of names that the forward of a class loads one right after the other, as of ``self.layer.weight``.

    Example:
        >>> class Net(nn.Module):
        ...     def forward(self, x):
        ...         return self.layer.weight @ x
        >>> ("layer", "weight") in attribute_reads(Net)
        True
    """
    found = []
    for code in _codes(kind):
        loads = [step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG"]
        found += [
            (str(first.argval), str(second.argval))
            for first, second in pairwise(loads)
            if first.opname in LOADS and second.opname in LOADS
        ]
    return tuple(dict.fromkeys(found))


def _codes(kind: type[nn.Module]) -> Iterator[CodeType]:
    """Yield the code of a forward and of all methods of the class that it names, and these name in turn."""
    own = [base for base in kind.__mro__ if issubclass(base, nn.Module) and base is not nn.Module]
    own = [base for base in own if not base.__module__.startswith("lightning.")]
    names, seen = ["forward"], set()
    while names:
        name = names.pop()
        for base in own:
            code = getattr(inspect.unwrap(vars(base).get(name, len)), "__code__", None)
            if isinstance(code, CodeType) and code not in seen:
                seen.add(code)
                names += code.co_names
                yield code
