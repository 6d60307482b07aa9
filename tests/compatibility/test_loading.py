"""Checkpoints of compressed runs: in test, validate and predict, in fresh modules, and under other settings."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_compress import (
    KnowledgeDistillation,
    MagnitudePruning,
    QuantizationAwareTraining,
    export_onnx,
    load_compressed_state,
    strip,
)
from lightning_compress.errors import CompressionError
from lightning_compress.quantization import quantization_of
from tests.compatibility.runs import LIGHTNING_NOISE, assert_ships
from tests.compatibility.table import refused, works
from tests.training import all_callbacks, quiet_trainer
from tests.user_modules import Images, LayersOnSelf, TwoNetworks, loader

AREA = "Loading"

pytestmark = [pytest.mark.filterwarnings(*LIGHTNING_NOISE), pytest.mark.filterwarnings("ignore:Found keys that are")]

IMAGES = Images(16, seed=3).images


class Unlabelled(Dataset[Tensor]):
    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> Tensor:
        return IMAGES[index]


class Predicts(LayersOnSelf):
    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch)  # type: ignore[no-any-return]


class Saved:
    """A compressed module and its checkpoints, one whole, one of weights alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        torch.manual_seed(0)
        self.module = Predicts()
        trainer = quiet_trainer(folder, callbacks("all", folder))
        trainer.fit(self.module, loader(), loader(16, seed=1))
        trainer.save_checkpoint(folder / "whole.ckpt")
        trainer.save_checkpoint(folder / "weights.ckpt", weights_only=True)
        self.tested = trainer.test(self.module, loader(), verbose=False)
        with torch.no_grad():
            self.logits = self.module.eval()(IMAGES)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(tmp_path_factory.mktemp("saved"))


def callbacks(which: str, folder: Path) -> list[L.Callback]:
    _, pruning, quantization, _ = every = all_callbacks(folder)
    return {"all": every[:3], "pruning": [pruning], "quantization": [quantization], "none": []}[which]


@works(
    AREA,
    "`test`, `validate` and `predict` with `ckpt_path`, with the callbacks",
    "in a fresh module: what ships is measured",
)
@pytest.mark.parametrize("which", ["all", "quantization"])
@pytest.mark.parametrize("name", ["whole", "weights"])
def test_a_fresh_module_with_the_callbacks_computes_what_ships(
    which: str, name: str, saved: Saved, tmp_path: Path
) -> None:
    path = saved.folder / f"{name}.ckpt"
    trainer = quiet_trainer(tmp_path, callbacks(which, tmp_path))
    module = Predicts()
    assert trainer.test(module, loader(), ckpt_path=path, verbose=False) == saved.tested
    predicted: Any = quiet_trainer(tmp_path, callbacks(which, tmp_path)).predict(
        Predicts(), DataLoader(Unlabelled(), batch_size=8), ckpt_path=path
    )
    assert torch.equal(torch.cat(predicted), saved.logits)
    validated = quiet_trainer(tmp_path, callbacks(which, tmp_path)).validate(
        Predicts(), loader(), ckpt_path=path, verbose=False
    )
    assert validated[0]["val_loss"] == saved.tested[0]["test_loss"]


@works(AREA, "the same without the callbacks", "the pruned float weights, not rounded")
@pytest.mark.parametrize("which", ["none", "pruning"])
@pytest.mark.parametrize("name", ["whole", "weights"])
def test_without_the_quantization_callback_the_float_network_is_tested(
    which: str, name: str, saved: Saved, tmp_path: Path
) -> None:
    module = Predicts()
    trainer = quiet_trainer(tmp_path, callbacks(which, tmp_path))
    found = trainer.test(module, loader(), ckpt_path=saved.folder / f"{name}.ckpt", verbose=False)
    plain = load(saved)
    strip(plain)
    expected = quiet_trainer(tmp_path).test(plain, loader(), verbose=False)
    assert found == expected
    assert found != saved.tested
    assert quantization_of(module) is None


def load(saved: Saved, name: str = "whole") -> Predicts:
    return load_compressed_state(Predicts(), saved.folder / f"{name}.ckpt")


