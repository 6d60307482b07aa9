"""`ChannelPruning` in real fits: targets, masks, resumes, what is shipped, and errors in one sentence."""

from __future__ import annotations

import copy
import json
import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress import (
    ChannelPruning,
    KnowledgeDistillation,
    MagnitudePruning,
    OnnxExport,
    QuantizationAwareTraining,
    rebuild,
    shrink,
    strip,
)
from lightning_compress.errors import CompressionError
from lightning_compress.pruning.channels.importance import IMPORTANCES
from lightning_compress.pruning.channels.plan import Scope
from lightning_compress.report import model_statistics
from tests.compatibility.runs import LIGHTNING_NOISE, assert_ships, outputs_of
from tests.training import quiet_trainer
from tests.user_modules import Images, LayersOnSelf, NetWithKeywords, TwoNetworks, loader

pytestmark = [pytest.mark.filterwarnings(message) for message in LIGHTNING_NOISE]

IMAGES = Images(16, seed=2).images


class ThreeConvolutions(LayersOnSelf):
    """Groups of 48, 64 and 96 channels: a step of four is about one percent of the whole."""

    def __init__(self) -> None:
        super().__init__(8)
        widths = (1, 48, 64, 96)
        self.net = nn.Sequential(
            *[
                nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
                for i, o in pairwise(widths)
            ]
        )
        self.head = nn.Linear(96, 4)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.net(image).mean((2, 3)))  # type: ignore[no-any-return]


def macs_of(module: nn.Module) -> int:
    return model_statistics(strip(copy.deepcopy(module)).eval(), (IMAGES[:1],)).macs


def zeros(module: nn.Module) -> dict[str, int]:
    """Return how many output channels of each layer are zeros."""
    return {
        name: int((parameter.flatten(1) == 0).all(1).sum())
        for name, parameter in module.named_parameters()
        if parameter.dim() > 1
    }


def callbacks(folder: Path, **settings: Any) -> list[L.Callback]:
    return [
        KnowledgeDistillation(LayersOnSelf(12), weight=0.5),
        ChannelPruning(**{"macs": 0.5, "end": 0.5, **settings}),
        QuantizationAwareTraining(start=0.6, freeze=0.8),
        OnnxExport(folder / "model.onnx", latency=False),
    ]


