"""From a lowered module to an ONNX model: traced by `torch.export`, converted by PyTorch's own exporter."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.export.arguments import names_of_inputs, names_of_outputs, tensors_of
from lightning_compress.export.translation import translations

OPSET = 20


def to_onnx(
    lowered: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any, names: list[str]
) -> tuple[onnx.ModelProto, bool]:
    """Trace ``lowered`` and convert it.

    Args:
        lowered: A module in eval mode that has been run once.
        args: Positional arguments of its forward.
        kwargs: Keyword arguments of its forward.
        outputs: What it returned for them.
        names: The list that was given to `lower`; afterwards it holds the names of the trace's quantizers.

    Returns:
        The model, and whether its first dimension takes any size.

    Raises:
        Exception: Whatever `torch.export`, the forward under it or the converter raises.
    """
    entry = _Entry(lowered, args, kwargs).eval()
    tensors = tuple(tensors_of(args, kwargs))
    shapes = (tuple({0: torch.export.Dim.DYNAMIC} if tensor.dim() else None for tensor in tensors),)
    names.clear()
    with _quiet(), torch.no_grad():
        is_dynamic = True
        try:
            program = torch.export.export(entry, tensors, dynamic_shapes=shapes, strict=False)
        except Exception:  # whatever stands in the way of a free batch size, a fixed one may still do
            is_dynamic = False
            names.clear()
            tensors = tuple(tensor.clone() for tensor in tensors)  # the first try marked the others as dynamic
            program = torch.export.export(entry, tensors, strict=False)
        exported = torch.onnx.export(
            program,
            tensors,
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=names_of_inputs(lowered, args, kwargs),
            output_names=output_names(lowered, args, kwargs, outputs),
            custom_translation_table=translations(program),
        )
    assert exported is not None
    proto: onnx.ModelProto = exported.model_proto
    return proto, is_dynamic


def output_names(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], outputs: Any) -> list[str]:
    """Return a name for each tensor in ``outputs``, none of which is the name of an input.

    Example:
        >>> class Same(nn.Module):
        ...     def forward(self, x):
        ...         return {"x": x}
        >>> output_names(Same(), (torch.zeros(1),), {}, {"x": torch.zeros(1)})
        ['x_out']
    """
    taken = names_of_inputs(model, args, kwargs)
    return [f"{name}_out" if name in taken else name for name in names_of_outputs(outputs)]


class _Entry(nn.Module):
    """Takes the tensors of a call one by one, so that the file's inputs are flat, and calls the model."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        leaves, self.spec = pytree.tree_flatten((args, kwargs))
        self.constants = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]

    def forward(self, *tensors: Tensor) -> Any:
        remaining = iter(tensors)
        leaves = [next(remaining) if constant is None else constant[0] for constant in self.constants]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return self.model(*args, **kwargs)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's own chatter from the user: warnings and log lines about its inner workings."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
