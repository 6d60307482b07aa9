from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_compress import QuantizationAwareTraining
from lightning_compress.errors import CompressionError
from tests.training import quiet_trainer
from tests.user_modules import LayersOnSelf, TwoNetworks, loader

pytestmark = pytest.mark.filterwarnings(
    "ignore:The '.*dataloader' does not have many workers",
    "ignore:You defined a `validation_step` but have no",
)


class Watch(L.Callback):
    """Notes, for every training batch, what the callback under test set up for it."""

    def __init__(self, quantization: QuantizationAwareTraining) -> None:
        self.quantization = quantization
        self.rows: list[tuple[bool, bool, bool]] = []
        self.maxima: list[dict[str, tuple[float, float]]] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        state = self.quantization.quantization
        norms = [module.training for module in pl_module.modules() if isinstance(module, nn.BatchNorm2d)]
        self.rows.append((state.is_quantizing, state.is_observing, all(norms)))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.maxima.append(self.quantization.quantization.ranges.as_dict())


def run(folder: Path, quantization: QuantizationAwareTraining, model: L.LightningModule, **settings: Any) -> Watch:
    watch = Watch(quantization)
    quiet_trainer(folder, [quantization, watch], **settings).fit(model, loader())
    return watch


def test_phases_follow_the_steps(tmp_path: Path) -> None:
    quantization = QuantizationAwareTraining(start=4, freeze=8, observe_every=2)
    watch = run(tmp_path, quantization, LayersOnSelf(), max_steps=10)
    assert [row[0] for row in watch.rows] == [False] * 4 + [True] * 6
    # Observed every fourth step before the start, at every step while ranges settle, never once they are frozen.
    assert [row[1] for row in watch.rows] == [True, False, False, False, True, True, True, True, False, False]
    assert [row[2] for row in watch.rows] == [True] * 8 + [False] * 2


def test_shares_of_the_run_count_optimizer_steps(tmp_path: Path) -> None:
    quantization = QuantizationAwareTraining(start=0.5, freeze=0.75)
    watch = run(tmp_path, quantization, LayersOnSelf(), max_epochs=2, accumulate_grad_batches=2)  # 8 optimizer steps
    assert [row[0] for row in watch.rows] == [False] * 8 + [True] * 8
    assert [row[2] for row in watch.rows] == [True] * 12 + [False] * 4