@works(AREA, "`load_from_checkpoint` with and without this package", "the pruned float weights")
def test_the_users_class_loads_its_checkpoint(saved: Saved) -> None:
    module = Predicts.load_from_checkpoint(saved.folder / "whole.ckpt")
    assert all(torch.equal(value, saved.module.state_dict()[name]) for name, value in module.state_dict().items())
    assert set(vars(module)) == set(vars(Predicts()))
    program = (
        "import sys\n"
        "from tests.user_modules import LayersOnSelf\n"
        "module = LayersOnSelf.load_from_checkpoint(sys.argv[1])\n"
        "assert not any(name.startswith('lightning_compress') for name in sys.modules)\n"
        "print(float(module.fc.weight.detach().abs().sum()))\n"
    )
    arguments = [sys.executable, "-c", program, str(saved.folder / "whole.ckpt")]
    found = subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert float(found.stdout) == float(saved.module.fc.weight.detach().abs().sum())


@works(AREA, "`load_compressed_state(model, checkpoint)` without a Trainer")
@pytest.mark.parametrize("name", ["whole", "weights"])
def test_a_compressed_state_comes_back_without_a_trainer(name: str, saved: Saved, tmp_path: Path) -> None:
    module = load(saved, name).eval()
    with torch.no_grad():
        assert torch.equal(module(IMAGES), saved.logits)
    export_onnx(module, (IMAGES,), tmp_path / "model.onnx")
    assert_ships(module, tmp_path / "model.onnx")


def test_a_module_that_is_prepared_already_takes_a_compressed_state(saved: Saved) -> None:
    module = load(saved)
    load_compressed_state(module, saved.folder / "whole.ckpt")
    with torch.no_grad():
        assert torch.equal(module.eval()(IMAGES), saved.logits)


@works(AREA, "a loaded module in a new fit, or saved again")
def test_a_loaded_module_is_trained_on(saved: Saved, tmp_path: Path) -> None:
    module = load(saved)
    trainer = quiet_trainer(tmp_path, callbacks("all", tmp_path))
    assert trainer.test(module, loader(), verbose=False) == saved.tested
    trainer.save_checkpoint(tmp_path / "again.ckpt")
    again = load_compressed_state(Predicts(), tmp_path / "again.ckpt")
    with torch.no_grad():
        assert torch.equal(again.eval()(IMAGES), saved.logits)
    pruning, quantization = callbacks("all", tmp_path)[1:]
    quiet_trainer(tmp_path, [pruning, quantization]).fit(module, loader(), loader(16, seed=1))
    assert isinstance(pruning, MagnitudePruning)
    assert isinstance(quantization, QuantizationAwareTraining)
    assert pruning.complete
    assert quantization.complete


WAY_OUT = "Use the same settings to go on with it, or `load_from_checkpoint` to begin a new run with its weights."
OTHERS: dict[str, tuple[L.Callback, str]] = {
    "bits": (
        QuantizationAwareTraining(weight_bits=4, activation_bits=5),
        "The checkpoint was written with weight_bits=8, activation_bits=8, this run has weight_bits=4, "
        "activation_bits=5.",
    ),
    "part": (
        QuantizationAwareTraining(module="conv1"),
        "The checkpoint was written with module=None, this run has module='conv1'.",
    ),
    "symmetry": (
        QuantizationAwareTraining(symmetric=True),
        "The checkpoint was written with symmetric=False, this run has symmetric=True.",
    ),
    "sparsity": (MagnitudePruning(0.5), "The checkpoint was written with sparsity=0.8, this run has sparsity=0.5."),
    "pattern": (
        MagnitudePruning(pattern=(2, 4), exclude=["conv1"]),
        "The checkpoint was written with sparsity=0.8, pattern=None, exclude=[], this run has sparsity=0.5, "
        "pattern=[2, 4], exclude=['conv1'].",
    ),
}


@refused(AREA, "a checkpoint of other bits, ranges, sparsity or patterns", "every difference is told")
@pytest.mark.parametrize("name", OTHERS)
def test_a_checkpoint_of_other_settings_is_refused(name: str, saved: Saved, tmp_path: Path) -> None:
    callback, sentence = OTHERS[name]
    trainer = quiet_trainer(tmp_path, [callback], max_epochs=4)
    with pytest.raises(CompressionError) as caught:
        trainer.fit(Predicts(), loader(), loader(16, seed=1), ckpt_path=saved.folder / "whole.ckpt")
    assert str(caught.value) == f"{sentence} {WAY_OUT}"


@refused(AREA, "a checkpoint of another architecture", "`load_compressed_state` names the class and what differs")
def test_a_checkpoint_of_another_architecture_is_refused(saved: Saved) -> None:
    for module, difference in ((LayersOnSelf(12), "size mismatch for conv1.weight"), (TwoNetworks(), "Missing key")):
        with pytest.raises(CompressionError) as caught:
            load_compressed_state(module, saved.folder / "whole.ckpt")
        sentence = f"The checkpoint was written for another architecture than this `{type(module).__name__}`: "
        assert str(caught.value).startswith(sentence)
        assert difference in str(caught.value)


