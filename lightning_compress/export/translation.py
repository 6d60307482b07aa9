"""From PyTorch's program to ONNX: quantizers as standard operators, names from the model's modules."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import onnx
import torch
from onnxscript import opset20 as op


def translations(program: torch.export.ExportedProgram) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return how the operators of ``program`` that PyTorch's exporter does not know become standard ONNX.

    Args:
        program: The lowered model.

    Returns:
        A function of ONNX operators for each operator of PyTorch.
    """
    quantized = torch.ops.quantized_decomposed
    table: dict[Callable[..., Any], Callable[..., Any]] = {
        quantized.quantize_per_tensor.default: _quantize_per_tensor,
        quantized.dequantize_per_tensor.default: _dequantize_per_tensor,
        quantized.dequantize_per_channel.default: _dequantize_per_channel,
    }
    pools = [node for node in program.graph.nodes if node.target is torch.ops.aten.adaptive_avg_pool2d.default]
    if pools and all(list(node.args[1]) == [1, 1] for node in pools):
        # Decomposed it would be a ReduceMean, for which runtimes have no integer kernel.
        table[torch.ops.aten.adaptive_avg_pool2d.default] = _global_average_pool
    return table


def _quantize_per_tensor(input: Any, scale: float, zero_point: int, quant_min: int, quant_max: int, dtype: int) -> Any:
    integers = op.QuantizeLinear(input, _float_constant(scale), _uint8_constant(zero_point))
    if (quant_min, quant_max) != (0, 255):
        integers = op.Clip(integers, _uint8_constant(quant_min), _uint8_constant(quant_max))
    return integers


def _dequantize_per_tensor(
    input: Any, scale: float, zero_point: int, quant_min: int, quant_max: int, dtype: int, out_dtype: int = -1
) -> Any:
    return op.DequantizeLinear(input, _float_constant(scale), _uint8_constant(zero_point))


def _dequantize_per_channel(
    input: Any,
    scales: Any,
    zero_points: Any,
    axis: int,
    quant_min: int,
    quant_max: int,
    dtype: int,
    out_dtype: int = -1,
) -> Any:
    if quant_max > 127:
        return op.DequantizeLinear(input, scales, axis=axis)
    # The zero points are all zero and could be left out, but then ONNX Runtime finds no integer Gemm.
    return op.DequantizeLinear(input, scales, op.Cast(zero_points, to=onnx.TensorProto.INT8), axis=axis)


def _global_average_pool(self: Any, output_size: Sequence[int]) -> Any:
    return op.GlobalAveragePool(self)


def _float_constant(value: float) -> Any:
    return op.Constant(value=onnx.helper.make_tensor("scale", onnx.TensorProto.FLOAT, [], [value]))


def _uint8_constant(value: int) -> Any:
    return op.Constant(value=onnx.helper.make_tensor("integer", onnx.TensorProto.UINT8, [], [value]))


def rename_(proto: onnx.ModelProto, names: Sequence[str]) -> None:
    """Name operations after the modules they come from, and rounded values after their places.

    What the exporter notes about its own work is left out: in a small file it is a tenth of the bytes.
    """
    del proto.graph.value_info[:]
    del proto.graph.metadata_props[:]
    del proto.metadata_props[:]
    taken: Counter[str] = Counter()
    for node in proto.graph.node:
        scopes = [item.value for item in node.metadata_props if item.key == "pkg.torch.onnx.name_scopes"]
        path = json.loads(scopes[0].replace("'", '"'))[-2] if scopes and scopes[0].count("'") > 2 else ""
        path = path.removeprefix("model").removeprefix(".")
        label = f"{path}/{node.op_type}" if path else node.op_type
        taken[label] += 1
        node.name = label if taken[label] == 1 else f"{label}_{taken[label]}"
        del node.metadata_props[:]
    renamed = {tensor.name: tensor.name.removeprefix("model.") for tensor in proto.graph.initializer}
    # Integers take the name of the weight they stand for, unless that is in the file too, as in a tied embedding.
    kept = set(renamed.values())
    for name, short in renamed.items():
        plain = short.replace("integer_", "")
        renamed[name] = short if plain in kept else plain
    quantizes = [node for node in proto.graph.node if node.op_type == "QuantizeLinear"]
    if len(quantizes) == len(names):
        renamed |= _place_names(proto, quantizes, names)
    for node in proto.graph.node:
        for values in (node.input, node.output):
            for position, name in enumerate(values):
                values[position] = renamed.get(name, name)
    for tensor in proto.graph.initializer:
        tensor.name = renamed[tensor.name]