def test_frozen_ranges_and_statistics_stay(tmp_path: Path) -> None:
    quantization = QuantizationAwareTraining(start=2, freeze=6)
    model = LayersOnSelf()
    means: list[Tensor] = []

    class Means(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
            means.append(model.bn1.running_mean.clone())  # type: ignore[union-attr]

    watch = Watch(quantization)
    quiet_trainer(tmp_path, [quantization, watch, Means()], max_steps=9).fit(model, loader())
    assert watch.maxima[4] != watch.maxima[5]
    assert watch.maxima[5] == watch.maxima[6] == watch.maxima[8]
    assert not torch.equal(means[4], means[5])
    assert torch.equal(means[5], means[8])


def test_before_the_start_training_is_the_plain_training_bit_for_bit(tmp_path: Path) -> None:
    plain, prepared = LayersOnSelf(), LayersOnSelf()
    prepared.load_state_dict(plain.state_dict())
    quiet_trainer(tmp_path, max_steps=6).fit(plain, loader())
    sentence = (
        "^The fit ended after 6 optimizer steps, before the full compression was reached: `QuantizationAwareTraining` "
        "left the model in float, as rounding was due after step 100. Resume the run to finish, or choose earlier"
    )
    with pytest.warns(UserWarning, match=sentence):
        quiet_trainer(tmp_path, [QuantizationAwareTraining(start=100, freeze=100)], max_steps=6).fit(prepared, loader())
    for name, value in plain.state_dict().items():
        assert torch.equal(prepared.state_dict()[name], value), name


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_validation_and_the_sanity_check_teach_the_ranges_nothing(tmp_path: Path) -> None:
    ranges = []
    for validation in (None, loader(8, seed=5)):
        torch.manual_seed(0)
        quantization = QuantizationAwareTraining(start=0.0, freeze=1.0)
        trainer = quiet_trainer(tmp_path, [quantization], max_epochs=1, num_sanity_val_steps=1)
        trainer.fit(LayersOnSelf(), loader(), validation)
        ranges.append(quantization.quantization.ranges.as_dict())
    assert ranges[0] == ranges[1]


def test_the_network_stays_quantized_after_the_fit(tmp_path: Path) -> None:
    model = LayersOnSelf()
    trainer = quiet_trainer(tmp_path, [QuantizationAwareTraining()])
    trainer.fit(model, loader())
    image = torch.rand(4, 1, 8, 8)
    recorded: list[tuple[str, Tensor]] = []
    state = trainer.callbacks[0].quantization  # type: ignore[attr-defined]
    state.recorded = recorded
    model.eval()(image)
    assert [name for name, _ in recorded] == ["image", "relu", "bn2", "relu_1", "mean", "fc"]
    steps = recorded[-1][1] / state.ranges.grid(state.ranges.names.index("fc")).scale
    assert torch.allclose(steps, steps.round(), atol=1e-3)


def test_a_second_fit_and_a_test_run_go_on_with_the_same_module(tmp_path: Path) -> None:
    model = LayersOnSelf()
    quantization = QuantizationAwareTraining(start=0.5)
    quiet_trainer(tmp_path, [quantization]).fit(model, loader())
    trainer = quiet_trainer(tmp_path, [quantization])
    trainer.fit(model, loader())
    assert quantization.complete
    assert trainer.test(model, loader(), verbose=False)[0]["test_loss"] > 0.0


def test_a_checkpoint_brings_the_ranges_into_a_fresh_module(tmp_path: Path) -> None:
    trained = LayersOnSelf()
    trainer = quiet_trainer(tmp_path, [QuantizationAwareTraining()])
    trainer.fit(trained, loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    expected = trainer.test(trained, loader(16, seed=3), verbose=False)
    fresh = QuantizationAwareTraining()
    again = quiet_trainer(tmp_path, [fresh])
    found = again.test(LayersOnSelf(), loader(16, seed=3), ckpt_path=tmp_path / "end.ckpt", verbose=False)
    assert fresh.complete
    assert found == expected


class BuiltInSetup(LayersOnSelf):
    """Makes its layers in `setup`, which runs after the callbacks'."""

    def __init__(self) -> None:
        L.LightningModule.__init__(self)

    def setup(self, stage: str) -> None:
        if not hasattr(self, "conv1"):
            built = LayersOnSelf()
            for name, child in built.named_children():
                setattr(self, name, child)


def test_layers_made_in_the_modules_setup_are_found(tmp_path: Path) -> None:
    quantization = QuantizationAwareTraining()
    quiet_trainer(tmp_path, [quantization]).fit(BuiltInSetup(), loader())
    assert set(quantization.quantization.layer_bits) == {"conv1", "conv2", "fc"}


def test_excluded_layers_stay_in_float(tmp_path: Path) -> None:
    quantization = QuantizationAwareTraining(exclude=["classifier"])
    quiet_trainer(tmp_path, [quantization]).fit(TwoNetworks(), loader())
    assert set(quantization.quantization.layer_bits) == {"encoder.conv"}
    reasons = {row.name: row.reason for row in quantization.placement}
    assert reasons["classifier.0"] == "excluded"


def test_one_submodule_alone_can_be_quantized(tmp_path: Path) -> None:
    quantization = QuantizationAwareTraining(module="encoder")
    model = TwoNetworks()
    quiet_trainer(tmp_path, [quantization]).fit(model, loader())
    assert set(quantization.quantization.layer_bits) == {"conv"}
    assert "forward" not in vars(model.classifier)


def test_the_phase_is_logged(tmp_path: Path) -> None:
    phases: list[float] = []

    class Read(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            phases.append(trainer.callback_metrics["compress/quantization_phase"].item())

    quantization = QuantizationAwareTraining(start=130, freeze=132)
    quiet_trainer(tmp_path, [quantization, Read()], max_epochs=-1, max_steps=134).fit(LayersOnSelf(), loader())
    assert phases == [0.0] * 2 + [1.0] * 128 + [2.0] * 2 + [3.0] * 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"weight_bits": 0}, "`weight_bits` must be from 1 to 8, got 0."),
        ({"activation_bits": 9}, "`activation_bits` must be from 1 to 8, got 9."),
        (
            {"start": 1.5},
            "`start` as a float is a share of the run in [0, 1], got 1.5. For optimizer steps pass an int.",
        ),
        ({"start": -1}, "`start` must not be negative, got -1."),
        ({"start": 0.8, "freeze": 0.5}, "`start` must not come after `freeze`, got start=0.8 and freeze=0.5."),
        ({"observe_every": 0}, "`observe_every` must be at least 1 optimizer step, got 0."),
    ],
)
def test_arguments_out_of_range_are_refused_at_once(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        QuantizationAwareTraining(**arguments)


def test_bits_must_be_a_whole_number() -> None:
    with pytest.raises(TypeError) as caught:
        QuantizationAwareTraining(weight_bits=4.0)  # type: ignore[arg-type]
    assert str(caught.value) == "`weight_bits` must be an int from 1 to 8, got 4.0."


def refused(folder: Path, callbacks: list[L.Callback], model: L.LightningModule, **settings: Any) -> str:
    with pytest.raises((ValueError, CompressionError)) as caught:
        quiet_trainer(folder, callbacks, **settings).fit(model, loader())
    return str(caught.value)


def test_steps_that_turn_out_in_the_wrong_order_are_refused(tmp_path: Path) -> None:
    sentence = refused(tmp_path, [QuantizationAwareTraining(start=15, freeze=0.5)], LayersOnSelf())
    assert sentence == (
        "`start` must not come after `freeze`, got start=15 (optimizer step 15) and freeze=0.5 (optimizer step 8)."
    )


def test_shares_of_an_endless_run_are_refused(tmp_path: Path) -> None:
    sentence = refused(tmp_path, [QuantizationAwareTraining(start=0.5)], LayersOnSelf(), max_epochs=-1)
    assert sentence == (
        "`start=0.5` is a share of the run, but this run has no known end. Pass `start` as an int (optimizer steps), "
        "or give the Trainer `max_steps` or a finite `max_epochs`."
    )


def test_two_of_the_callback_are_refused(tmp_path: Path) -> None:
    twice: list[L.Callback] = [QuantizationAwareTraining(), QuantizationAwareTraining(start=0.5)]
    sentence = refused(tmp_path, twice, LayersOnSelf())
    assert sentence == "The Trainer has more than one `QuantizationAwareTraining` callback. Keep one of them."


class NoLayers(LayersOnSelf):
    """One parameter, no layer."""

    def __init__(self) -> None:
        L.LightningModule.__init__(self)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, image: Tensor) -> Tensor:
        return image.flatten(1)[:, :4] * self.scale


