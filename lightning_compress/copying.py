"""Copies of modules, with what their last forward left on them."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.compiled import uncompiled

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def copy_of(module: ModuleT) -> ModuleT:
    """Return a deep copy of ``module``, also where it keeps results of its forward among its attributes.

    Such tensors belong to a graph of gradients, and torch refuses to copy them; the copy holds their values alone.
    Methods that `torch.compile` has wrapped for ``module`` would go on running it: the copy has those of its class.

    Args:
        module: Any module.

    Returns:
        The copy.

    Example:
        >>> import torch
        >>> class KeepsItsResult(nn.Linear):
        ...     def forward(self, x):
        ...         self.results = [super().forward(x)]
        ...         return self.results[0]
        >>> layer = KeepsItsResult(1, 1)
        >>> result = layer(torch.ones(1))
        >>> copy_of(layer).results[0].requires_grad, layer.results[0] is result
        (False, True)
    """
    kept = [
        leaf
        for child in module.modules()
        for name, value in vars(child).items()
        if not name.startswith("_")
        for leaf in pytree.tree_leaves(value)
        if isinstance(leaf, Tensor) and not leaf.is_leaf
    ]
    memo: dict[int, Any] = {id(tensor): tensor.detach().clone() for tensor in kept}
    twin = copy.deepcopy(module, memo)
    for child, copied in zip(module.modules(), twin.modules(), strict=True):
        for name in [name for name, value in vars(child).items() if _is_compiled_for(child, value)]:
            vars(copied).pop(name, None)
    return twin


def _is_compiled_for(module: nn.Module, method: Any) -> bool:
    inner = uncompiled(method)
    return inner is not method and getattr(inner, "__self__", None) is module
