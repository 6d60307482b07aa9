"""The four promises: the module is not edited, its keys stay, what trained is what ships, a stop changes nothing."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import lightning as L
import onnx
import onnxruntime
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.model_summary.model_summary import ModelSummary
from torch import Tensor, nn

from lightning_compress import (
    KnowledgeDistillation,
    MagnitudePruning,
    OnnxExport,
    QuantizationAwareTraining,
    strip,
)
from tests.training import all_callbacks, quiet_trainer
from tests.user_modules import USER_MODULES, KeywordNet, LayersOnSelf, NetWithKeywords, loader

pytestmark = pytest.mark.filterwarnings(
    "ignore:The '.*dataloader' does not have many workers",
    "ignore:The number of training batches",
    "ignore:.*in eval mode",
    "ignore:Be aware that when using `ckpt_path`, callbacks used to create",
)


def run_session(path: Path, image: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: image.numpy()})[0])


Fit = tuple[LayersOnSelf, L.Trainer, Path]


@pytest.fixture(scope="module", params=USER_MODULES, ids=lambda kind: kind.__name__)
def fit(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Fit:
    """One fit with all four callbacks, for each kind of module; the tests leave the module as it is."""
    return fitted(request.param, tmp_path_factory.mktemp("fit"))


def fitted(kind: type[LayersOnSelf], folder: Path) -> Fit:
    torch.manual_seed(0)
    model = kind()
    trainer = quiet_trainer(folder, all_callbacks(folder))
    trainer.fit(model, loader(), loader(16, seed=1))
    return model, trainer, folder


def test_the_module_gets_its_own_self_back(fit: Fit) -> None:
    plain = type(fit[0])()
    model = strip(copy.deepcopy(fit[0]))
    assert [(name, type(child)) for name, child in model.named_modules()] == [
        (name, type(child)) for name, child in plain.named_modules()
    ]
    for ours, theirs in zip(model.modules(), plain.modules(), strict=True):
        own = set(vars(ours)) - set(vars(theirs))
        assert own == set()


def test_the_state_dict_has_the_users_keys_and_no_others(fit: Fit, tmp_path: Path) -> None:
    model, trainer, _ = fit
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)
    own_keys = list(type(model)().state_dict())
    assert list(saved["state_dict"]) == own_keys
    assert list(model.state_dict()) == own_keys


def test_a_process_without_this_package_loads_the_checkpoint(fit: Fit, tmp_path: Path) -> None:
    model, trainer, _ = fit
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    program = (
        "import sys, torch\n"
        "from tests import user_modules\n"
        "model = getattr(user_modules, sys.argv[2]).load_from_checkpoint(sys.argv[1])\n"
        "assert not any(name.startswith('lightning_compress') for name in sys.modules)\n"
        "print(sum(int((parameter == 0).sum()) for parameter in model.parameters()))\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "end.ckpt"), type(model).__name__],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert int(found.stdout) == sum(int((parameter == 0).sum()) for parameter in model.parameters())


def test_what_was_trained_is_what_ships(fit: Fit) -> None:
    model, _, folder = fit
    images = torch.stack([item["image"] for item in loader(64, seed=2).dataset])  # type: ignore[attr-defined]
    with torch.no_grad():
        expected = model.eval()(images)
        rounded_off = strip(copy.deepcopy(model)).eval()(images)
    found = run_session(folder / "model.onnx", images)
    # The file follows the rounded network, from which the float one is further away.
    # Single values may lie a step apart, where a tie is rounded the other way; nothing more.
    assert (found - expected).abs().mean() < 0.05 * (rounded_off - expected).abs().mean()
    step = expected.unique().diff().min()
    best, second = expected.topk(2, dim=1).values.unbind(1)
    is_clear = best - second > 2.5 * step
    assert is_clear.float().mean() > 0.5
    assert torch.equal(found.argmax(1)[is_clear], expected.argmax(1)[is_clear])


@pytest.mark.parametrize("fit", [LayersOnSelf], indirect=True)
def test_weights_are_stored_as_int8_and_biases_as_int32(fit: Fit) -> None:
    proto = onnx.load(fit[2] / "model.onnx")
    shapes = {
        (onnx.TensorProto.DataType.Name(tensor.data_type), tuple(tensor.dims))
        for tensor in proto.graph.initializer
        if len(tensor.dims)
    }
    weights = {("INT8", (8, 1, 3, 3)), ("INT8", (8, 8, 3, 3)), ("INT8", (4, 8))}
    assert weights | {("INT32", (8,)), ("INT32", (4,))} <= shapes
    assert not any(kind == "FLOAT" and len(dims) > 1 for kind, dims in shapes)
    assert "BatchNormalization" not in {node.op_type for node in proto.graph.node}
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param


PHASES = {"pruning": 3, "observing": 6, "quantized": 9, "frozen": 13}
"""Optimizer steps, of 16, inside each phase of the run below."""


def resumable(folder: Path) -> list[L.Callback]:
    teacher = LayersOnSelf(12)
    teacher.load_state_dict({name: torch.ones_like(value) / 8 for name, value in teacher.state_dict().items()})
    return [
        KnowledgeDistillation(teacher, temperature=4.0, weight=0.7),
        MagnitudePruning(sparsity=0.8, start=0.1, end=0.4, update_every=1),
        QuantizationAwareTraining(start=0.5, freeze=0.75, observe_every=2),
        OnnxExport(folder / "model.onnx", metric="val_acc", latency=False),
    ]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LayersOnSelf, L.Trainer]:
    """A run that was not stopped, with a whole and a weights-only checkpoint in every phase."""
    folder = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    model = LayersOnSelf()
    keep = [SaveAt(folder, tuple(PHASES.values()))]
    trainer = quiet_trainer(folder, [*resumable(folder), *keep], enable_checkpointing=True)
    trainer.fit(model, Stateful(), loader(16, seed=1))
    return folder, model, trainer


class SaveAt(ModelCheckpoint):
    """Saves after the given optimizer steps; runs last, as every `ModelCheckpoint` does."""

    def __init__(self, folder: Path, steps: tuple[int, ...]) -> None:
        super().__init__(folder / "unused", save_top_k=0)
        self.folder = folder
        self.steps = steps

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.global_step in self.steps:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.weights.ckpt", weights_only=True)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("suffix", ["ckpt", "weights.ckpt"])
def test_every_checkpoint_carries_masks_and_ranges(
    phase: str, suffix: str, whole_run: tuple[Path, LayersOnSelf, L.Trainer]
) -> None:
    saved = torch.load(whole_run[0] / f"{PHASES[phase]}.{suffix}", weights_only=True)
    assert set(saved["lightning_compress"]) == {"completion", "pruning", "quantization", "random"}
    assert set(saved["lightning_compress"]["pruning"]["masks"]) == {"conv1", "conv2", "fc"}
    assert saved["lightning_compress"]["quantization"]["is_quantizing"] == (phase in ("quantized", "frozen"))
    assert saved["lightning_compress"]["quantization"]["ranges"]["maximum"].isfinite().all()


@pytest.mark.parametrize("phase", PHASES)
def test_a_resumed_run_is_the_run_that_was_not_stopped(
    phase: str, whole_run: tuple[Path, LayersOnSelf, L.Trainer], tmp_path: Path
) -> None:
    folder, whole, trainer = whole_run
    torch.manual_seed(1)
    resumed = LayersOnSelf()
    again = quiet_trainer(tmp_path, resumable(tmp_path))
    checkpoint = folder / f"{PHASES[phase]}.ckpt"
    again.fit(resumed, Stateful(), loader(16, seed=1), ckpt_path=checkpoint, weights_only=True)

    assert again.global_step == trainer.global_step == 16
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    expected, found = trainer.optimizers[0].state_dict(), again.optimizers[0].state_dict()
    for ours, theirs in zip(found["state"].values(), expected["state"].values(), strict=True):
        assert torch.equal(ours["momentum_buffer"], theirs["momentum_buffer"])
    assert (tmp_path / "model.onnx").read_bytes() == (folder / "model.onnx").read_bytes()


class Stateful:
    """Serves the training batches in order, and goes on where a checkpoint was taken."""

    def __init__(self) -> None:
        self.batches = list(loader())
        self.position = 0
        self.skip = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skip = state["position"] % len(self)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        skip, self.skip = self.skip, 0
        for position in range(skip, len(self)):
            self.position = position + 1
            yield self.batches[position]


def test_the_teacher_is_nowhere_in_the_module(tmp_path: Path) -> None:
    teacher = LayersOnSelf(12)
    torch.manual_seed(0)
    model = LayersOnSelf()
    seen: dict[str, Any] = {}

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
            seen["modules"] = set(pl_module.modules())
            seen["parameters"] = {id(parameter) for parameter in pl_module.parameters()}
            seen["keys"] = list(pl_module.state_dict())
            seen["optimized"] = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
            seen["summary"] = str(ModelSummary(pl_module, max_depth=-1))

    trainer = quiet_trainer(tmp_path, [KnowledgeDistillation(teacher), Look()])
    plain_summary = str(ModelSummary(model, max_depth=-1))
    trainer.fit(model, loader(), loader(16, seed=1))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    ids = {id(parameter) for parameter in teacher.parameters()}
    assert not seen["modules"] & set(teacher.modules())
    assert not (seen["parameters"] | seen["optimized"]) & ids
    assert seen["keys"] == list(LayersOnSelf().state_dict())
    assert seen["summary"] == plain_summary
    assert (tmp_path / "end.ckpt").stat().st_size < 2 * sum(
        4 * parameter.numel() * 2 for parameter in model.parameters()
    ) + 20_000


NAMES = ("distillation", "pruning", "quantization", "export")


@pytest.mark.parametrize("pair", list(combinations(range(4), 2)), ids=lambda pair: f"{NAMES[pair[0]]}+{NAMES[pair[1]]}")
def test_every_pair_of_callbacks_works(pair: tuple[int, int], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LayersOnSelf()
    chosen = [all_callbacks(tmp_path)[index] for index in pair]
    quiet_trainer(tmp_path, chosen).fit(model, loader(), loader(16, seed=1))
    zeros = sum(int((layer.weight == 0).sum()) for layer in (model.conv1, model.conv2, model.fc))
    n_weights = sum(layer.weight.numel() for layer in (model.conv1, model.conv2, model.fc))
    rewritten = "forward" in vars(model)
    assert (zeros == round(0.8 * n_weights)) == (1 in pair)
    assert rewritten == (2 in pair)
    assert (tmp_path / "model.onnx").exists() == (3 in pair)


def test_a_prepared_module_survives_deepcopy_and_pickle(fit: Fit) -> None:
    image = torch.rand(4, 1, 8, 8)
    first = copy.deepcopy(fit[0]).eval()
    expected = first(image)
    copied = copy.deepcopy(first)
    pickled = pickle.loads(pickle.dumps(first))
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
    assert torch.equal(copied(image), expected)
    assert torch.equal(pickled(image), expected)


def test_keyword_calls_that_were_not_foreseen_are_quantized_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = NetWithKeywords()
    quantization = QuantizationAwareTraining(start=0.0)
    export = OnnxExport(tmp_path / "model.onnx", latency=False)
    quiet_trainer(tmp_path, [quantization, export]).fit(model, loader(), loader(16, seed=1))
    assert quantization.quantization.ranges.unseen() == []
    assert export.result is not None
    assert export.result.audit.counts()["conv"] == (1, 1)
    assert export.result.audit.counts()["gemm"] == (1, 1)


class CallsTheNetDirectly(NetWithKeywords):
    """Calls ``self.net`` in its steps, with a keyword that its forward does not pass."""

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        output = self.net(image=batch["image"], scale=0.5)
        return nn.functional.cross_entropy(output["logits"], batch["label"])

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=len(batch["label"]))


def test_a_network_that_is_called_past_the_forward_is_exported_as_it_is_called(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = CallsTheNetDirectly()
    export = OnnxExport(tmp_path / "model.onnx", latency=False)
    quiet_trainer(tmp_path, [QuantizationAwareTraining(), export]).fit(model, loader(), loader(16, seed=1))
    assert export.result is not None
    assert export.result.input_names == ("image",)
    assert export.result.output_names == ("logits", "features")
    assert isinstance(model.net, KeywordNet)
    assert export.result.audit.counts() == {"mul": (0, 1), "conv": (1, 1), "gemm": (1, 1)}