def test_a_module_without_layers_is_refused(tmp_path: Path) -> None:
    sentence = refused(tmp_path, [QuantizationAwareTraining()], NoLayers())
    assert sentence == (
        "`NoLayers` has no convolution or linear layer to quantize. Layers must exist before training, as children "
        "of the module; `exclude` must leave some."
    )


def test_an_exclude_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    sentence = refused(tmp_path, [QuantizationAwareTraining(exclude=["head"])], LayersOnSelf())
    assert sentence == "`exclude` pattern 'head' matches no layer. The layers are: `conv1`, `conv2`, `fc`."


def test_an_unknown_module_is_refused(tmp_path: Path) -> None:
    sentence = refused(tmp_path, [QuantizationAwareTraining(module="body")], TwoNetworks())
    assert sentence == (
        "`module='body'` is not a submodule of `TwoNetworks`; its children are `encoder`, `classifier`."
    )


class ConfiguredLate(NoLayers):
    """Makes its layers in `configure_model`."""

    def configure_model(self) -> None:
        self.fc = nn.Linear(64, 4)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.fc(image.flatten(1))
        return logits


def test_layers_that_only_configure_model_makes_are_rounded(tmp_path: Path) -> None:
    model, callback = ConfiguredLate(), QuantizationAwareTraining(start=0.0)
    quiet_trainer(tmp_path, [callback]).fit(model, loader())
    assert callback.quantization.ranges.unseen() == []
    assert callback.quantization.ranges.is_seen(0)


