"""Multiply-accumulates of every operation of an ONNX file, from the shapes of a real run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from torch import Tensor

from lightning_compress.export.session import import_onnxruntime, run_session

Shape = tuple[int, ...]


def operations(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield every operation of ``graph``, those in the branches and loops of others included.

    Example:
        >>> graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "graph", [], [])
        >>> [node.op_type for node in operations(graph)]
        ['Relu']
    """
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for subgraph in [attribute.g, *attribute.graphs]:
                yield from operations(subgraph)


def count_macs(path: Path, feeds: Mapping[str, Tensor]) -> list[int]:
    """Run the file at ``path`` once and count the multiply-accumulates of each of its operations.

    ONNX Runtime's profiler tells the shapes that each kernel really met, its own fused operators included. A second
    file is left beside the first, so give it a temporary folder.

    Args:
        path: A file as ONNX Runtime optimized it; it is run as it stands.
        feeds: A tensor for each input of the file; others are passed over.

    Returns:
        For every operation, in the order of `operations`, the multiply-accumulates of the run: of convolutions,
        matrix products, attention and recurrent layers. Other operations have none. What runs several times in a loop
        is counted each time; a branch that was not taken has none.
    """
    # The weights stay where they are: they may be larger than a protobuf message can be.
    model = onnx.load(path, load_external_data=False)
    for position, node in enumerate(operations(model.graph)):
        node.name = str(position)
    named = path.with_name(f"named_{path.name}")
    onnx.save(model, named)
    executions = _executions(named, feeds)
    constants = dict(_constants(model.graph))
    return [
        sum(_macs(node, execution, constants) for execution in executions.get(node.name, []))
        for node in operations(model.graph)
    ]


@dataclass(frozen=True)
class _Execution:
    """Shapes that one call of a kernel met; inputs that were packed away beforehand are missing at the end."""

    inputs: Sequence[Shape]
    outputs: Sequence[Shape]


def _executions(path: Path, feeds: Mapping[str, Tensor]) -> dict[str, list[_Execution]]:
    runtime = import_onnxruntime()
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_profiling = True
    options.profile_file_prefix = str(path.with_suffix(""))
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    run_session(session, [feeds[description.name] for description in session.get_inputs()])
    found: dict[str, list[_Execution]] = {}
    for event in json.loads(Path(session.end_profiling()).read_text()):
        name, ending, _ = event["name"].rpartition("_kernel_time")
        if ending:
            inputs, outputs = (_shapes(event["args"][f"{side}_type_shape"]) for side in ("input", "output"))
            found.setdefault(name, []).append(_Execution(inputs, outputs))
    return found


def _shapes(entries: Sequence[Mapping[str, Sequence[int]]]) -> list[Shape]:
    return [tuple(shape) for entry in entries for shape in entry.values()]


def _constants(graph: onnx.GraphProto) -> Iterator[tuple[str, Shape]]:
    for tensor in graph.initializer:
        yield tensor.name, tuple(tensor.dims)
    for node in graph.node:
        for attribute in node.attribute:
            for subgraph in [attribute.g, *attribute.graphs]:
                yield from _constants(subgraph)


def _macs(node: onnx.NodeProto, execution: _Execution, constants: Mapping[str, Shape]) -> int:
    formula = _FORMULAS.get(node.op_type)
    if formula is None:
        return 0

    def shape(position: int) -> Shape:
        # Constants may be packed into the kernel, and are then no input of a call; what a call computes always is.
        constant = constants.get(node.input[position])
        return execution.inputs[position] if constant is None else constant

    return formula(node, shape, execution.outputs)


_Formula = Callable[[onnx.NodeProto, Callable[[int], Shape], Sequence[Shape]], int]


def _convolution(weight: int) -> _Formula:
    """Each output value takes one product for each weight of its channel, whichever dimension the channels are in."""

    def formula(node: onnx.NodeProto, shape: Callable[[int], Shape], outputs: Sequence[Shape]) -> int:
        return math.prod(outputs[0]) * math.prod(shape(weight)[1:])

    return formula