def fit(
    module: L.LightningModule, folder: Path, *added: L.Callback, ckpt_path: Path | None = None, **settings: Any
) -> L.Trainer:
    trainer = quiet_trainer(folder, added, **settings)
    trainer.fit(module, loader(), loader(16, seed=1), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_target_is_reached_and_the_channels_go(importance: Any, scope: Scope, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = ThreeConvolutions()
    before = macs_of(module)
    pruning = ChannelPruning(macs=0.5, end=0.75, importance=importance, scope=scope, round_to=4)
    fit(module, tmp_path, pruning)
    assert pruning.complete
    assert abs(pruning.remaining - 0.5) <= 0.01
    small, _ = shrink(module)
    assert macs_of(module) == before
    assert macs_of(small) == round(pruning.remaining * before)
    assert torch.allclose(small.eval()(IMAGES), module.eval()(IMAGES), atol=1e-5)


def test_the_masked_and_the_shrunk_quantized_network_compute_the_same_bits(tmp_path: Path) -> None:
    module = LayersOnSelf(16)
    quantization = QuantizationAwareTraining(weight_bits=4, activation_bits=4, start=0.5, freeze=0.75)
    fit(module, tmp_path, ChannelPruning(macs=0.5, end=0.25, round_to=4), quantization, max_epochs=4)
    small, _ = shrink(module)
    assert len(small.get_parameter("conv2.weight")) < 16
    with torch.no_grad():
        assert torch.allclose(small.eval()(IMAGES), module.eval()(IMAGES), atol=1e-6)
        assert not torch.allclose(strip(copy.deepcopy(module))(IMAGES), module(IMAGES), atol=1e-4)


def test_channels_go_gradually_and_never_come_back(tmp_path: Path) -> None:
    counts: list[int] = []

    class Counter(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
            counts.append(zeros(pl_module)["conv2.weight"])

    fit(LayersOnSelf(32), tmp_path, ChannelPruning(macs=0.3, start=4, end=12, round_to=4, update_every=2), Counter())
    assert counts[:4] == [0, 0, 0, 0]
    assert counts == sorted(counts)
    assert 0 < counts[6] < counts[-1]
    assert counts[11:] == [counts[-1]] * 5


def test_masked_channels_are_zeros_in_the_optimizer_too(tmp_path: Path) -> None:
    module = LayersOnSelf(16)
    trainer = fit(module, tmp_path, ChannelPruning(macs=0.5, end=6, round_to=4))
    gone = (module.conv2.weight.flatten(1) == 0).all(1)
    assert 0 < gone.sum() < 16
    assert not module.bn2.weight[gone].any()
    assert not module.bn2.bias[gone].any()
    assert not module.fc.weight[:, gone].any()
    fresh = ChannelPruning(macs=0.5, end=16, round_to=4)
    trainer = fit(LayersOnSelf(16), tmp_path, fresh)
    parameter = trainer.lightning_module.get_parameter("conv2.weight")
    gone = (parameter.flatten(1) == 0).all(1)
    assert not trainer.optimizers[0].state[parameter]["momentum_buffer"][gone].any()


def test_a_bottom_up_check_of_one_half_by_hand(tmp_path: Path) -> None:
    class Plain(LayersOnSelf):
        def __init__(self) -> None:
            super().__init__(8)
            self.first, self.last = nn.Linear(64, 8), nn.Linear(8, 4)

        def forward(self, image: Tensor) -> Tensor:
            return self.last(F.relu(self.first(image.flatten(1))))  # type: ignore[no-any-return]

    pruning = ChannelPruning(macs=0.5, end=0.5)
    module = Plain()
    fit(module, tmp_path, pruning)
    # Every unit costs 64 + 4 multiply-accumulates: half of them are four units.
    assert pruning.widths == {"first": (8, 4)}
    assert zeros(module)["first.weight"] == 4


def test_parameters_can_be_the_target(tmp_path: Path) -> None:
    module = LayersOnSelf(32)
    before = sum(parameter.numel() for parameter in module.parameters())
    pruning = ChannelPruning(parameters=0.4, round_to=2)
    fit(module, tmp_path, pruning)
    after = sum(parameter.numel() for parameter in shrink(module).model.parameters())
    assert abs(after / before - 0.4) <= 0.01
    assert after == round(pruning.remaining * before)


def test_a_shrunk_network_is_saved_rebuilt_trained_on_and_exported(tmp_path: Path) -> None:
    module = LayersOnSelf(16)
    fit(module, tmp_path, ChannelPruning(macs=0.5, round_to=4))
    small, record = shrink(module)
    torch.save(small.state_dict(), tmp_path / "small.pt")
    (tmp_path / "record.json").write_text(json.dumps(record))
    again = rebuild(LayersOnSelf(16), json.loads((tmp_path / "record.json").read_text()))
    again.load_state_dict(torch.load(tmp_path / "small.pt", weights_only=True))
    assert torch.equal(again.eval()(IMAGES), small.eval()(IMAGES))
    export = OnnxExport(tmp_path / "model.onnx", latency=False)
    fit(again, tmp_path, QuantizationAwareTraining(start=0.5, freeze=0.75), export)
    assert_ships(again, tmp_path / "model.onnx")
    assert "on_save_checkpoint" not in vars(small)
    pickle.loads(pickle.dumps(small))


def test_a_network_that_was_pruned_elsewhere_is_shrunk_by_its_zeros(tmp_path: Path) -> None:
    module = LayersOnSelf(16)
    fit(module, tmp_path, ChannelPruning(macs=0.5, round_to=4))
    plain = LayersOnSelf(16)
    plain.load_state_dict(module.state_dict())
    assert shrink(plain, IMAGES).record == shrink(module).record
    with pytest.raises(CompressionError, match="Nothing tells which channels of `LayersOnSelf` go together"):
        shrink(plain)


def test_zeros_of_other_pruning_are_removed_only_as_blocks_allow(tmp_path: Path) -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.grouped = nn.Conv2d(1, 8, 1), nn.Conv2d(8, 4, 1, groups=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.grouped(self.before(x))  # type: ignore[no-any-return]

    network = Grouped()
    with torch.no_grad():
        network.grouped.weight[:2, :3] = 0  # three inputs of the first group, one of the second
        network.grouped.weight[2:, 1] = 0
    small, record = shrink(network, IMAGES)
    assert record == {"before": {"out": [1, 2, 3, 4, 6, 7]}, "grouped": {"in": [1, 2, 3, 4, 6, 7]}}
    assert torch.allclose(small(IMAGES), network(IMAGES), atol=1e-6)


def test_taylor_has_scores_at_its_first_choice(tmp_path: Path) -> None:
    module = LayersOnSelf(16)
    pruning = ChannelPruning(macs=0.5, end=1, importance="taylor", round_to=4)
    fit(module, tmp_path, pruning)
    (mask,) = pruning._state.kept
    assert mask.tolist() != sorted(mask.tolist(), reverse=True)  # without scores the first ones stay


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_half_precision(precision: Any, tmp_path: Path) -> None:
    module, pruning = LayersOnSelf(16), ChannelPruning(macs=0.5, round_to=4)
    fit(module, tmp_path, pruning, precision=precision)
    small, _ = shrink(module)
    images = IMAGES.to(module.fc.weight.dtype)
    assert torch.allclose(small.eval()(images), module.eval()(images), atol=0.05)
    assert len(small.get_parameter("conv2.weight")) < 16


def test_a_deep_copy_and_a_pickle_carry_their_channels(tmp_path: Path) -> None:
    module = LayersOnSelf(16)
    fit(module, tmp_path, ChannelPruning(macs=0.5, round_to=4))
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert shrink(twin).record == shrink(module).record


def test_strip_leaves_nothing_behind(tmp_path: Path) -> None:
    module, untouched = LayersOnSelf(16), LayersOnSelf(16)
    fit(module, tmp_path, *callbacks(tmp_path, round_to=4), max_epochs=4)
    strip(module)
    assert set(vars(module)) - {"_trainer", "_fabric"} == set(vars(untouched)) - {"_trainer", "_fabric"}
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())


def test_channels_and_single_weights_are_pruned_in_one_run(tmp_path: Path) -> None:
    module = LayersOnSelf(16)
    channels = ChannelPruning(macs=0.5, end=0.3, round_to=4)
    weights = MagnitudePruning(0.8, start=0.3, end=0.6)
    fit(module, tmp_path, channels, weights, OnnxExport(tmp_path / "model.onnx", latency=False), max_epochs=4)
    assert channels.complete
    assert weights.complete
    assert weights.counted_sparsity(module) == pytest.approx(0.8, abs=0.001)
    expected = module.eval()(IMAGES)
    assert torch.allclose(outputs_of(tmp_path / "model.onnx", IMAGES), expected, atol=1e-4)


def test_a_second_fit_begins_anew(tmp_path: Path) -> None:
    module, pruning = LayersOnSelf(16), ChannelPruning(macs=0.7, round_to=4)
    fit(module, tmp_path, pruning)
    first = zeros(module)["conv2.weight"]
    fit(module, tmp_path, pruning)
    assert pruning.complete
    assert zeros(module)["conv2.weight"] >= first > 0


def test_excluded_layers_and_budgets_hold(tmp_path: Path) -> None:
    pruning = ChannelPruning(macs=0.6, round_to=1, exclude=["encoder.conv"], budget={"classifier.*": 0.75})
    with pytest.raises(CompressionError, match=r"`macs=0.6` cannot be reached: with every group at its floor 0\.\d+"):
        fit(TwoNetworks(8), tmp_path, pruning)
    pruning = ChannelPruning(parameters=0.75, round_to=1, exclude=["encoder.conv"], budget={"classifier.*": 0.5})
    fit(TwoNetworks(8), tmp_path, pruning)
    assert pruning.widths["classifier.0"][1] >= 8
    assert pruning.left_alone["encoder.conv"] == "`exclude` names it"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"macs": 0.5, "parameters": 0.5}, "Give `macs` or `parameters`, got macs=0.5 and parameters=0.5."),
        ({"macs": 1.0}, r"`macs` is the share that remains, in \(0, 1\), got 1.0."),
        ({"parameters": 0.0}, r"`parameters` is the share that remains, in \(0, 1\), got 0.0."),
        (
            {"importance": "hessian"},
            "`importance` must be one of l1, l2, bn_scale, taylor, fpgm, random, got 'hessian'.",
        ),
        ({"scope": "lamp"}, '`scope` must be "global" or "layer", got \'lamp\'.'),
        ({"round_to": 0}, "`round_to` must be at least 1 channel, got 0."),
        ({"floor": 0.0}, r"`floor` is the least share of channels that stay, in \(0, 1\], got 0.0."),
        ({"budget": {"a": 2.0}}, r"`budget\['a'\]` is the least share of channels that stay, in \(0, 1\], got 2.0."),
        ({"update_every": 0}, "`update_every` must be at least 1 optimizer step, got 0."),
        ({"start": 0.6, "end": 0.5}, "`start` must not come after `end`, got start=0.6 and end=0.5."),
    ],
)
def test_arguments_out_of_range_are_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChannelPruning(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"macs": "half"}, "`macs` is the share that remains, a float, got str."),
        ({"round_to": 2.5}, "`round_to` is a number of channels, an int, got float."),
    ],
)
def test_arguments_of_another_type_are_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        ChannelPruning(**settings)


