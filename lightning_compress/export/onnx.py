"""ONNX export: a trained model as a checked file with integer weights, proved on real inputs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.compiled import as_written
from lightning_compress.errors import ExportError, ParityError
from lightning_compress.export.arguments import (
    CallArguments,
    Inputs,
    as_arguments,
    at_least_two_samples,
    know_records,
    names_of_inputs,
    plain_tensor,
    tensors_of,
)
from lightning_compress.export.audit import AuditReport, audit
from lightning_compress.export.lowering import grid_of, lower
from lightning_compress.export.model_file import move_model, write_model
from lightning_compress.export.packing import pack_weights_, storage_note
from lightning_compress.export.parity import ParityReport, compare_outputs, first_difference
from lightning_compress.export.parts import UnexportableError, exportable_part, obstacle, untranslated
from lightning_compress.export.program import output_names, to_onnx
from lightning_compress.export.session import import_onnxruntime, open_session, run_session
from lightning_compress.export.sharing import share_values_, sharing_note
from lightning_compress.export.translation import keep_in_float_, rename_, turn_weights_
from lightning_compress.quantization import quantization_of
from lightning_compress.quantization.state import check_finite_weights
from lightning_compress.unfinished import unfinished_folder

MIN_SNR_DB_INTEGER = 20.0
"""Under this signal-to-noise ratio an integer file does not compute the model: integer kernels round ties otherwise
than float ones, which moves single values by a step, but stays far above it."""

MIN_SNR_DB_FLOAT = 60.0
"""The same for a float file."""


@dataclass(frozen=True)
class ExportResult:
    """An exported file and the proofs made on it.

    Attributes:
        path: The file.
        input_names: Names of its inputs.
        output_names: Names of its outputs.
        has_dynamic_batch: Whether its first dimension takes any size.
        parity: How near it is to the model in PyTorch.
        audit: What ONNX Runtime runs in integers.
        output_spec: How the forward nests its outputs, as a spec of torch's pytree.
        packed: How many weights are stored with how many bits, for those with fewer than 8.
        shared: How many weights are stored as indices of how many bits into a table of values.
    """

    path: Path
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    has_dynamic_batch: bool
    parity: ParityReport
    audit: AuditReport
    output_spec: Any
    packed: Mapping[int, int] = field(default_factory=dict)
    shared: Mapping[int, int] = field(default_factory=dict)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a runtime makes of how the weights are stored, in sentences."""
        return tuple(note for note in (storage_note(self.packed), sharing_note(self.shared)) if note)

    def to_text(self) -> str:
        """Return the result as a few lines."""
        return "\n".join([str(self.path), f"parity on {self.parity.to_text()}", self.audit.to_text(), *self.notes])


def export_onnx(
    model: nn.Module,
    example_inputs: Inputs,
    path: str | os.PathLike[str],
    *,
    verify_inputs: Sequence[Inputs] = (),
    progress: Callable[[str], None] | None = None,
) -> ExportResult:
    """Write ``model`` to an ONNX file, check it, and prove that it computes what the model computes.

    A model that is quantizing (see `prepare`) becomes standard QuantizeLinear/DequantizeLinear with int8 weights,
    int32 biases and batch norms folded; any other becomes a float file. The model itself is not changed: a deep copy
    is exported, in eval mode and float32, on the CPU. The file is written in a temporary folder, checked and proved
    there, and only then moved to ``path``; one that fails is kept for inspection in the folder ``<name>.failed``, and
    what lay at ``path`` before stays.

    Args:
        model: Any module; a LightningModule is exported through its ``forward``.
        example_inputs: Inputs of the forward: a tensor, a tuple of positional or a dict of keyword arguments, or
            `CallArguments` for both. The first dimension of every tensor is the batch.
        path: Where to write; ``.onnx`` is the usual suffix.
        verify_inputs: Batches to compare on, each like ``example_inputs``; by default the example alone.
        progress: Told what is going on, a few words at a time.

    Returns:
        Names of the file's inputs and outputs, the parity and the audit.

    Raises:
        ExportError: If the model cannot be exported or the file is not valid.
        CompressionError: If a weight is NaN or infinite; what lies at ``path`` stays.
        ParityError: If the file does not compute what the model computes.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
        >>> result = export_onnx(net, torch.rand(2, 4), f"{folder}/model.onnx")
        >>> result.input_names, result.has_dynamic_batch, result.parity.samples
        (('input',), True, 2)
    """
    tell = progress or (lambda message: None)
    import_onnxruntime()
    check_finite_weights(model)
    batches = [as_arguments(inputs) for inputs in verify_inputs] or [as_arguments(example_inputs)]
    path = Path(path)
    with as_written(), unfinished_folder(path) as folder:
        tell("writing the ONNX file")
        written = write_onnx(model, example_inputs, folder / path.name)
        tell("verifying it in ONNX Runtime")
        failed = path.with_name(f"{path.stem}.failed")
        try:
            report = _verify(model, written, batches, failed / path.name)
        except ExportError:
            failed.mkdir(exist_ok=True)
            move_model(written.path, failed / path.name)
            raise
        move_model(written.path, path)
    tell("reading what runs in integers")
    return ExportResult(
        path,
        tuple(written.input_names),
        tuple(written.output_names),
        written.has_dynamic_batch,
        report,
        audit(path, _feeds(model, *batches[0])),
        written.output_spec,
        written.packed,
        written.shared,
    )


