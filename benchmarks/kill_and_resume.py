"""Exact resume: runs are killed with SIGKILL in every phase, resumed, and compared with one that was not stopped.

Each run trains a small residual network, with dropout, on scikit-learn's digits with all four callbacks, in a process
of its own. It is killed at a random moment after a chosen optimizer step, or while it exports at fit end; then the same
program is started again and goes on from the newest checkpoint, written inside an epoch or at its end. In the end
weights, masks, ranges, optimizer and schedule state, the history of losses and metrics, and the ONNX file are compared
with those of the run that nobody killed, byte for byte.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from benchmarks.records import Records, Row, markdown_table, print_machine
from examples.classifier import ImageClassifier
from examples.fashion_mnist import load_digits
from examples.image_data import ImageData
from examples.networks import student
from examples.quiet import quiet_lightning
from lightning_compress import KnowledgeDistillation, MagnitudePruning, OnnxExport, QuantizationAwareTraining

STEPS_PER_EPOCH, N_EPOCHS = 12, 4
N_STEPS = STEPS_PER_EPOCH * N_EPOCHS
PHASES = {
    "before pruning": range(1, 8),
    "pruning": range(8, 20),
    "between": range(20, 28),
    "quantized": range(28, 38),
    "frozen": range(38, N_STEPS),
}
"""Completed optimizer steps of each phase; the export at fit end is one more."""
EXPORT = "export"
LAST_GOOD_FILE = b"the file of an earlier run"
COMPARED = ("state_dict", "optimizer_states", "lr_schedulers", "lightning_compress", "OnnxExport", "metrics")


@dataclass(frozen=True)
class KillPoint:
    """When a run is killed.

    Args:
        phase: One of `PHASES`, or ``"export"``.
        step: The last optimizer step that is completed for certain; of no meaning in the export.
        delay: What is waited then: a share of a step's time, or of the export's.
    """

    phase: str
    step: int
    delay: float


@dataclass
class Reference:
    """The run that nobody killed.

    Args:
        folder: Its files.
        step_s: Seconds of a step.
        export_s: Seconds of the export at fit end.
        final: What `COMPARED` names, at its end.
    """

    folder: Path
    step_s: float
    export_s: float
    final: dict[str, Any] = field(repr=False)


def main() -> None:
    options = _parse()
    if options.child:
        run(Path(options.child))
        return
    print_machine()
    records = Records("kill_and_resume")
    records.drop(lambda row: row["seed"] == options.seed)
    with TemporaryDirectory() as folder:
        reference = run_to_the_end(Path(folder) / "reference")
        for number, point in enumerate(kill_points(options.kills, options.seed)):
            result = killed_and_resumed(Path(folder) / str(number), point, reference)
            records.get(lambda result=result: result, seed=options.seed, number=number)  # type: ignore[misc]
            print(result, flush=True)
    rows = [row for row in records.rows if row["seed"] == options.seed]
    n_equal = sum(not row["differences"] for row in rows)
    print(f"\n{markdown_table(rows)}\n\n{n_equal} of {len(rows)} without a difference")


def kill_points(n_points: int, seed: int) -> list[KillPoint]:
    """Return random moments, spread evenly over the phases."""
    generator = random.Random(seed)
    phases = [*PHASES, EXPORT]
    chosen = [phases[number % len(phases)] for number in range(n_points)]
    steps = [generator.choice(PHASES[phase]) if phase in PHASES else N_STEPS for phase in chosen]
    return [KillPoint(phase, step, generator.random()) for phase, step in zip(chosen, steps, strict=True)]


def run_to_the_end(folder: Path) -> Reference:
    """Run once without a stop."""
    moments = {}
    with _started(folder) as process:
        for line in _lines(process):
            moments[line] = time.perf_counter()
    if process.returncode:
        raise RuntimeError(f"The run ended with {process.returncode}.")
    step_s = (moments[f"step {N_STEPS}"] - moments["step 1"]) / (N_STEPS - 1)
    return Reference(folder, step_s, moments["done"] - moments["export"], _final(folder))


def killed_and_resumed(folder: Path, point: KillPoint, reference: Reference) -> Row:
    """Run until ``point``, kill, resume, and compare with ``reference``.

    Args:
        folder: Where the run writes.
        point: When it is killed.
        reference: The run without a stop.

    Returns:
        The kill point, the step of the checkpoint that the run was resumed from, what the kill left at the place of the
        ONNX file (``"old"``, ``"new"`` or ``"broken"``), and the names of whatever differs in the end.
    """
    folder.mkdir(parents=True)
    file = folder / "model.onnx"
    file.write_bytes(LAST_GOOD_FILE)
    is_export = point.phase == EXPORT
    awaited, unit = ("export", reference.export_s) if is_export else (f"step {point.step}", reference.step_s)
    with _started(folder) as process:
        for line in _lines(process):
            if line == awaited:
                break
        time.sleep(point.delay * unit)
        process.send_signal(signal.SIGKILL)
        told = [line, *filter(None, _lines(process))]
    was_killed = process.returncode == -signal.SIGKILL
    new = (reference.folder / "model.onnx").read_bytes()
    left = {LAST_GOOD_FILE: "old", new: "new"}.get(file.read_bytes(), "broken")
    checkpoint = newest_checkpoint(folder)
    step = 0 if checkpoint is None else int(torch.load(checkpoint, weights_only=True)["global_step"])
    with _started(folder) as process:
        list(_lines(process))
    differences = ["exit code"] if process.returncode else differing(reference.final, _final(folder))
    return {
        "phase": point.phase,
        "killed after": (f"{100 * point.delay:.0f} % of the export" if is_export else told[-1])
        if was_killed
        else "its end",
        "resumed from step": step,
        "file after the kill": left,
        "differences": ", ".join(differences + (["file after the kill"] if left == "broken" else [])),
    }


def differing(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Return the names of what is not equal in every bit, outermost names only."""
    return [name for name in expected if not is_equal(expected[name], found.get(name))]


