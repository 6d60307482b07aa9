"""Operations that overwrite memory: where they are in a graph, and how later readers get to read what they wrote."""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

from torch import Tensor, fx, nn

_VIEWS = frozenset(
    {
        "chunk",
        "contiguous",
        "detach",
        "dropout",
        "expand",
        "flatten",
        "getitem",
        "movedim",
        "narrow",
        "permute",
        "reshape",
        "select",
        "split",
        "squeeze",
        "swapaxes",
        "t",
        "transpose",
        "unbind",
        "unflatten",
        "unsqueeze",
        "view",
    }
)
"""Operations, by name, whose result may lie in the memory of their first argument."""

_VIEW_MODULES = (nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


_IN_PLACE_OPERATORS = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}
_IN_PLACE_METHODS = ("add_", "sub_", "mul_", "div_")


def is_in_place(node: fx.Node, module: nn.Module) -> bool:
    """Tell whether ``node``, of a graph of ``module``, overwrites its first argument.

    Example:
        >>> net = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten())
        >>> graph = fx.symbolic_trace(net).graph
        >>> [is_in_place(node, net) for node in graph.nodes]
        [False, True, False, False]
    """
    if node.op == "call_module":
        return bool(getattr(module.get_submodule(str(node.target)), "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        in_place_name = name.endswith("_") and not name.endswith("__")
        return node.target in _IN_PLACE_OPERATORS or bool(node.kwargs.get("inplace")) or in_place_name
    return False


def memory_of(node: fx.Node, module: nn.Module, stop: Collection[fx.Node] = ()) -> fx.Node:
    """Return the operation, of a graph of ``module``, in whose memory the value of ``node`` may lie.

    Args:
        node: The operation whose value is looked at.
        module: The module whose graph it belongs to.
        stop: Operations to stop at, since their values are taken to lie in memory of their own.

    Returns:
        ``node`` itself, or the operation before all views and in-place operations that lead to it.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Flatten(), nn.ReLU(inplace=True))
        >>> *_, relu, result = fx.symbolic_trace(net).graph.nodes
        >>> memory_of(relu, net)
        _0
    """
    while node not in stop and node.args and isinstance(node.args[0], fx.Node):
        is_view = node.op != "call_module" and (getattr(node.target, "__name__", node.target) in _VIEWS)
        if node.op == "call_module":
            is_view = isinstance(module.get_submodule(str(node.target)), _VIEW_MODULES)
        if not (is_view or is_in_place(node, module)):
            break
        node = node.args[0]
    return node


def with_item(tensor: Tensor, index: Any, value: Any) -> Tensor:
    """Return a copy of ``tensor`` in which ``tensor[index] = value``.

    Example:
        >>> import torch
        >>> with_item(torch.zeros(3), slice(1, None), 2.0)
        tensor([0., 2., 2.])
    """
    result = tensor.clone()
    result[index] = value
    return result


def functionalize_(graph: fx.Graph, module: nn.Module) -> str | None:
    """Let every reader of an overwritten value read the operation that overwrote it.

    What is written into a part of a tensor, as in ``x[:, 1:] = y`` or ``x[:, 1:].add_(y)``, becomes part of a new one.

    Args:
        graph: A graph of ``module``, which is changed.
        module: Whose graph it is.

    Returns:
        None, or the name of an input, parameter or buffer in a part of which it writes: that cannot be left out, nor
        made part of a new tensor.
    """
    for node in list(graph.nodes):
        if not node.args or not isinstance(node.args[0], fx.Node):
            continue
        if node.target is operator.setitem:
            if not _is_own(node.args[0], node, module):
                return str(memory_of(node.args[0], module).target)
            node.target = with_item
            _redirect(node.args[0], node)
        elif is_in_place(node, module):
            part = node.args[0]
            if node.op == "call_function" and node.target in _IN_PLACE_OPERATORS:
                node.target = _IN_PLACE_OPERATORS[node.target]
            _redirect(part, node)
            if (
                node.target in _IN_PLACE_METHODS
                and part.target is operator.getitem
                and _is_own(part.args[0], node, module)
            ):
                node.target = str(node.target).removesuffix("_")
                with graph.inserting_after(node):
                    whole = graph.call_function(with_item, (part.args[0], part.args[1], node))
                _redirect(part.args[0], whole)
    return None


def _is_own(value: Any, writer: fx.Node, module: nn.Module) -> bool:
    """Tell whether a value lies in memory that an operation made, and that nobody else reads after ``writer``."""
    order = {node: position for position, node in enumerate(writer.graph.nodes)}
    root = memory_of(value, module)
    while value is not root:
        value = value.args[0]
        if any(order[user] > order[writer] for user in value.users):
            return False
    return root.op not in ("placeholder", "get_attr")


def _redirect(overwritten: Any, writer: fx.Node) -> None:
    order = {node: position for position, node in enumerate(writer.graph.nodes)}
    for user in list(overwritten.users):
        if order[user] > order[writer]:
            user.replace_input_with(overwritten, writer)