@dataclass(frozen=True)
class WrittenFile:
    """A written ONNX file.

    Attributes:
        path: The file.
        input_names: Names of its inputs, in the order of the call's tensors.
        output_names: Names of its outputs.
        has_dynamic_batch: Whether its first dimension takes any size.
        output_step: Distance of two neighbouring values of the outputs' grid, or None where they lie on none.
        output_spec: How the forward nests its outputs, as a spec of torch's pytree.
        packed: How many weights are stored with how many bits, for those with fewer than 8.
    """

    path: Path
    input_names: list[str]
    output_names: list[str]
    has_dynamic_batch: bool
    output_step: float | None
    output_spec: Any
    packed: Mapping[int, int]
    shared: Mapping[int, int]


def write_onnx(
    model: nn.Module, example_inputs: Inputs, path: str | os.PathLike[str], *, shares_values: bool = True
) -> WrittenFile:
    """Write ``model`` to a checked ONNX file without running it; `export_onnx` also proves it.

    Args:
        model: Any module.
        example_inputs: Inputs of the forward, as of `export_onnx`.
        path: Where to write.
        shares_values: Whether weights with few different values are stored as a table and indices.

    Returns:
        The file with the names of its inputs and outputs.

    Raises:
        ExportError: If the model cannot be exported or the file is not valid.
    """
    names: list[str] = []
    lowered = lower(model, names)
    args, kwargs = at_least_two_samples(*as_arguments(example_inputs))
    with torch.no_grad():
        outputs = lowered(*args, **kwargs)
    know_records(outputs)
    _check_outputs(outputs, type(model).__name__)
    steps = [grid.scale for grid in map(grid_of, pytree.tree_leaves(outputs)) if grid is not None]
    try:
        proto, is_dynamic = to_onnx(lowered, args, kwargs, outputs, names)
    except Exception as error:  # user code under the exporter, and the exporter itself, may raise anything
        part = exportable_part(lowered, CallArguments(args, kwargs), _try)
        path, operator = untranslated(error)
        reason = f"ONNX has no form of `{operator}`" if operator else _first_line(error)
        raise UnexportableError(type(model).__name__, path or obstacle(lowered, error), reason, part) from error
    rename_(proto, names)
    keep_in_float_(proto.graph)
    turn_weights_(proto.graph)
    packed = pack_weights_(proto)
    shared = share_values_(proto) if shares_values else {}
    write_model(proto, Path(path))
    return WrittenFile(
        Path(path),
        names_of_inputs(lowered, args, kwargs),
        output_names(lowered, args, kwargs, outputs),
        is_dynamic,
        min(steps) if steps else None,
        pytree.tree_structure(outputs),
        packed,
        shared,
    )


def _try(part: nn.Module, inputs: CallArguments) -> None:
    with torch.no_grad():
        outputs = part(*inputs.args, **inputs.kwargs)
    _check_outputs(outputs, type(part).__name__)
    to_onnx(part, inputs.args, dict(inputs.kwargs), outputs, [])


