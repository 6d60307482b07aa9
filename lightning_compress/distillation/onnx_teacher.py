"""A teacher in an ONNX file, run by ONNX Runtime."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.errors import CompressionError


class OnnxNetwork(nn.Module):
    """A network whose forward is an ONNX file: tensors in, in the order of the file's inputs, and tensors out.

    It runs on the CPU; answers come back on the device of the inputs. It has no parameters and no modules to look into.

    Args:
        path: The file.

    Raises:
        CompressionError: If there is no such file, or ONNX Runtime cannot read it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        self.path = Path(path)
        self._session: Any = None
        self._open()

    def _open(self) -> Any:
        if self._session is None:
            import onnxruntime

            if not self.path.is_file():
                raise CompressionError(f"There is no teacher at {self.path}: the file does not exist.")
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            try:
                self._session = onnxruntime.InferenceSession(
                    str(self.path), options, providers=["CPUExecutionProvider"]
                )
            except Exception as error:  # ONNX Runtime's own errors have no common class
                raise CompressionError(f"ONNX Runtime cannot read the teacher {self.path}: {error}") from error
        return self._session

    def extra_repr(self) -> str:
        """Return a number of the file's content, by which one teacher is told from another."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()[:32]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_session": None}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the file on the tensors of a call.

        Args:
            *args: Positional inputs of the student's forward.
            **kwargs: Keyword inputs; one that is called like an input of the file is that input.

        Returns:
            The output where there is one, a dict by name where there are several.
        """
        session = self._open()
        inputs = session.get_inputs()
        feeds = _matched([item.name for item in inputs], args, kwargs, self.path)
        types = {item.name: _TYPES.get(item.type) for item in inputs}
        arrays = {name: _array(tensor, types[name]) for name, tensor in feeds.items()}
        device = next(iter(feeds.values())).device
        found = {
            item.name: torch.from_numpy(array).to(device)
            for item, array in zip(session.get_outputs(), session.run(None, arrays), strict=True)
        }
        return next(iter(found.values())) if len(found) == 1 else found


_TYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(double)": torch.float64,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(uint8)": torch.uint8,
    "tensor(bool)": torch.bool,
}


def _array(tensor: Tensor, dtype: torch.dtype | None) -> Any:
    tensor = tensor.detach().cpu()
    return (tensor if dtype is None else tensor.to(dtype)).contiguous().numpy()


def _matched(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Return the tensors of a call by the file's input that takes them."""
    named = {name: value for name, value in kwargs.items() if name in names and isinstance(value, Tensor)}
    others = [value for name, value in kwargs.items() if name not in named]
    tensors = [leaf for leaf in pytree.tree_leaves((list(args), others)) if isinstance(leaf, Tensor)]
    open_names = [name for name in names if name not in named]
    if len(open_names) != len(tensors):
        raise CompressionError(
            f"The teacher {path} has the inputs {', '.join(f'`{name}`' for name in names)}, and the student was called "
            f"with {len(tensors) + len(named)} tensors. Give `Teacher(path, transform=...)` a function that makes the "
            "teacher's inputs of the student's."
        )
    return {**named, **dict(zip(open_names, tensors, strict=True))}
