"""Parity: whether an exported file computes what the trained model computes."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from torch import Tensor

from lightning_compress.export.session import open_session, run_session


@dataclass(frozen=True)
class ParityReport:
    """How near an exported file is to the model in PyTorch, over all outputs and samples.

    Attributes:
        samples: Number of samples compared.
        max_abs_diff: Largest absolute difference.
        max_diff_steps: The same in steps of the output's grid, or None where the outputs lie on none.
        snr_db: Signal-to-noise ratio in decibels: power of the outputs over power of the difference.
        top1_agreement: Share of samples with the same largest class in the first output that has classes in its
            second dimension, or None where there is none.
        distinct_top1: Number of different classes among those; 1 makes an agreement empty.
    """

    samples: int
    max_abs_diff: float
    max_diff_steps: float | None
    snr_db: float
    top1_agreement: float | None
    distinct_top1: int

    def to_text(self) -> str:
        """Return the report as one line."""
        parts = [f"largest difference {self.max_abs_diff:.3g}"]
        if self.max_diff_steps is not None:
            parts.append(f"{self.max_diff_steps:.0f} output steps")
        parts.append("no difference at all" if math.isinf(self.snr_db) else f"signal-to-noise {self.snr_db:.1f} dB")
        if self.top1_agreement is not None:
            parts.append(f"top-1 agreement {100 * self.top1_agreement:.2f} % over {self.distinct_top1} classes")
        return f"{self.samples} samples: " + ", ".join(parts)


def compare_outputs(
    expected: Sequence[Sequence[Tensor]], found: Sequence[Sequence[Tensor]], step: float | None = None
) -> ParityReport:
    """Compare outputs of two runs, batch by batch.

    Args:
        expected: For each batch, the outputs of the model in PyTorch.
        found: For each batch, the outputs of the file.
        step: Distance of two neighbouring values of the outputs' grid, or None.

    Returns:
        The report.

    Example:
        >>> report = compare_outputs([[torch.tensor([[1.0, 2.0]])]], [[torch.tensor([[1.0, 1.5]])]], step=0.25)
        >>> report.max_abs_diff, report.max_diff_steps, round(report.snr_db, 2), report.top1_agreement
        (0.5, 2.0, 13.01, 1.0)
    """
    signal = noise = largest = 0.0
    agreeing = samples = 0
    classes: set[int] = set()
    has_classes = False
    for expected_batch, found_batch in zip(expected, found, strict=True):
        samples += expected_batch[0].shape[0] if expected_batch[0].dim() else 1
        for ours, theirs in zip(expected_batch, found_batch, strict=True):
            difference = (ours.double() - theirs.double()).abs()
            # NaN on either side must count as a difference, never as none; equal infinities are none.
            difference = torch.nan_to_num(difference, nan=math.inf, posinf=math.inf).masked_fill(ours == theirs, 0.0)
            largest = max(largest, float(difference.max())) if difference.numel() else largest
            signal += float(ours.double().masked_fill(~ours.isfinite(), 0.0).square().sum())
            noise += float(difference.square().sum())
        for ours, theirs in zip(expected_batch, found_batch, strict=True):
            if ours.is_floating_point() and ours.dim() >= 2 and ours.shape[1] > 1:
                has_classes = True
                ours_top, theirs_top = ours.argmax(1), theirs.argmax(1)
                agreeing += (
                    int((ours_top == theirs_top).flatten(1).all(1).sum())
                    if ours_top.dim() > 1
                    else int((ours_top == theirs_top).sum())
                )
                classes |= set(ours_top.flatten().tolist())
                break
    return ParityReport(
        samples=samples,
        max_abs_diff=largest,
        max_diff_steps=None if step is None else largest / step,
        snr_db=_decibels(signal, noise),
        top1_agreement=agreeing / samples if has_classes and samples else None,
        distinct_top1=len(classes),
    )


def first_difference(
    path: Path, tensors: Sequence[Tensor], recorded: Sequence[tuple[str, Tensor]], min_snr_db: float
) -> str | None:
    """Find the first rounded value inside an exported file that differs from the model in PyTorch.

    Args:
        path: The ONNX file, whose dequantized values are named ``<place>.dequantized``.
        tensors: Inputs of one batch.
        recorded: Name and value of everything the model in PyTorch rounded for this batch, in order.
        min_snr_db: Signal-to-noise ratio under which a value counts as different.

    Returns:
        Name of the first place that differs, or None if none does or the file names no such values.
    """
    model = onnx.load(path)
    inside = {output for node in model.graph.node for output in node.output}
    # A place that several calls share is met several times: the file tells them apart by a number.
    met: Counter[str] = Counter()
    numbered = []
    for name, value in recorded:
        met[name] += 1
        numbered.append((name if met[name] == 1 else f"{name}#{met[name]}", value))
    wanted = [(name, value) for name, value in numbered if f"{name}.dequantized" in inside]
    del model.graph.output[:]
    for name in dict.fromkeys(name for name, _ in wanted):
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(f"{name}.dequantized"))
    if not wanted:
        return None
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "probe.onnx"
        onnx.save(model, probe)
        session = open_session(probe)
        names = [output.name.removesuffix(".dequantized") for output in session.get_outputs()]
        values = dict(zip(names, run_session(session, tensors), strict=True))
    for name, value in wanted:
        if values[name].shape != value.shape or compare_outputs([[value]], [[values[name]]]).snr_db < min_snr_db:
            return name.partition("#")[0]
    return None


def _decibels(signal: float, noise: float) -> float:
    if noise == 0.0:
        return math.inf
    if signal == 0.0 or math.isinf(noise):
        return -math.inf
    return 10.0 * math.log10(signal / noise)