def _check_outputs(outputs: Any, owner: str) -> None:
    leaves = pytree.tree_leaves(outputs)
    strange = [leaf for leaf in leaves if not isinstance(leaf, Tensor | int | float | str | None)]
    if strange or not any(isinstance(leaf, Tensor) for leaf in leaves):
        found = f"a `{type(strange[0]).__name__}`" if strange else "no tensor"
        raise ExportError(
            f"The forward of `{owner}` returns {found}, which an ONNX file cannot hold. "
            "Return a tensor, or tuples, lists, dicts and dataclasses of tensors."
        )


def _verify(
    model: nn.Module, written: WrittenFile, batches: Sequence[tuple[tuple[Any, ...], dict[str, Any]]], kept: Path
) -> ParityReport:
    """Compare the file with the model; one that fails will be found at ``kept``."""
    path = written.path
    try:
        session = open_session(path)
    except Exception as error:  # ONNX Runtime's errors have no base of their own
        raise ExportError(
            f"ONNX Runtime cannot open the file: {_first_line(error)} It is kept for inspection as `{kept}`."
        ) from error
    quantization = quantization_of(model)
    is_integer = quantization is not None and quantization.is_quantizing
    expected, found = [], []
    recorded: list[tuple[str, Tensor]] = []
    with _evaluating(model):
        for index, (args, kwargs) in enumerate(batches):
            if index == 0 and quantization is not None:
                quantization.recorded = recorded
            expected.append(_run(model, args, kwargs))
            if quantization is not None:
                quantization.recorded = None
            found.append(run_session(session, _tensors_for(session, model, args, kwargs)))
    if any(bool(tensor.isnan().any()) for tensors in expected for tensor in tensors):
        raise ExportError(
            f"`{type(model).__name__}` returns NaN for the inputs that the file is proved on, so nothing can be "
            f"compared. Look for what makes it. The file is kept for inspection as `{kept}`."
        )
    report = compare_outputs(expected, found, written.output_step)
    least = MIN_SNR_DB_INTEGER if is_integer else MIN_SNR_DB_FLOAT
    if report.snr_db < least and is_integer:
        least = min(least, _own_snr_db(model, batches, expected))
    if report.snr_db < least:
        first = first_difference(path, _tensors_for(session, model, *batches[0]), recorded, least)
        raise ParityError(
            f"The file does not compute what the trained model computes: {report.to_text()}; at least {least:.0f} dB "
            f"were expected. "
            + (f"The first layer that differs is `{first}`. " if first else "No single layer stands out. ")
            + f"It is kept for inspection as `{kept}`."
        )
    return report


def _tensors_for(session: Any, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors of a call in the order of the file's inputs, in whatever order the call names them."""
    named = _feeds(model, args, kwargs)
    return [named[description.name] for description in session.get_inputs()]


def _feeds(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    return dict(zip(names_of_inputs(model, args, kwargs), tensors_of(args, kwargs), strict=True))


def _own_snr_db(
    model: nn.Module,
    batches: Sequence[tuple[tuple[Any, ...], dict[str, Any]]],
    expected: Sequence[Sequence[Tensor]],
) -> float:
    """Return how well the model agrees with itself when every hundredth input value moves by one of 255 steps.

    A network that was hardly trained blows up any difference; no file can be nearer to it than it is to itself.
    """
    generator = torch.Generator().manual_seed(0)

    def moved(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or tensor.numel() == 0:
            return tensor
        step = (tensor.max() - tensor.min()) / 255
        return tensor + step * (torch.rand(tensor.shape, generator=generator) < 0.01)

    with _evaluating(model):
        found = [_run(model, *pytree.tree_map_only(Tensor, moved, (args, kwargs))) for args, kwargs in batches]
    return compare_outputs(expected, found).snr_db


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    parameter = next(model.parameters(), torch.empty(0))

    def placed(tensor: Tensor) -> Tensor:
        dtype = parameter.dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.to(device=parameter.device, dtype=dtype)

    # Copies: the network may overwrite what it is given.
    args, kwargs = pytree.tree_map_only(Tensor, lambda tensor: placed(tensor).clone(), (args, kwargs))
    outputs = model(*args, **kwargs)
    return [plain_tensor(leaf) for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # What torch says in brackets about its symbols is the same expression again.
    return (lines[0] if lines else type(error).__name__).partition(" (unhinted")[0].rstrip(".") + "."
