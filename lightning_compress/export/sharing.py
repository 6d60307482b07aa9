"""Shared values: weights with few different values are stored as a table and small indices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

from lightning_compress.export.packing import packed_integers, raise_opset_

SMALLEST = 512
"""Entries from which on a weight is worth a table."""

STORAGE = ((16, TensorProto.UINT4, 4, 21), (256, TensorProto.UINT8, 8, 1))
"""Most values, type and bits of an index, and the opset from which `Cast` reads the type; the smallest first."""


def share_values_(proto: onnx.ModelProto) -> dict[int, int]:
    """Store weights with at most 256 different values as a table of them and indices of 4 or 8 bits.

    Indices go through `Cast` to int32 into `Gather`. ONNX Runtime folds both when it loads the file, and then has the
    very weights: the file is smaller, the speed and the memory are those without. OpenVINO folds them too.

    Args:
        proto: A model whose weights are float or int8 initializers.

    Returns:
        How many weights are stored with indices of how many bits.

    Example:
        >>> weight = onnx.numpy_helper.from_array(np.tile(np.float32([0.5, -1.5]), (32, 16)), "weight")
        >>> ends = [onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 32]) for name in ("x", "y")]
        >>> node = onnx.helper.make_node("MatMul", ["x", "weight"], ["y"])
        >>> graph = onnx.helper.make_graph([node], "graph", ends[:1], ends[1:], [weight])
        >>> model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)])
        >>> share_values_(model), [node.op_type for node in model.graph.node]
        ({4: 1}, ['Cast', 'Gather', 'MatMul'])
    """
    graph = proto.graph
    counts: Counter[int] = Counter()
    opset = 0
    for initializer in list(graph.initializer):
        if initializer.data_type not in (TensorProto.FLOAT, TensorProto.INT8) or len(initializer.dims) < 2:
            continue
        values = onnx.numpy_helper.to_array(initializer)
        found = _few(values)
        if found is None:
            continue
        table, indices = found
        _, stored, bits, needed = next(row for row in STORAGE if len(table) <= row[0])
        saved = values.nbytes - values.size * bits // 8 - table.nbytes
        if saved <= 0:
            continue
        name = initializer.name
        kept = f"{name}.indices"
        if bits < 8:
            initializer.CopyFrom(packed_integers(indices.astype(np.uint8), kept, stored, bits))
        else:
            initializer.CopyFrom(onnx.numpy_helper.from_array(indices.astype(np.uint8), kept))
        graph.initializer.append(onnx.numpy_helper.from_array(table, f"{name}.values"))
        for node in reversed(
            (
                onnx.helper.make_node("Cast", [kept], [f"{kept}.int32"], name=f"{name}/Cast", to=TensorProto.INT32),
                onnx.helper.make_node("Gather", [f"{name}.values", f"{kept}.int32"], [name], name=f"{name}/Gather"),
            )
        ):
            graph.node.insert(0, node)
        counts[bits] += 1
        opset = max(opset, needed)
    raise_opset_(proto, opset)
    return dict(counts)


def _few(values: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]] | None:
    """Return the different values and which each one is, where there are at most 256."""
    flat = values.reshape(-1)
    if flat.size < SMALLEST or len(np.unique(flat[:SMALLEST])) > 256:
        return None
    table, indices = np.unique(flat, return_inverse=True)
    return (table, indices.reshape(values.shape)) if len(table) <= 256 else None


def sharing_note(counts: Mapping[int, int]) -> str:
    """Return what a runtime does with shared values, as a sentence; empty where there are none.

    Example:
        >>> sharing_note({4: 3})
        'Stored as indices of 4 bits into a table of values: 3 weights. ONNX Runtime looks them up when it loads the \
file: the file is smaller, the speed that of the weights themselves.'
    """
    if not counts:
        return ""
    stored = ", ".join(
        f"of {bits} bits into a table of values: {count} weight{'s' * (count > 1)}"
        for bits, count in sorted(counts.items())
    )
    return (
        f"Stored as indices {stored}. ONNX Runtime looks them up when it loads the file: the file is smaller, the "
        "speed that of the weights themselves."
    )