def _transposed_convolution(weight: int) -> _Formula:
    """Each input value is multiplied by every weight of its channel."""

    def formula(node: onnx.NodeProto, shape: Callable[[int], Shape], outputs: Sequence[Shape]) -> int:
        return math.prod(shape(0)) * math.prod(shape(weight)[1:])

    return formula


def _matrix_product(node: onnx.NodeProto, shape: Callable[[int], Shape], outputs: Sequence[Shape]) -> int:
    """Each output value is a sum over the dimension that both operands share."""
    settings = {attribute.name: attribute.i for attribute in node.attribute}
    first = shape(0)
    shared = first[-1]
    if settings.get("transA") and len(first) > 1:
        # `transBatchA` says that the rows stand in front of the batch dimensions.
        shared = first[0] if settings.get("transBatchA") else first[-2]
    return math.prod(outputs[0]) * shared


def _recurrence(node: onnx.NodeProto, shape: Callable[[int], Shape], outputs: Sequence[Shape]) -> int:
    """Each step of each sequence takes one product for each weight, those of the input and those of the state."""
    batch_is_first = any(attribute.name == "layout" and attribute.i for attribute in node.attribute)
    steps, batch = shape(0)[:2] if not batch_is_first else shape(0)[1::-1]
    return steps * batch * (math.prod(shape(1)) + math.prod(shape(2)))


def _attention(node: onnx.NodeProto, shape: Callable[[int], Shape], outputs: Sequence[Shape]) -> int:
    """Scores of every pair of positions and their weighted sums; ONNX Runtime's own operator projects before."""
    if node.op_type == "MultiHeadAttention" or node.domain in ("", "ai.onnx"):
        keys = shape(1)[-2]
        return (math.prod(shape(0)) + math.prod(outputs[0])) * keys
    batch, length, _ = shape(0)
    return batch * length * (math.prod(shape(1)) + 2 * length * outputs[0][-1])


def _einsum(node: onnx.NodeProto, shape: Callable[[int], Shape], outputs: Sequence[Shape]) -> int:
    """One product for each combination of its indices; of a single operand there is nothing to multiply."""
    equation = next(attribute.s.decode() for attribute in node.attribute if attribute.name == "equation")
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    sizes: dict[str | int, int] = {}
    for position, term in enumerate(terms):
        before, _, after = term.partition("...")
        dimensions = shape(position)
        sizes |= zip(before, dimensions, strict=False)
        sizes |= zip(reversed(after), reversed(dimensions), strict=False)
        broadcast = dimensions[len(before) : len(dimensions) - len(after)]
        for place, size in enumerate(reversed(broadcast)):
            sizes[place] = max(size, sizes.get(place, 1))
    return math.prod(sizes.values()) if len(terms) > 1 else 0


_FORMULAS: dict[str, _Formula] = {
    **dict.fromkeys(("Conv", "FusedConv", "NhwcFusedConv", "ConvInteger"), _convolution(1)),
    "QLinearConv": _convolution(3),
    "DeformConv": _convolution(1),
    "ConvTranspose": _transposed_convolution(1),
    "QLinearConvTranspose": _transposed_convolution(3),
    **dict.fromkeys(("Gemm", "FusedGemm", "MatMul", "FusedMatMul", "TransposeMatMul", "MatMulNBits"), _matrix_product),
    **dict.fromkeys(("QGemm", "QLinearMatMul", "MatMulInteger"), _matrix_product),
    **dict.fromkeys(("MatMulIntegerToFloat", "DynamicQuantizeMatMul"), _matrix_product),
    "Einsum": _einsum,
    **dict.fromkeys(("LSTM", "GRU", "RNN"), _recurrence),
    **dict.fromkeys(("Attention", "QAttention", "MultiHeadAttention"), _attention),
}
"""How many multiply-accumulates an operation takes; what is not here takes none."""
