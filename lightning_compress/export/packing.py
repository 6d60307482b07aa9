"""Packing: weights that fit into four or two bits are stored so, and unpacked when the file is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto

STORAGE = ((TensorProto.INT2, -2, 1, 2, 25), (TensorProto.INT4, -8, 7, 4, 21))
"""Type, least and greatest integer, bits, and the opset from which `Cast` reads the type; the smallest first."""


def pack_weights_(proto: onnx.ModelProto) -> dict[int, int]:
    """Store the int8 weights of ``proto`` that fit in the smallest integer type of ONNX, behind a `Cast` to int8.

    ONNX Runtime folds the `Cast` when it loads the file, and so finds the int8 weights that its integer kernels take:
    the file is smaller, and as fast as int8. A `DequantizeLinear` straight from int4 would leave the layer in float.

    Args:
        proto: A model whose weights are int8 initializers read by `DequantizeLinear`.

    Returns:
        How many weights are stored with how many bits, for those with fewer than 8.

    Example:
        >>> weight = onnx.numpy_helper.from_array(np.array([[7, -8, 0, 1]], dtype=np.int8), "weight")
        >>> scale = onnx.numpy_helper.from_array(np.array(0.5, dtype=np.float32), "scale")
        >>> node = onnx.helper.make_node("DequantizeLinear", ["weight", "scale"], ["result"])
        >>> result = onnx.helper.make_tensor_value_info("result", TensorProto.FLOAT, [1, 4])
        >>> graph = onnx.helper.make_graph([node], "graph", [], [result], [weight, scale])
        >>> model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)])
        >>> pack_weights_(model), [node.op_type for node in model.graph.node], len(model.graph.initializer[0].raw_data)
        ({4: 1}, ['Cast', 'DequantizeLinear'], 2)
    """
    graph = proto.graph
    weights = {node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    counts: Counter[int] = Counter()
    opset = 0
    for initializer in graph.initializer:
        if initializer.name not in weights or initializer.data_type != TensorProto.INT8 or len(initializer.dims) < 2:
            continue
        values = onnx.numpy_helper.to_array(initializer)
        smallest = next((row for row in STORAGE if row[1] <= values.min() and values.max() <= row[2]), None)
        if smallest is None:
            continue
        stored, _, _, bits, needed = smallest
        name = initializer.name
        initializer.CopyFrom(packed_integers(values, name, stored, bits))
        unpacked = f"{name}.int8"
        for node in graph.node:
            for position, read in enumerate(node.input):
                if read == name:
                    node.input[position] = unpacked
        graph.node.insert(
            0, onnx.helper.make_node("Cast", [name], [unpacked], name=f"{name}/Cast", to=TensorProto.INT8)
        )
        counts[bits] += 1
        opset = max(opset, needed)
    raise_opset_(proto, opset)
    return dict(counts)


def storage_note(counts: Mapping[int, int]) -> str:
    """Return what a runtime does with packed weights, as a sentence; empty where there are none.

    Example:
        >>> storage_note({4: 3})
        'Stored with 4 bits: 3 weights. ONNX Runtime unpacks them to int8 when it loads the file: the file is smaller, \
the speed that of int8.'
    """
    if not counts:
        return ""
    stored = ", ".join(f"with {bits} bits: {count} weight{'s' * (count > 1)}" for bits, count in sorted(counts.items()))
    return (
        f"Stored {stored}. ONNX Runtime unpacks them to int8 when it loads the file: the file is smaller, "
        "the speed that of int8."
    )


def packed_integers(values: np.ndarray, name: str, stored: int, bits: int) -> TensorProto:
    """Return ``values`` with several integers a byte, the first in the lowest bits, as ONNX lays them out."""
    per_byte = 8 // bits
    flat = values.flatten().astype(np.uint8) & (2**bits - 1)
    flat = np.pad(flat, (0, -len(flat) % per_byte)).reshape(-1, per_byte)
    joined = sum(flat[:, position] << np.uint8(bits * position) for position in range(per_byte))
    return TensorProto(name=name, data_type=stored, dims=values.shape, raw_data=np.asarray(joined, np.uint8).tobytes())


def raise_opset_(proto: onnx.ModelProto, opset: int) -> None:
    """Let ``proto`` use the operators of ``opset`` where those of its own are older."""
    # What the operators here do did not change between these opsets; they only take more types.
    for entry in proto.opset_import:
        if entry.domain == "" and entry.version < opset:
            entry.version = opset
            proto.ir_version = max(proto.ir_version, onnx.helper.find_min_ir_version_for([entry]))
