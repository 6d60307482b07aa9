"""ONNX Runtime: importing it, opening a file, running it on torch tensors."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lightning_compress.errors import MissingExtraError


def import_onnxruntime() -> ModuleType:
    """Import ONNX Runtime.

    Raises:
        MissingExtraError: If it is not installed; the message holds the line that installs it.
    """
    try:
        return import_module("onnxruntime")
    except ImportError as error:
        raise MissingExtraError(
            "ONNX Runtime is needed to verify the exported file and is not installed. "
            "Install it with `pip install onnxruntime`."
        ) from error


def open_session(path: Path, *, optimized_path: Path | None = None, threads: int | None = None) -> Any:
    """Open an ONNX file on the CPU.

    Args:
        path: The file.
        optimized_path: Where ONNX Runtime writes the graph that it really runs, or None; weights go to a second file
            beside it, and float convolutions are left in their usual layout, so that shapes can be read.
        threads: Number of threads of one operation; by default what ONNX Runtime chooses.

    Returns:
        An ``onnxruntime.InferenceSession``.
    """
    runtime = import_onnxruntime()
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors only: it warns that an optimized graph fits this machine, which is meant
    disabled = []
    if optimized_path is not None:
        options.optimized_model_filepath = str(optimized_path)
        # One protobuf message holds at most 2 GiB.
        weights = "session.optimized_model_external_initializers_file_name"
        options.add_session_config_entry(weights, f"{optimized_path.name}.data")
        # It pads the channels of float convolutions, whose sizes could then no longer be told.
        disabled = ["NchwcTransformer"]
    if threads is not None:
        options.intra_op_num_threads = threads
    return runtime.InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
    )


def run_session(session: Any, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Run a session on ``tensors``, one for each of its inputs in order; return its outputs in order.

    An input that the exporter found unused is no input of the file; pass only those that are.
    """
    feeds = {
        description.name: tensor.detach().cpu().contiguous().numpy()
        for description, tensor in zip(session.get_inputs(), tensors, strict=True)
    }
    return [torch.from_numpy(output) for output in session.run(None, feeds)]