def is_equal(first: Any, second: Any) -> bool:
    """Tell whether two nests of dicts, lists, tensors and plain values are equal in type and in every bit."""
    if type(first) is not type(second):
        return False
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(is_equal(value, second[key]) for key, value in first.items())
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(is_equal, first, second))
    if isinstance(first, Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    return bool(first == second)


def run(folder: Path) -> None:
    """Train, going on from the newest checkpoint in ``folder`` if there is one; tell every step on stdout."""
    torch.set_num_threads(1)
    quiet_lightning()
    L.seed_everything(0, verbose=False)
    classifier = ImageClassifier(nn.Sequential(nn.Dropout(0.1), student(8, width=8)), learning_rate=0.05)
    data = ImageData(load_digits(), batch_size=50, n_train=50 * STEPS_PER_EPOCH, n_val=100)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=N_EPOCHS,
        callbacks=[
            KnowledgeDistillation(student(8, width=12)),
            MagnitudePruning(0.8, start=8, end=20, update_every=3),
            QuantizationAwareTraining(start=28, freeze=38),
            OnnxExport(folder / "model.onnx", metric="val_accuracy", latency=False),
            ModelCheckpoint(folder / "steps", every_n_train_steps=5),
            ModelCheckpoint(folder / "epochs", save_last=True),
            _Speaker(),
        ],
        logger=False,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(classifier, datamodule=data, ckpt_path=newest_checkpoint(folder), weights_only=True)
    trainer.save_checkpoint(folder / "final.ckpt")
    torch.save(trainer.validate(classifier, data, verbose=False), folder / "metrics.pt")
    _tell("done")


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint of a run that was written last."""
    return max(folder.glob("*s/*.ckpt"), key=lambda path: path.stat().st_mtime_ns, default=None)


class _Speaker(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        _tell(f"step {trainer.global_step}")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        _tell("export")


def _tell(line: str) -> None:
    print(f"\n{line}", flush=True)


def _started(folder: Path) -> subprocess.Popen[str]:
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.kill_and_resume", "--child", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    log = (folder / "errors.txt").open("a")
    with log:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)


def _lines(process: subprocess.Popen[str]) -> Iterator[str]:
    assert process.stdout is not None
    return (line.strip() for line in process.stdout)


def _final(folder: Path) -> dict[str, Any]:
    saved = torch.load(folder / "final.ckpt", weights_only=True)
    everything = {**saved, **saved["callbacks"], "metrics": torch.load(folder / "metrics.pt", weights_only=True)}
    return {name: everything[name] for name in COMPARED} | {"model.onnx": (folder / "model.onnx").read_bytes()}


def _parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=24, help="number of runs that are killed")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
