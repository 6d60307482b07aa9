"""The whole way of a model: prepared, trained a little with rounding, exported, and read back in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.export import ExportResult, export_onnx
from lightning_compress.export.arguments import CallArguments, Inputs
from lightning_compress.quantization import Quantization, prepare

Batch = Callable[[int, int], Inputs]
"""Makes inputs of a model: how many samples, and a seed."""


@dataclass(frozen=True)
class Example:
    """A small model as a user has it, and what should become of it.

    Attributes:
        build: Makes the model.
        batch: Makes its inputs.
        layers: How many convolutions, gemms and matmuls run in integers, and how many there are.
        others: How many other operations run in integers, at least, where the example is about them.
        least_snr_db: How near the rounded model is to the float one.
        has_dynamic_batch: Whether the file takes batches of any size.
    """

    build: Callable[[], nn.Module]
    batch: Batch
    layers: dict[str, tuple[int, int]]
    others: dict[str, int] = field(default_factory=dict)
    least_snr_db: float = 20.0
    has_dynamic_batch: bool = True


@dataclass(frozen=True)
class Journey:
    """What was met on the way.

    Attributes:
        model: The trained model, in eval mode.
        quantization: Its quantization.
        losses: The loss of every training step.
        observing_difference: Largest difference of outputs between the float model and the prepared one before
            rounding.
        silent: Parameters that had a gradient in float, and have none with rounding.
        snr_db: How near the rounded outputs are to the outputs of the same weights in float, in decibels.
        result: The exported file and its proofs.
    """

    model: nn.Module
    quantization: Quantization
    losses: list[float]
    observing_difference: float
    silent: set[str]
    snr_db: float
    result: ExportResult

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """Integer and all convolutions, gemms and matmuls of the file, as ONNX Runtime runs it."""
        return {kind: count for kind, count in self.counts.items() if kind in ("conv", "gemm", "matmul")}

    @property
    def counts(self) -> dict[str, tuple[int, int]]:
        """Integer and all operations of the file by kind, as ONNX Runtime runs it."""
        return self.result.audit.counts()

    @property
    def floats(self) -> dict[str, str]:
        """Names and reasons of the operations that the placement leaves in float."""
        return {row.name: row.reason for row in self.quantization.rows if not row.is_integer}


def travel(example: Example, folder: Path, **settings: Any) -> Journey:
    """Take ``example`` the whole way: three steps observed, three rounded, then the file."""
    torch.manual_seed(0)
    model = example.build()
    torch.manual_seed(0)
    in_float = example.build()
    quantization = prepare(model, **settings)
    quantization.is_observing = True
    difference = _observing_difference(model, in_float, example.batch)
    learning = _learning(in_float, example.batch(32, 0), 1e-4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = [_step(model, optimizer, quantization, example.batch(32, seed)) for seed in range(3)]
    quantization.is_quantizing = True
    losses += [_step(model, optimizer, quantization, example.batch(32, seed)) for seed in range(3, 6)]
    silent = learning - _learning(model, example.batch(32, 0), 0.0)
    quantization.is_observing = False
    model.eval()
    snr_db = _rounding_snr_db(model, quantization, example.batch(8, 7))
    batches = [example.batch(8, 8), example.batch(8 if not example.has_dynamic_batch else 3, 9)]
    result = export_onnx(model, example.batch(8, 10), folder / "model.onnx", verify_inputs=batches)
    return Journey(model, quantization, losses, difference, silent, snr_db, result)


def check(example: Example, folder: Path, **settings: Any) -> Journey:
    """Take ``example`` the whole way, and check what holds for every model."""
    journey = travel(example, folder, **settings)
    assert journey.observing_difference < 1e-5
    assert torch.tensor(journey.losses).isfinite().all()
    assert journey.silent == set()
    assert journey.snr_db > example.least_snr_db
    assert journey.result.has_dynamic_batch == example.has_dynamic_batch
    assert journey.layers == example.layers
    short = {kind: journey.counts.get(kind) for kind in example.others}
    assert [kind for kind, count in short.items() if count is None or count[0] < example.others[kind]] == []
    return journey


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Call ``model`` as `export_onnx` does."""
    if isinstance(inputs, CallArguments):
        return model(*inputs.args, **inputs.kwargs)
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(inputs) if isinstance(inputs, Tensor) else model(*inputs)


def tensors(outputs: Any) -> list[Tensor]:
    """Return the floating-point tensors in ``outputs``."""
    if is_dataclass(outputs) and not isinstance(outputs, dict):
        outputs = [getattr(outputs, field.name) for field in fields(outputs)]
    leaves = pytree.tree_leaves(outputs)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def loss_of(model: nn.Module, inputs: Inputs) -> Tensor:
    """Return a loss that every output of ``model`` takes part in."""
    generator = torch.Generator().manual_seed(0)
    outputs = tensors(call(model, inputs))
    losses = [(output - torch.randn(output.shape, generator=generator)).square().mean() for output in outputs]
    return torch.stack(losses).sum()


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, quantization: Quantization, inputs: Inputs) -> float:
    model.train()
    optimizer.zero_grad()
    loss = loss_of(model, inputs)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    quantization.ranges.update()
    return loss.item()


def _learning(model: nn.Module, inputs: Inputs, share: float) -> set[str]:
    """Return the names of the parameters whose gradient is above a share of the largest one."""
    model.train()
    model.zero_grad()
    loss_of(model, inputs).backward()  # type: ignore[no-untyped-call]
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    return {name for name, gradient in gradients.items() if gradient.abs().max() > share * largest}


def _observing_difference(model: nn.Module, in_float: nn.Module, batch: Batch) -> float:
    model.eval()
    in_float.eval()
    with torch.no_grad():
        ours, theirs = tensors(call(model, batch(4, 1))), tensors(call(in_float, batch(4, 1)))
    return max(float((one - other).abs().max()) for one, other in zip(ours, theirs, strict=True))


def _rounding_snr_db(model: nn.Module, quantization: Quantization, inputs: Inputs) -> float:
    with torch.no_grad():
        rounded = torch.cat([value.flatten() for value in tensors(call(model, inputs))])
        quantization.is_quantizing = False
        plain = torch.cat([value.flatten() for value in tensors(call(model, inputs))])
        quantization.is_quantizing = True
    noise = (rounded - plain).double().square().sum()
    return float(10.0 * torch.log10(plain.double().square().sum() / noise)) if noise > 0 else float("inf")
