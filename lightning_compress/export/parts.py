"""Parts of a model that can be exported where the whole cannot, and the part that stands in the way."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from lightning_compress.errors import ExportError
from lightning_compress.export.arguments import CallArguments

ATTEMPTS = 8
"""How many parts are tried at most: a large model has hundreds."""

LEAST_SHARE = 0.05
"""Of the model's parameters, in a part worth offering."""


class UnexportableError(ExportError):
    """A model that cannot be exported as a whole; the message names what stands in the way and what can be exported.

    Args:
        owner: Class of the model.
        obstacle: Name of the submodule that cannot be followed; empty where it is not known.
        reason: What the exporter said.
        part: Name of a submodule that can be exported; empty where none was found.

    Example:
        >>> print(UnexportableError("Detector", "heads", "values decide.", "backbone"))
        `Detector` cannot be exported as a whole, because `torch.export` cannot follow its `heads` (values decide), but
        its `backbone` can: `OnnxExport(..., module="backbone")`, or `export_onnx(model.backbone, ...)`.
    """

    def __init__(self, owner: str, obstacle: str, reason: str, part: str) -> None:
        self.settings = (owner, obstacle, reason, part)
        what = f"its `{obstacle}`" if obstacle else "its forward"
        cannot = f"because `torch.export` cannot follow {what} ({reason.rstrip('.')})"
        can = (
            f'but its `{part}` can: `OnnxExport(..., module="{part}")`, or `export_onnx(model.{part}, ...)`.'
            if part
            else "and no part of it with many of its parameters can: keep what depends on values out of the forward."
        )
        super().__init__(f"`{owner}` cannot be exported as a whole, {cannot}, {can}")
        self.part = part

    def within(self, path: str) -> UnexportableError:
        """Return the same for the user's module, in which the model is the submodule ``path``.

        Example:
            >>> UnexportableError("Detector", "", "values decide", "backbone").within("net").part
            'net.backbone'
        """
        owner, obstacle, reason, part = self.settings
        names = [f"{path}.{name}" if path and name else name for name in (obstacle, part)]
        return UnexportableError(owner, names[0], reason, names[1])

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.settings


def exportable_part(
    model: nn.Module, inputs: CallArguments, export: Callable[[nn.Module, CallArguments], object]
) -> str:
    """Find, by trying, a submodule that can be exported on its own: of the outermost that can, the largest.

    Args:
        model: A module whose export failed.
        inputs: Arguments of its forward.
        export: Exports a submodule with the arguments that it gets in the model; raises where it cannot.

    Returns:
        Name of the submodule as of ``named_modules()``; empty where none of the larger ones can.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> exportable_part(net, CallArguments((torch.zeros(1, 4),), {}), lambda part, inputs: None)
        '0'
    """
    calls = dict(_calls(model, inputs))
    sizes = {name: _n_parameters(model.get_submodule(name)) for name in calls}
    enough = max(1.0, LEAST_SHARE * _n_parameters(model))
    # Children first, then grandchildren: a backbone is of more use than the largest layer of a head.
    names = sorted((name for name in calls if sizes[name] >= enough), key=lambda name: (name.count("."), -sizes[name]))
    for name in names[:ATTEMPTS]:
        try:
            export(model.get_submodule(name), calls[name])
        except Exception:  # user code under the exporter may raise anything; it only says: not this part
            continue
        return name
    return ""


def _n_parameters(module: nn.Module) -> int:
    # Lowered layers hold their weights as buffers.
    return sum(tensor.numel() for tensor in [*module.parameters(), *module.buffers()])


def _calls(model: nn.Module, inputs: CallArguments) -> Iterator[tuple[str, CallArguments]]:
    """Run the model and yield the first call of each submodule whose arguments an ONNX file can take."""
    first: dict[str, CallArguments] = {}
    handles = []
    for name, module in model.named_modules():
        if name and not isinstance(module, torch.jit.ScriptModule):  # takes no hooks, and has no graph to export

            def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
                # Copies: what follows may overwrite them.
                copied = pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), (args, kwargs))
                first.setdefault(name, CallArguments(*copied))

            handles.append(module.register_forward_pre_hook(keep, with_kwargs=True))
    try:
        with torch.no_grad():
            model(*inputs.args, **inputs.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    for name, call in first.items():
        leaves = pytree.tree_leaves((call.args, dict(call.kwargs)))
        if all(isinstance(leaf, Tensor | int | float | str | None) for leaf in leaves) and any(
            isinstance(leaf, Tensor) for leaf in leaves
        ):
            yield name, call


def obstacle(model: nn.Module, error: BaseException) -> str:
    """Return the name of the submodule in whose forward ``error`` was raised; empty where it was in none.

    Example:
        >>> class Strict(nn.Module):
        ...     def forward(self, x):
        ...         raise ValueError("never")
        >>> net = nn.Sequential(nn.ReLU(), Strict())
        >>> try:
        ...     net(torch.zeros(1))
        ... except ValueError as error:
        ...     obstacle(net, error)
        '1'
    """
    names = {id(module): name for name, module in model.named_modules()}
    found = ""
    cause: BaseException | None = error
    while cause is not None:
        for frame, _ in traceback.walk_tb(cause.__traceback__):
            module = frame.f_locals.get("self")
            # A rewritten forward is an object of its own that knows whose it is.
            for candidate in (module, getattr(module, "owner", None)):
                found = names.get(id(candidate), "") or found
        if found:
            return found
        cause = cause.__cause__ or cause.__context__
    return found


def untranslated(error: BaseException) -> tuple[str, str]:
    """Return where in the model the operator lies that the ONNX converter has no form for, and its name.

    Args:
        error: What the converter raised.

    Returns:
        Name of the submodule and of the operator; both empty where the converter did not stop at an operator.

    Example:
        >>> untranslated(ValueError("something else"))
        ('', '')
    """
    cause: BaseException | None = error
    while cause is not None:
        for frame, _ in traceback.walk_tb(cause.__traceback__):
            node = frame.f_locals.get("node")
            if isinstance(node, fx.Node) and node.op == "call_function":
                stack = list(node.meta.get("nn_module_stack", {}).values())
                path = str(stack[-1][0]) if stack else ""
                return path.removeprefix("model").removeprefix("."), str(node.target)
        cause = cause.__cause__ or cause.__context__
    return "", ""
