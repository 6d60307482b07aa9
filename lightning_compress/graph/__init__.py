"""The dataflow of a model, traced module by module and stitched together."""

from lightning_compress.graph.equivalents import attention, multihead_attention
from lightning_compress.graph.in_place import is_in_place, memory_of
from lightning_compress.graph.program import Operation, Program, trace_program
from lightning_compress.graph.shaped import in_float32, is_passed, is_shaped, shaped_key
from lightning_compress.graph.stand_ins import StandIn, forward_on, has_own_forward, take_off, uncover
from lightning_compress.graph.tracing import (
    CallKey,
    Trace,
    UntraceableError,
    call_arguments,
    call_key,
    entry_key,
    forward_signature,
    is_operator,
    overwritten_parameters,
    passed_parameters,
    trace_module,
)
from lightning_compress.graph.windows import is_window_attention, window_attention

__all__ = [
    "CallKey",
    "Operation",
    "Program",
    "StandIn",
    "Trace",
    "UntraceableError",
    "attention",
    "call_arguments",
    "call_key",
    "entry_key",
    "forward_on",
    "forward_signature",
    "has_own_forward",
    "in_float32",
    "is_in_place",
    "is_operator",
    "is_passed",
    "is_shaped",
    "is_window_attention",
    "memory_of",
    "multihead_attention",
    "overwritten_parameters",
    "passed_parameters",
    "shaped_key",
    "take_off",
    "trace_module",
    "trace_program",
    "uncover",
    "window_attention",
]
