"""Audit: what ONNX Runtime really runs in integers, read from its own optimized graph."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from torch import Tensor

from lightning_compress.export.macs import count_macs, operations
from lightning_compress.export.session import open_session

_INTEGER_OPERATIONS = {
    "QLinearConv": "conv",
    "ConvInteger": "conv",
    "QLinearConvTranspose": "conv",
    "QGemm": "gemm",
    "QLinearMatMul": "matmul",
    "MatMulInteger": "matmul",
    "MatMulIntegerToFloat": "matmul",
    "DynamicQuantizeMatMul": "matmul",
    "QAttention": "attention",
    "QLinearAdd": "add",
    "QLinearMul": "mul",
    "QLinearConcat": "concat",
    "QLinearGlobalAveragePool": "pool",
    "QLinearAveragePool": "pool",
}
_FLOAT_OPERATIONS = {
    "Conv": "conv",
    "FusedConv": "conv",
    "NhwcFusedConv": "conv",
    "ConvTranspose": "conv",
    "DeformConv": "conv",
    "Gemm": "gemm",
    "FusedGemm": "gemm",
    "MatMul": "matmul",
    "FusedMatMul": "matmul",
    "TransposeMatMul": "matmul",
    "MatMulNBits": "matmul",
    "Einsum": "matmul",
    "Attention": "attention",
    "MultiHeadAttention": "attention",
    "LSTM": "recurrent",
    "GRU": "recurrent",
    "RNN": "recurrent",
    "Add": "add",
    "Mul": "mul",
    "GlobalAveragePool": "pool",
    "AveragePool": "pool",
}
_MOVES = {"Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "MaxPool", "NhwcMaxPool", "Slice", "Identity"}


@dataclass(frozen=True)
class AuditRow:
    """One operation of the optimized graph.

    Attributes:
        name: Name of the operation.
        kind: ``conv``, ``gemm``, ``matmul``, ``attention``, ``recurrent``, ``add``, ``mul``, ``concat`` or ``pool``.
        is_integer: Whether ONNX Runtime runs it in integers.
        reason: Why it runs in float; empty for an integer operation.
        macs: Multiply-accumulates of one run on the inputs that the audit was given; 0 where it was given none, and
            for operations that only add, move or pool.
    """

    name: str
    kind: str
    is_integer: bool
    reason: str = ""
    macs: int = 0


@dataclass(frozen=True)
class AuditReport:
    """What ONNX Runtime runs in integers and what it does not.

    Attributes:
        rows: Every convolution, gemm, matmul, attention, recurrent layer, add, mul, concat and average pool of the
            optimized graph.
    """

    rows: tuple[AuditRow, ...]

    def counts(self) -> dict[str, tuple[int, int]]:
        """Return, for each kind of operation, how many run in integers and how many there are.

        Example:
            >>> AuditReport((AuditRow("a", "conv", True), AuditRow("b", "conv", False, "..."))).counts()
            {'conv': (1, 2)}
        """
        total = Counter(row.kind for row in self.rows)
        integer = Counter(row.kind for row in self.rows if row.is_integer)
        return {kind: (integer[kind], total[kind]) for kind in total}

    def floats(self) -> list[AuditRow]:
        """Return the operations that run in float."""
        return [row for row in self.rows if not row.is_integer]

    @property
    def integer_mac_share(self) -> float | None:
        """Share of the multiply-accumulates that run in integer operations, or None where none were counted.

        Example:
            >>> rows = (AuditRow("a", "conv", True, "", 300), AuditRow("b", "gemm", False, "...", 100))
            >>> AuditReport(rows).integer_mac_share
            0.75
        """
        total = sum(row.macs for row in self.rows)
        return sum(row.macs for row in self.rows if row.is_integer) / total if total else None

    def to_text(self) -> str:
        """Return the counts and every operation in float with its reason, a line each."""
        counted = ", ".join(f"{integer} of {total} {kind}" for kind, (integer, total) in self.counts().items())
        share = self.integer_mac_share
        counted += "" if share is None else f"; {100 * share:.1f} % of the multiply-accumulates"
        lines = [f"in integers on ONNX Runtime: {counted or 'nothing'}"]
        lines += [f"in float: {row.kind} `{row.name}`: {row.reason}" for row in self.floats()]
        return "\n".join(lines)


def audit(path: Path, feeds: Mapping[str, Tensor] | None = None) -> AuditReport:
    """Let ONNX Runtime optimize the file at ``path`` and read which operations became integer ones.

    Args:
        path: An ONNX file.
        feeds: A tensor for each input of the file: it is run once to count multiply-accumulates. Others are passed
            over.

    Returns:
        The report. It holds for the ONNX Runtime and the kind of CPU it was made on.
    """
    with tempfile.TemporaryDirectory() as folder:
        optimized_path = Path(folder) / "optimized.onnx"
        open_session(path, optimized_path=optimized_path)
        graph = onnx.load(optimized_path, load_external_data=False).graph
        macs = [0] * sum(1 for _ in operations(graph)) if feeds is None else count_macs(optimized_path, feeds)
    nodes = list(operations(graph))
    producers = {output: node for node in nodes for output in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    constants = {initializer.name for initializer in graph.initializer}
    integer_types = _integer_values(graph)
    rows = []
    for node, count in zip(nodes, macs, strict=True):
        if node.op_type in _INTEGER_OPERATIONS:
            rows.append(AuditRow(_name(node), _INTEGER_OPERATIONS[node.op_type], True, macs=count))
        elif node.op_type in _FLOAT_OPERATIONS and not set(node.output) & integer_types:
            reason = _reason(node, producers, readers, constants)
            rows.append(AuditRow(_name(node), _FLOAT_OPERATIONS[node.op_type], False, reason, count))
    return AuditReport(tuple(rows))


def _integer_values(graph: onnx.GraphProto) -> set[str]:
    """Return the names of values that are shapes and sizes: arithmetic on them is none of the model's."""
    return {
        value.name
        for value in graph.value_info
        if value.type.tensor_type.elem_type in (onnx.TensorProto.INT64, onnx.TensorProto.INT32)
    }


def _reason(
    node: onnx.NodeProto,
    producers: Mapping[str, onnx.NodeProto],
    readers: Mapping[str, Sequence[onnx.NodeProto]],
    constants: set[str],
) -> str:
    for position, name in enumerate(node.input):
        if name == "" or name in constants:
            if position == 1 and name in constants:
                return "its weight is in float"
            continue
        producer = producers.get(name)
        while producer is not None and producer.op_type in _MOVES:
            producer = producers.get(producer.input[0])
        if producer is None:
            return "it reads an input of the model in float"
        if producer.op_type != "DequantizeLinear":
            return f"it reads the result of {producer.op_type} `{_name(producer)}` in float"
    following = [reader for name in node.output for reader in readers.get(name, [])]
    unquantized = [reader for reader in following if reader.op_type != "QuantizeLinear"]
    if not following:
        return "its result is a float output of the model"
    if unquantized:
        return f"its result is read in float by {unquantized[0].op_type} `{_name(unquantized[0])}`"
    return "ONNX Runtime has no integer kernel for it on this machine"


def _name(node: onnx.NodeProto) -> str:
    return str(node.name or (node.output[0] if node.output else node.op_type))