@refused(AREA, "resuming from a checkpoint of another architecture", "what only one of the two has is named")
def test_a_run_is_not_resumed_with_another_architecture(saved: Saved, tmp_path: Path) -> None:
    for module, differences in (
        (
            LayersOnSelf(12),
            "`conv1.weight` has the shape (8, 1, 3, 3) in the checkpoint and (12, 1, 3, 3) in the model, "
            "`bn1.weight` has the shape (8,) in the checkpoint and (12,) in the model, "
            "`bn1.bias` has the shape (8,) in the checkpoint and (12,) in the model and 9 more",
        ),
        (
            TwoNetworks(),
            "only the checkpoint has `conv1.weight`, `bn1.weight`, `bn1.bias` and 12 more; "
            "only the model has `encoder.conv.weight`, `encoder.norm.weight`, `encoder.norm.bias` and 7 more",
        ),
    ):
        trainer = quiet_trainer(tmp_path, all_callbacks(tmp_path)[1:3], max_epochs=4)
        with pytest.raises(CompressionError) as caught:
            trainer.fit(module, loader(), loader(16, seed=1), ckpt_path=saved.folder / "whole.ckpt")
        assert str(caught.value) == (
            f"The checkpoint was written for another architecture than this `{type(module).__name__}`: {differences}. "
            "Build the model as it was in the run that wrote the checkpoint."
        )


@refused(AREA, "`test` of a module that was quantized with other settings", "every difference is told")
def test_a_module_of_other_settings_is_refused_in_test(saved: Saved, tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, [QuantizationAwareTraining(weight_bits=4)])
    with pytest.raises(CompressionError, match="weight_bits=8"):
        trainer.test(load(saved), loader(), verbose=False)


@works(AREA, "`ckpt_path='best'` and `'last'` after the fit, in the same Trainer")
@pytest.mark.parametrize("which", ["best", "last"])
def test_the_best_and_the_last_checkpoint_of_the_same_trainer(which: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    keep = ModelCheckpoint(tmp_path, monitor="val_loss", save_last=True)
    trainer = quiet_trainer(tmp_path, [*callbacks("all", tmp_path), keep], max_epochs=4, enable_checkpointing=True)
    module = Predicts()
    trainer.fit(module, loader(), loader(16, seed=1))
    found = trainer.test(module, loader(), ckpt_path=which, verbose=False)
    path = keep.best_model_path if which == "best" else keep.last_model_path
    fresh = load_compressed_state(Predicts(), path)
    assert found == quiet_trainer(tmp_path).test(fresh, loader(), verbose=False)


numpy: Any = np  # its scalars are not of the types that the arguments have

NUMPY: dict[str, Callable[[], list[L.Callback]]] = {
    "numbers": lambda: [
        MagnitudePruning(
            numpy.float64(0.75), start=numpy.float32(0.0), end=numpy.float64(0.5), update_every=numpy.int64(2)
        ),
        QuantizationAwareTraining(
            weight_bits=numpy.int64(4),
            edge_bits=numpy.int8(4),
            start=numpy.int64(8),
            freeze=numpy.float32(0.75),
            overrides={"conv2": {"weight_bits": numpy.int64(6)}},
            observe_every=numpy.int64(2),
            symmetric=numpy.bool_(True),
        ),
        KnowledgeDistillation(LayersOnSelf(12), temperature=numpy.float32(4.0), weight=numpy.float64(0.5)),
    ],
    "names and a pattern": lambda: [
        MagnitudePruning(pattern=(numpy.int64(2), numpy.int64(4)), exclude=(numpy.str_("conv1"),)),
        QuantizationAwareTraining(exclude=[numpy.str_("fc")]),
    ],
}


@pytest.mark.parametrize("callbacks", NUMPY.values(), ids=NUMPY)
@works(AREA, "numpy's numbers as arguments", "checkpoints hold plain ones, which `weights_only=True` reads")
def test_numpy_arguments_leave_plain_checkpoints(callbacks: Callable[[], list[L.Callback]], tmp_path: Path) -> None:
    module = LayersOnSelf()
    trainer = quiet_trainer(tmp_path, callbacks())
    trainer.fit(module, loader(), loader(16, seed=1))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert torch.load(tmp_path / "end.ckpt", weights_only=True)["global_step"] == 16
    loaded = load_compressed_state(LayersOnSelf(), tmp_path / "end.ckpt")
    with torch.no_grad():
        assert torch.equal(loaded.eval()(IMAGES), module.eval()(IMAGES))