class StillNothing(NoLayers):
    """Makes no layer in `configure_model` either."""

    def configure_model(self) -> None:
        self.scale = nn.Parameter(torch.ones(1))


def test_a_module_that_never_gets_a_layer_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path, [QuantizationAwareTraining()], StillNothing()).startswith("`StillNothing` has no ")


class PastTheForward(TwoNetworks):
    """Has a forward of its own layers that no step calls."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Conv2d(1, 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        result: Tensor = self.unused(image)
        return result

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        pooled, _ = self.encoder(batch["image"])
        return nn.functional.cross_entropy(self.classifier(pooled), batch["label"])


def test_a_forward_that_the_step_never_calls_is_named(tmp_path: Path) -> None:
    sentence = refused(tmp_path, [QuantizationAwareTraining()], PastTheForward(), max_steps=3)
    assert sentence == (
        "`training_step` never called the forward of `PastTheForward`, which was prepared for quantization, so its "
        "quantizers saw no data. Call it in the step (`self(...)`), or point at the network that the step calls with "
        '`QuantizationAwareTraining(module=...)`, one of "encoder", "classifier", "unused".'
    )


def test_a_network_that_the_step_calls_past_the_forward_can_be_pointed_at(tmp_path: Path) -> None:
    quantization = QuantizationAwareTraining(module="encoder")
    quiet_trainer(tmp_path, [quantization], max_steps=3).fit(PastTheForward(), loader())
    assert quantization.quantization.ranges.unseen() == []


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    model = LayersOnSelf()
    model.conv2.weight.data[0, 0, 0, 0] = float("nan")
    sentence = refused(tmp_path, [QuantizationAwareTraining()], model)
    assert sentence == (
        "The weight of layer `conv2` is NaN or infinite and cannot be compressed. "
        "Start from a checkpoint from before the training diverged."
    )


class Diverging(LayersOnSelf):
    """Feeds infinity."""

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return super().loss({**batch, "image": batch["image"] / 0.0})


def test_ranges_that_are_not_finite_are_named(tmp_path: Path) -> None:
    sentence = refused(tmp_path, [QuantizationAwareTraining()], Diverging())
    assert sentence == (
        "The activation at `image` was NaN or infinite, so it has no range to quantize to. "
        "The training diverged before: lower the learning rate, clip the gradients, or check the data."
    )


def test_a_checkpoint_of_other_bits_is_refused(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, [QuantizationAwareTraining(weight_bits=4)])
    trainer.fit(LayersOnSelf(), loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    again = quiet_trainer(tmp_path, [QuantizationAwareTraining()])
    with pytest.raises(CompressionError) as caught:
        again.test(LayersOnSelf(), loader(), ckpt_path=tmp_path / "end.ckpt", verbose=False)
    assert str(caught.value) == (
        "The checkpoint was written with weight_bits=4, this run has weight_bits=8. "
        "Use the same settings to go on with it, or `load_from_checkpoint` to begin a new run with its weights."
    )


def test_a_copied_callback_prepares_its_own_module(tmp_path: Path) -> None:
    quantization = QuantizationAwareTraining()
    first, second = LayersOnSelf(), LayersOnSelf()
    quiet_trainer(tmp_path, [quantization]).fit(first, loader())
    copied = copy.deepcopy(quantization)
    quiet_trainer(tmp_path, [copied]).fit(second, loader())
    assert quantization.quantization.model is first
    assert copied.quantization.model is second
