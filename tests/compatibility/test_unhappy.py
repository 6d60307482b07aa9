"""Runs that end badly: the model and the last good file survive, and the message says what happened."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_compress import OnnxExport, load_compressed_state, strip
from lightning_compress.errors import CompressionError
from lightning_compress.quantization import quantization_of
from tests.compatibility.runs import LIGHTNING_NOISE, Run, assert_compressed, fit
from tests.compatibility.table import refused, works
from tests.training import all_callbacks, quiet_trainer
from tests.user_modules import Images, LayersOnSelf, loader

AREA = "When something goes wrong"
LAST_GOOD = b"the last good file"

pytestmark = [pytest.mark.filterwarnings(*LIGHTNING_NOISE)]


class Breaks(LayersOnSelf):
    """Raises, or returns NaN, after so many optimizer steps."""

    def __init__(self, step: int, error: BaseException | None = None) -> None:
        super().__init__()
        self.step, self.error = step, error

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        if self.trainer.global_step != self.step:
            return loss
        if self.error is not None:
            raise self.error
        return loss * float("nan")


def assert_survives(folder: Path, module: Breaks) -> None:
    """The last good file is as it was, the module computes, and can be trained again or be taken back."""
    assert (folder / "model.onnx").read_bytes() == LAST_GOOD
    assert not list(folder.glob(".*"))
    assert module(Images(4).images).isfinite().all()
    module.step = -1
    again = fit(folder / "again", module)
    assert_compressed(again)
    plain = strip(copy.deepcopy(module))
    assert set(vars(plain)) == set(vars(Breaks(0)))


@pytest.mark.parametrize("step", [2, 9, 13])
@works(AREA, "an exception in `training_step`", "it is raised as it is; the module can be trained on")
def test_an_exception_in_the_training_step(step: int, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(LAST_GOOD)
    module = Breaks(step, ZeroDivisionError("of the user"))
    with pytest.raises(ZeroDivisionError, match="of the user"):
        fit(tmp_path, module)
    assert_survives(tmp_path, module)


@pytest.mark.parametrize("step", [2, 13])
@works(AREA, "Ctrl-C", "Lightning ends the program; nothing is exported")
def test_an_interrupt(step: int, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(LAST_GOOD)
    module = Breaks(step, KeyboardInterrupt())
    with pytest.raises(SystemExit):
        fit(tmp_path, module)
    assert_survives(tmp_path, module)


class InterruptsTheExport(OnnxExport):
    def _measured(self, *args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt


@works(AREA, "Ctrl-C in the export", "the weights are kept beside the file, with masks and ranges")
def test_an_interrupt_in_the_export(tmp_path: Path) -> None:
    module = LayersOnSelf()
    callbacks = [*all_callbacks(tmp_path)[:3], InterruptsTheExport(tmp_path / "model.onnx", latency=False)]
    warned = pytest.warns(UserWarning, match=r"the trained weights are kept in .*model\.onnx\.ckpt")
    with warned, pytest.raises(SystemExit):
        quiet_trainer(tmp_path, callbacks).fit(module, loader(), loader(16, seed=1))
    kept = load_compressed_state(LayersOnSelf(), tmp_path / "model.onnx.ckpt")
    images = Images(8, seed=3).images
    with torch.no_grad():
        assert torch.equal(kept.eval()(images), module.eval()(images))


DIVERGED: dict[str, tuple[int, str]] = {
    "in pruning": (
        2,
        "The weight of layer `conv1` holds NaN or infinity, so its entries cannot be ranked. The training",
    ),
    "while ranges are observed": (
        9,
        "The activation at `relu` was NaN or infinite, so it has no range to quantize to.",
    ),
    "after the freeze": (14, "The weight of layer `conv1` is NaN or infinite and cannot be compressed. Start from a"),
}


@refused(
    AREA, "a loss that turns NaN", "the run ends at the next moment that needs numbers, at the latest before the file"
)
@pytest.mark.filterwarnings("ignore:The export failed")
@pytest.mark.parametrize("when", DIVERGED)
def test_a_loss_that_turns_nan(when: str, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(LAST_GOOD)
    step, sentence = DIVERGED[when]
    with pytest.raises((CompressionError, ValueError)) as caught:
        fit(tmp_path, Breaks(step))
    assert str(caught.value).startswith(sentence)
    assert (tmp_path / "model.onnx").read_bytes() == LAST_GOOD


FULL_DISK = """
import resource, signal, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
warnings.filterwarnings("default", message="The export failed")
import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from tests.training import all_callbacks, quiet_trainer
from tests.user_modules import LayersOnSelf, loader

folder, limit, when = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]

class FillsTheDisk(L.Callback):
    def fill(self):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    def on_train_epoch_start(self, trainer, pl_module):
        if when == "checkpoint" and trainer.current_epoch == 1:
            self.fill()

    def on_train_end(self, trainer, pl_module):
        if when == "export":
            self.fill()

keep = [ModelCheckpoint(folder, "{epoch}", save_top_k=-1)] if when == "checkpoint" else []
module = LayersOnSelf()
trainer = quiet_trainer(folder, [*all_callbacks(folder), FillsTheDisk(), *keep], enable_checkpointing=bool(keep))
try:
    trainer.fit(module, loader(), loader(16, seed=1))
finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    trainer.save_checkpoint(folder / "rescued.ckpt")
    print("rescued", flush=True)
"""


def on_a_full_disk(folder: Path, limit: int, when: str) -> subprocess.CompletedProcess[str]:
    """Run with files that cannot grow beyond ``limit`` bytes from a moment on."""
    (folder / "model.onnx").write_bytes(LAST_GOOD)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", FULL_DISK, str(folder), str(limit), when]
    return subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, timeout=300)


@works(
    AREA, "a full disk while exporting", "the last good file stays; a warning says that the weights need another place"
)
def test_a_full_disk_while_exporting(tmp_path: Path) -> None:
    done = on_a_full_disk(tmp_path, 500, "export")
    assert done.returncode == 1
    assert "model.onnx.ckpt could not be written either" in done.stderr
    assert "rescued" in done.stdout
    assert (tmp_path / "model.onnx").read_bytes() == LAST_GOOD
    assert not list(tmp_path.glob(".*"))
    assert quantization_of(load_compressed_state(LayersOnSelf(), tmp_path / "rescued.ckpt")) is not None


@works(AREA, "a full disk while checkpointing", "the checkpoint before stays whole; the module has its weights")
def test_a_full_disk_while_checkpointing(tmp_path: Path) -> None:
    done = on_a_full_disk(tmp_path, 2_000, "checkpoint")
    assert done.returncode == 1
    assert "rescued" in done.stdout
    assert (tmp_path / "model.onnx").read_bytes() == LAST_GOOD
    load_compressed_state(LayersOnSelf(), tmp_path / "epoch=0.ckpt")
    load_compressed_state(LayersOnSelf(), tmp_path / "rescued.ckpt")


class Endless(IterableDataset[dict[str, Tensor]]):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        images = Images(16, seed=1)
        while True:
            yield from (images[index] for index in range(len(images)))


@works(AREA, "a validation loader that is endless, with `limit_val_batches`")
def test_an_endless_validation_loader(tmp_path: Path) -> None:
    data = loader(), DataLoader(Endless(), batch_size=8)
    assert_compressed(fit(tmp_path, data=data, limit_val_batches=2))


@works(AREA, "a validation loader that is empty, or missing", "training batches verify the file")
@pytest.mark.filterwarnings("ignore:Total length of", "ignore:You defined a `validation_step` but")
@pytest.mark.parametrize("validation", [DataLoader(Images(0), batch_size=8), None], ids=["empty", "missing"])
def test_no_validation_batches(validation: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, trainer = LayersOnSelf(), quiet_trainer(tmp_path, all_callbacks(tmp_path))
    trainer.fit(module, loader(), validation)
    assert_compressed(Run(module, trainer, tmp_path))


def hooks_on(module: torch.nn.Module) -> dict[str, int]:
    """Count the entries of every dict of hooks."""
    return {name: len(value) for name, value in vars(module).items() if "hooks" in name and isinstance(value, dict)}


def assert_as_plain(module: torch.nn.Module) -> None:
    """The attributes, hooks, types and keys of a module that was never compressed."""
    plain = LayersOnSelf()
    for ours, theirs in zip(module.modules(), plain.modules(), strict=True):
        assert set(vars(ours)) == set(vars(theirs))
        assert hooks_on(ours) == hooks_on(theirs)
        assert type(ours) is type(theirs)
    assert json.dumps(sorted(module.state_dict())) == json.dumps(sorted(plain.state_dict()))


class Copies(L.Callback):
    """Copies the module in the middle of a step, and again when it is rounded."""

    def __init__(self) -> None:
        self.copies: list[L.LightningModule] = []

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        if trainer.global_step in (2, 12):
            self.copies += [copy.deepcopy(pl_module), pickle.loads(pickle.dumps(pl_module))]


@works(AREA, "`strip` on a copy or a pickle made during the fit", "leaves the plain module; the fit goes on")
def test_copies_made_during_the_fit_can_be_stripped(tmp_path: Path) -> None:
    copies = Copies()
    assert_compressed(fit(tmp_path, last=(copies,)))
    assert len(copies.copies) == 4
    for copied in copies.copies:
        assert_as_plain(strip(copied))


@works(
    AREA, "after the fit", "what only the training needed is gone, and the network stays compressed: `test` measures it"
)
def test_what_only_training_needed_is_gone_after_the_fit(tmp_path: Path) -> None:
    run = fit(tmp_path)
    trainer = quiet_trainer(tmp_path)
    assert trainer.test(run.module, loader(), verbose=False) == run.trainer.test(run.module, loader(), verbose=False)
    assert run.quantization.complete
    hooks = [name for name, module in run.module.named_modules() if module._forward_hooks or module._forward_pre_hooks]
    assert hooks == []
    strip(run.module)
    assert_as_plain(run.module)
    again: L.Trainer = quiet_trainer(tmp_path, max_epochs=1)
    again.fit(run.module, loader(), loader(16, seed=1))  # as plain as any module
