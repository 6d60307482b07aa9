"""The placement report: what becomes of every operation of a model, for people to read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import nn

from lightning_compress.graph import trace_program
from lightning_compress.quantization.affine import AffineGrid
from lightning_compress.quantization.placement import PlacementRow, place
from lightning_compress.quantization.ranges import ActivationRanges
from lightning_compress.quantization.roles import QUANTIZABLE_LAYERS
from lightning_compress.quantization.scheme import Scheme
from lightning_compress.quantization.state import quantization_of


@dataclass(frozen=True)
class PlacementReport:
    """What becomes of every operation of a model.

    Attributes:
        rows: A row for each operation, in the order in which they run.
        untraceable: Why a module's own forward has no graph, by its name: there only the layers are quantized.
    """

    rows: tuple[PlacementRow, ...]
    untraceable: dict[str, str]

    def __iter__(self) -> Iterator[PlacementRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        return self.to_text()

    def floats(self) -> list[PlacementRow]:
        """Return the operations that run in float."""
        return [row for row in self.rows if not row.is_integer]

    def to_text(self) -> str:
        """Return the report as an aligned table, one line an operation."""
        table: list[tuple[str, ...]] = [
            ("operation", "kind", "runs in", "weights", "grid of its result", "step", "note")
        ]
        table += [_cells(row) for row in self.rows]
        widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table
        ]
        lines += [f"`{name}` has no graph: {reason}" for name, reason in self.untraceable.items()]
        return "\n".join(lines)


def placement_report(model: nn.Module, scheme: Scheme | None = None) -> PlacementReport:
    """Tell what becomes of every operation of ``model``: integer or float, on which grid, and why not.

    Args:
        model: A prepared module, or any other, which is left as it is.
        scheme: How a module that is not prepared would be quantized; by default int8 everywhere.

    Returns:
        The report; grids have a step only where the model was prepared and has seen data.

    Raises:
        ValueError: If a pattern of the scheme matches no layer.

    Example:
        >>> print(placement_report(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Tanh())))
        operation  kind         runs in  weights  grid of its result  step  note
        0          Conv2d       integer  8 bits   2                         -
        1          BatchNorm2d  integer           2                         -
        2          ReLU         integer           2                         -
        3          Tanh         float                                       no integer form
    """
    quantization = quantization_of(model)
    if quantization is not None:
        return PlacementReport(with_steps(quantization.rows, quantization.ranges), dict(quantization.untraceable))
    program = trace_program(model)
    layers = [name for name, module in model.named_modules() if isinstance(module, QUANTIZABLE_LAYERS)]
    return PlacementReport(tuple(place(program, scheme, layers).rows), program.untraceable)


def with_steps(rows: Sequence[PlacementRow], ranges: ActivationRanges) -> tuple[PlacementRow, ...]:
    """Return ``rows`` with the grids that ``ranges`` have found so far."""
    return tuple(replace(row, grid=_grid(row.quantizer, ranges)) for row in rows)


def _grid(quantizer: str, ranges: ActivationRanges) -> AffineGrid | None:
    return ranges.grid(ranges.names.index(quantizer)) if quantizer in ranges.names else None


def _cells(row: PlacementRow) -> tuple[str, ...]:
    return (
        row.name,
        row.operation,
        "integer" if row.is_integer else "float",
        "" if row.weight_bits is None else f"{row.weight_bits} bits",
        row.quantizer,
        "" if row.grid is None else f"{row.grid.scale:.3g}",
        row.reason or "-",
    )
