"""Learned step sizes in a fit: outside the model, resumed, frozen, and shipped as they were trained."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import onnxruntime
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_compress import MagnitudePruning, OnnxExport, QuantizationAwareTraining
from lightning_compress.quantization import quantization_of
from tests.training import quiet_trainer
from tests.user_modules import LayersOnSelf, ManualOptimization, loader

pytestmark = pytest.mark.filterwarnings(
    "ignore:The '.*dataloader' does not have many workers",
    "ignore:The number of training batches",
    "ignore:You defined a `validation_step` but have no",
    "ignore:.*in eval mode",
    "ignore:Be aware that when using `ckpt_path`, callbacks used to create",
)


def low_bits(**settings: Any) -> QuantizationAwareTraining:
    return QuantizationAwareTraining(weight_bits=2, activation_bits=4, edge_bits=3, **settings)


class Watch(L.Callback):
    """Notes the step sizes at the end of every training batch."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.parameters: set[int] = set()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        quantization = quantization_of(pl_module)
        assert quantization is not None
        self.steps.append({name: leaf.detach().clone() for name, leaf in quantization.steps.leaves.items()})
        self.parameters = {id(item) for item in pl_module.parameters()}
        self.parameters |= {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    return [name for name in before if not torch.equal(before[name], after[name])]


def fitted(folder: Path, quantization: QuantizationAwareTraining, **settings: Any) -> tuple[LayersOnSelf, Watch]:
    torch.manual_seed(0)
    model, watch = LayersOnSelf(), Watch()
    quiet_trainer(folder, [quantization, watch], **settings).fit(model, loader())
    return model, watch


def test_steps_are_learned_from_start_to_freeze(tmp_path: Path) -> None:
    _, watch = fitted(tmp_path, low_bits(start=3, freeze=8), max_steps=10)
    assert [len(steps) for steps in watch.steps[:3]] == [0, 0, 0]
    everything = list(watch.steps[3])
    assert {name.split(" at ")[0].split(" of ")[0] for name in everything} == {"weight", "activation"}
    for earlier, later in zip(watch.steps[3:7], watch.steps[4:8], strict=True):
        assert changed(earlier, later) == everything
    assert changed(watch.steps[7], watch.steps[9]) == []
    assert all((step > 0).all() for step in watch.steps[9].values())


def test_without_a_warm_up_activations_learn_from_the_second_step_on(tmp_path: Path) -> None:
    _, watch = fitted(tmp_path, low_bits(start=0), max_steps=3)
    assert changed(watch.steps[0], watch.steps[1]) == list(watch.steps[0])


def test_steps_are_neither_parameters_nor_in_the_state_dict(tmp_path: Path) -> None:
    model, watch = fitted(tmp_path, low_bits(), max_steps=3)
    quantization = quantization_of(model)
    assert quantization is not None
    assert not watch.parameters & {id(leaf) for leaf in quantization.steps.leaves.values()}
    assert list(model.state_dict()) == list(LayersOnSelf().state_dict())


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    _, watch = fitted(tmp_path, low_bits(), max_epochs=1, accumulate_grad_batches=2)
    moved = [bool(changed(first, second)) for first, second in zip(watch.steps[1:], watch.steps[2:], strict=False)]
    assert moved == [False, True, False, True, False, True]


def test_manual_optimization_learns_steps_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, watch = ManualOptimization(), Watch()
    quiet_trainer(tmp_path, [low_bits(), watch], max_epochs=1).fit(model, loader())
    assert changed(watch.steps[1], watch.steps[-1]) == list(watch.steps[1])


def test_a_run_resumed_while_steps_are_learned_is_the_run_that_was_not_stopped(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = LayersOnSelf()
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=8, save_top_k=-1)
    settings = {"max_epochs": 2, "enable_checkpointing": True}
    watch = Watch()
    quiet_trainer(tmp_path, [low_bits(start=3), watch, save], **settings).fit(whole, loader())
    torch.manual_seed(1)
    resumed, later = LayersOnSelf(), Watch()
    trainer = quiet_trainer(tmp_path, [low_bits(start=3), later], **settings)
    trainer.fit(resumed, loader(), ckpt_path=tmp_path / "step=8.ckpt", weights_only=True)
    assert changed(watch.steps[-1], later.steps[-1]) == []
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    image = torch.rand(4, 1, 8, 8)
    assert torch.equal(resumed.eval()(image), whole.eval()(image))


def test_a_module_in_training_survives_deepcopy_and_pickle(tmp_path: Path) -> None:
    model, _ = fitted(tmp_path, low_bits(), max_steps=4)
    image = torch.rand(4, 1, 8, 8)
    expected = model.eval()(image)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(image), expected)
        quantization, own = quantization_of(other), quantization_of(model)
        assert quantization is not None
        assert own is not None
        # The copy's quantizers hold the copy's step sizes.
        assert quantization.weights["conv2"].step is quantization.steps.leaves["weight of conv2"]
        assert quantization.weights["conv2"].step is not own.weights["conv2"].step


@pytest.mark.parametrize("bits", [(2, 4), (4, 4), (3, 3)])
def test_what_was_learned_is_what_ships(bits: tuple[int, int], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LayersOnSelf()
    with torch.no_grad():
        model.bn1.weight[::2] *= -1.0  # a negative gamma changes the signs of a channel's integers
    quantization = QuantizationAwareTraining(weight_bits=bits[0], activation_bits=bits[1])
    export = OnnxExport(tmp_path / "model.onnx", latency=False)
    quiet_trainer(tmp_path, [quantization, export]).fit(model, loader(), loader(16, seed=1))
    image = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        expected = model.eval()(image)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: image.numpy()})[0])
    levels = quantization.quantization.ranges.grid(quantization.quantization.ranges.names.index("fc"))
    assert levels is not None
    assert (found - expected).abs().max() <= 1.01 * levels.scale


def test_pruned_weights_stay_zero_at_two_bits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LayersOnSelf()
    quiet_trainer(tmp_path, [MagnitudePruning(sparsity=0.8, end=0.5), low_bits(start=0.5)]).fit(model, loader())
    quantization = quantization_of(model)
    assert quantization is not None
    for name, layer in model.named_children():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            integers, _ = quantization.weights[name].integers(layer.weight)
            assert (integers[layer.weight == 0] == 0).all()


@pytest.mark.parametrize(
    ("ranges", "symmetric"), [("minmax", True), ("percentile", False), ("mse", True), ("learned", False)]
)
def test_every_choice_of_ranges_trains_and_ships(ranges: Any, symmetric: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LayersOnSelf()
    quantization = QuantizationAwareTraining(
        weight_bits=4, activation_bits=4, ranges=ranges, symmetric=symmetric, reduce_range=True
    )
    export = OnnxExport(tmp_path / "model.onnx", latency=False)
    quiet_trainer(tmp_path, [quantization, export]).fit(model, loader(), loader(16, seed=1))
    state = quantization.quantization
    assert state.layer_bits == {"conv1": 7, "conv2": 4, "fc": 7}
    middles = [state.ranges.grid(index).zero_point * 2 // 2**bits for index, bits in enumerate(state.ranges.bits)]  # type: ignore[union-attr]
    assert (set(middles) == {1}) == symmetric
    assert bool(state.steps.leaves) == (ranges == "learned")
    assert export.result is not None