def _place_names(proto: onnx.ModelProto, quantizes: Sequence[onnx.NodeProto], names: Sequence[str]) -> dict[str, str]:
    outputs = {value.name for value in proto.graph.output}
    renamed: dict[str, str] = {}
    used: Counter[str] = Counter()
    readers = {name: node for node in proto.graph.node for name in node.input if node.op_type == "DequantizeLinear"}
    for node, name in zip(quantizes, names, strict=True):
        used[name] += 1
        unique = name if used[name] == 1 else f"{name}#{used[name]}"
        renamed[node.output[0]] = f"{unique}.quantized"
        reader = readers.get(node.output[0])
        if reader is not None and reader.output[0] not in outputs:
            renamed[reader.output[0]] = f"{unique}.dequantized"
    return renamed


def keep_in_float_(graph: onnx.GraphProto) -> None:
    """Part what must stay in float, and reads a rounded value, from the quantizer behind it, by one more operation.

    Between the two, ONNX Runtime would round a float layer's weights to integers of its own, a single scale for all of
    them, which no training ever saw; and its integer average pooling divides the windows that ``ceil_mode`` adds at
    the border by the wrong count. The operation itself has no effect.
    """
    producers = {name: node for node in graph.node for name in node.output}
    rounded = {name for name, node in producers.items() if node.op_type == "DequantizeLinear"}
    for position, node in reversed(list(enumerate(graph.node))):
        is_layer = node.op_type in ("Conv", "ConvTranspose", "Gemm") and node.input[1] not in rounded
        is_ceil = node.op_type == "AveragePool" and any(item.name == "ceil_mode" and item.i for item in node.attribute)
        if (is_layer or is_ceil) and node.input[0] in rounded:
            result = node.output[0]
            node.output[0] = f"{node.name}.result"
            lowest = f"{result}.lowest"
            value = torch.tensor(torch.finfo(torch.float32).min).numpy()
            graph.initializer.append(onnx.numpy_helper.from_array(value, lowest))
            kept = onnx.helper.make_node("Max", [node.output[0], lowest], [result], name=f"{node.name}/float")
            graph.node.insert(position + 1, kept)


def turn_weights_(graph: onnx.GraphProto) -> None:
    """Store the weight of a linear layer the way round in which it is multiplied, and drop the `Transpose` behind it.

    ONNX Runtime does so itself where one layer reads the weight; where two calls share it, it would leave both in
    float.
    """
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    replaced: dict[str, str] = {}
    for name, tensor in initializers.items():
        dequantizes = readers.get(name, [])
        transposes = [node for reader in dequantizes for node in readers.get(reader.output[0], [])]
        if len(tensor.dims) != 2 or not transposes or not all(map(_is_weight_reader, dequantizes)):
            continue
        if all(node.op_type == "Transpose" for node in transposes):
            turned = onnx.numpy_helper.to_array(tensor).T.copy()
            tensor.CopyFrom(onnx.numpy_helper.from_array(turned, name))
            for node in dequantizes:
                next(item for item in node.attribute if item.name == "axis").i ^= 1
            replaced |= {node.output[0]: node.input[0] for node in transposes}
    for node in graph.node:
        for position, name in enumerate(node.input):
            node.input[position] = replaced.get(name, name)
    for node in [node for node in graph.node if node.op_type == "Transpose" and node.output[0] in replaced]:
        graph.node.remove(node)


def _is_weight_reader(node: onnx.NodeProto) -> bool:
    return node.op_type == "DequantizeLinear" and any(item.name == "axis" for item in node.attribute)
