"""Several processes: two on this machine, by gloo, as Lightning starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import onnx
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from benchmarks.kill_and_resume import is_equal
from lightning_compress import load_compressed_state
from lightning_compress.errors import CompressionError
from lightning_compress.pruning.state import unpack_mask
from tests.compatibility.runs import LIGHTNING_NOISE, assert_ships
from tests.compatibility.table import refused, works
from tests.compatibility.two_processes import MODULES
from tests.training import all_callbacks, quiet_trainer
from tests.user_modules import LayersOnSelf, loader

AREA = "Devices"

pytestmark = [pytest.mark.filterwarnings(*LIGHTNING_NOISE)]


class Ranks:
    """What the processes of a run ended with."""

    def __init__(self, folder: Path, n: int, errors: str) -> None:
        self.folder, self.errors = folder, errors
        self.dumps: list[dict[str, Any]] = [
            torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(n)
        ]
        self.has_exported = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(n)]
        self.metrics: list[dict[str, float]] = json.loads((folder / "metrics.json").read_text())


def started(folder: Path, module: str, launcher: str | None, **options: Any) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    settings = {"folder": str(folder), "module": module, "launcher": launcher, **options}
    command = [sys.executable, "-m", "tests.compatibility.two_processes", json.dumps(settings)]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    return subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, timeout=300)


def run(folder: Path, module: str, launcher: str | None = "popen", **options: Any) -> Ranks:
    done = started(folder, module, launcher, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return Ranks(folder, 1 if launcher is None else 2, done.stderr)


def assert_alike(found: Ranks, module: str) -> None:
    """Ranges, masks and weights of both processes are the same, and only the first wrote a file."""
    first, second = found.dumps
    for name in ("quantization", "pruning", "steps", "state_dict", "parameters"):
        assert is_equal(first[name], second[name]), name
    assert first["pruning"]["complete"]
    assert first["quantization"]["is_quantizing"]
    assert found.has_exported == [True, False]
    network = MODULES[module]()
    assert first["parameters"] == sum(parameter.numel() for parameter in network.parameters())  # no teacher in it
    assert not list(found.folder.glob(".*"))
    pruned = [first["state_dict"][f"{name}.weight"] for name in first["pruning"]["masks"]]
    assert sum(int((weight == 0).sum()) for weight in pruned) == round(0.8 * sum(weight.numel() for weight in pruned))


@works(
    AREA,
    "DDP, started as scripts (`ddp`) or by `spawn`",
    "masks, ranges and weights are the same in all processes; the first writes",
)
@pytest.mark.parametrize(
    ("launcher", "module"),
    [("popen", "LayersOnSelf"), ("spawn", "NetWithKeywords"), ("popen", "ManualOptimization")],
)
def test_two_processes_train_one_network(launcher: str, module: str, tmp_path: Path) -> None:
    found = run(tmp_path, module, launcher)
    assert_alike(found, module)
    assert_ships(load_compressed_state(MODULES[module](), tmp_path / "kept" / "step=16.ckpt"), tmp_path / "model.onnx")


@works(AREA, "testing after a fit by `spawn`", "only weights come back, as a warning says: load a checkpoint first")
def test_a_spawned_fit_says_what_comes_back(tmp_path: Path) -> None:
    found = run(tmp_path, "LayersOnSelf", "spawn")
    assert "Processes that are spawned end with the fit and bring back the weights alone" in found.errors
    fresh = load_compressed_state(LayersOnSelf(), tmp_path / "kept" / "step=16.ckpt")
    held_out = loader(16, seed=1)
    shipped = quiet_trainer(tmp_path).test(fresh, held_out, verbose=False)
    assert shipped[0]["test_loss"] != pytest.approx(found.metrics[0]["test_loss"], abs=1e-6)


@works(
    AREA,
    "DDP against one process with the same global batch",
    "without batch norm: the same masks, weights and ranges within 1e-5",
)
def test_two_processes_compute_what_one_computes(tmp_path: Path) -> None:
    two = run(tmp_path / "two", "WithoutNorm")
    one = run(tmp_path / "one", "WithoutNorm", launcher=None)
    assert_alike(two, "WithoutNorm")
    first, expected = two.dumps[0], one.dumps[0]
    assert first["steps"] == expected["steps"] == 16
    assert is_equal(first["pruning"]["masks"], expected["pruning"]["masks"])
    for name, value in expected["state_dict"].items():
        torch.testing.assert_close(first["state_dict"][name], value, rtol=0, atol=1e-5)
    for name in ("minimum", "maximum"):
        found_range, expected_range = (run["quantization"]["ranges"][name] for run in (first, expected))
        torch.testing.assert_close(found_range, expected_range, rtol=0, atol=1e-5)


@works(AREA, "`ChannelPruning` under DDP", "the same channels in both processes, by gradients of both")
def test_two_processes_prune_the_same_channels(tmp_path: Path) -> None:
    found = run(tmp_path, "LayersOnSelf", channels="taylor")
    first, second = found.dumps
    for name in ("quantization", "pruning", "steps", "state_dict"):
        assert is_equal(first[name], second[name]), name
    assert first["pruning"]["complete"]
    n_kept = sum(int(unpack_mask(bits, [8]).sum()) for bits in first["pruning"]["kept"])
    assert n_kept < 8
    assert found.has_exported == [True, False]
    shapes = {tuple(item.dims) for item in onnx.load(tmp_path / "model.onnx").graph.initializer if len(item.dims) == 4}
    assert shapes == {(n_kept, 1, 3, 3), (n_kept, n_kept, 3, 3)}


@works(AREA, "a last batch that is smaller, 4 bits")
def test_uneven_last_batches(tmp_path: Path) -> None:
    assert_alike(run(tmp_path, "LayersOnSelf", n_images=61, bits=4), "LayersOnSelf")


@works(AREA, "a last batch that is smaller in one process than in the other: 31 and 30 images, padded by nobody")
def test_last_batches_that_differ_between_processes(tmp_path: Path) -> None:
    assert_alike(run(tmp_path, "LayersOnSelf", n_images=61, is_padded=False), "LayersOnSelf")


@works(AREA, "other shapes in each process, in a module that decides by them")
def test_shapes_that_differ_between_processes(tmp_path: Path) -> None:
    assert_alike(run(tmp_path, "ShapesByRank"), "ShapesByRank")


@works(AREA, "resuming under DDP, with dropout", "random numbers of every process go on; bit-identical")
def test_two_processes_are_resumed_to_the_bit(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", "WithDropout")
    resumed = run(tmp_path / "resumed", "WithDropout", ckpt_path=str(tmp_path / "whole" / "kept" / "step=8.ckpt"))
    assert_alike(resumed, "WithDropout")
    for found, expected in zip(resumed.dumps, whole.dumps, strict=True):
        assert is_equal(found, expected)
    assert resumed.metrics == whole.metrics
    assert (tmp_path / "resumed" / "model.onnx").read_bytes() == (tmp_path / "whole" / "model.onnx").read_bytes()


@works(
    AREA,
    "weights that differ between the processes (plain Lightning's `BackboneFinetuning` under DDP makes such)",
    "a warning names the ranks and says that those of rank 0 are written",
)
def test_weights_that_differ_between_processes_are_named(tmp_path: Path) -> None:
    sentence = "The weights of rank 1 are not those of rank 0, which `OnnxExport` writes: the processes have trained"
    assert sentence in run(tmp_path / "drifts", "Drifts").errors
    assert "The weights of rank" not in run(tmp_path / "alike", "LayersOnSelf").errors


@works(
    AREA,
    "resuming under DDP a run that had ended, as after a kill in the export",
    "the first process validates alone, for the inputs of the file",
)
def test_two_processes_that_had_ended_are_only_exported(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", "WithMetric")
    resumed = run(tmp_path / "resumed", "WithMetric", ckpt_path=str(tmp_path / "whole" / "kept" / "step=16.ckpt"))
    assert_alike(resumed, "WithMetric")
    for found, expected in zip(resumed.dumps, whole.dumps, strict=True):
        assert is_equal(found, expected)
    assert (tmp_path / "resumed" / "model.onnx").read_bytes() == (tmp_path / "whole" / "model.onnx").read_bytes()
    assert json.loads((tmp_path / "resumed" / "report.json").read_text())["metrics"][0]["after"] is not None


@refused(AREA, "`ModelParallelStrategy` (FSDP2), and all others that split weights", 'use `strategy="ddp"`')
def test_two_processes_that_split_the_weights_are_refused(tmp_path: Path) -> None:
    done = started(tmp_path, "Configured", "sharded")
    assert done.returncode != 0
    assert (
        "CompressionError: `KnowledgeDistillation` does not work with `ModelParallelStrategy`: it splits the"
        in done.stderr
    )


@pytest.mark.parametrize("position", range(4))
def test_every_callback_refuses_split_weights(position: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    callback: L.Callback = all_callbacks(tmp_path)[position]
    trainer = quiet_trainer(tmp_path, [callback])
    monkeypatch.setattr(trainer._accelerator_connector, "strategy", ModelParallelStrategy())
    with pytest.raises(CompressionError) as caught:
        callback.setup(trainer, LayersOnSelf(), "fit")
    assert str(caught.value) == (
        f"`{type(callback).__name__}` does not work with `ModelParallelStrategy`: it splits the weights over "
        "processes, and magnitudes, scales and the exported file need whole ones. "
        'Use `strategy="ddp"`, or one device.'
    )