@pytest.mark.parametrize(("start", "quantized"), [(0.6, 0.5), (0.6, 4), (12, 0.1)])
def test_pruning_after_quantization_is_refused_with_the_reason(start: Any, quantized: Any, tmp_path: Path) -> None:
    pruning = (
        ChannelPruning(macs=0.5, start=start, end=type(start)(16))
        if isinstance(start, int)
        else ChannelPruning(macs=0.5, start=start, end=0.9)
    )
    with pytest.raises(ValueError, match="Prune first and quantize then: ranges and scales are found for the channels"):
        fit(LayersOnSelf(16), tmp_path, pruning, QuantizationAwareTraining(start=quantized))


def test_excluding_everything_is_refused(tmp_path: Path) -> None:
    message = r"`LayersOnSelf` has no channels that could be pruned \(`conv1`: `exclude` names it"
    with pytest.raises(CompressionError, match=message):
        fit(LayersOnSelf(16), tmp_path, ChannelPruning(exclude=["*"]))


def test_a_layer_that_another_network_uses_is_left_alone(tmp_path: Path) -> None:
    class Shared(NetWithKeywords):
        def __init__(self) -> None:
            super().__init__(16)
            self.critic = nn.Sequential(self.net.features[0], nn.Flatten())

    with pytest.raises(CompressionError, match="uses the layer too, which is another network"):
        fit(Shared(), tmp_path, ChannelPruning())


def test_two_of_them_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"more than one `ChannelPruning` callback\. Keep one of them\."):
        fit(LayersOnSelf(16), tmp_path, ChannelPruning(), ChannelPruning())


def test_a_run_that_ends_too_early_says_so(tmp_path: Path) -> None:
    message = (
        r"`ChannelPruning` had 0\.574 of the multiply-accumulates left, and 0\.500 was due after step 100\. "
        "Resume the run to finish, or choose earlier moments"
    )
    with pytest.warns(UserWarning, match=message):
        fit(LayersOnSelf(16), tmp_path, ChannelPruning(end=100))


def test_a_checkpoint_of_another_target_is_refused(tmp_path: Path) -> None:
    trainer = fit(LayersOnSelf(16), tmp_path, ChannelPruning(macs=0.5, round_to=4))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(CompressionError, match=r"The checkpoint was written with macs=0\.5, this run has macs=0\.7"):
        fit(
            LayersOnSelf(16),
            tmp_path,
            ChannelPruning(macs=0.7, round_to=4),
            ckpt_path=tmp_path / "last.ckpt",
            max_epochs=4,
        )
