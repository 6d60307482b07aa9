"""`FilterSharing` in real fits: filters draw together, are tied, stay tied, and survive what a run may meet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from lightning_compress import (
    ChannelPruning,
    Factorize,
    FilterSharing,
    KnowledgeDistillation,
    MagnitudePruning,
    OnnxExport,
    QuantizationAwareTraining,
    WeightClustering,
    compact,
    load_compressed_state,
)
from lightning_compress.decomposition.filter_groups import Grouping, Over, consecutive_groups, spread, stacked
from lightning_compress.errors import CompressionError
from tests.callbacks.decomposed import AVERAGES, IMAGES, AlikeWeights, fit, keep_all, kernel_shapes, macs, outputs
from tests.compatibility.runs import LIGHTNING_NOISE, outputs_of
from tests.user_modules import LayersOnSelf, ManualOptimization

pytestmark = [pytest.mark.filterwarnings(*LIGHTNING_NOISE)]

PAIRS = consecutive_groups(8, 2)


def gap(module: nn.Module, layer: str, over: Over = "inputs", groups: Any = PAIRS) -> float:
    return spread(module.get_parameter(f"{layer}.weight"), 1 if over == "inputs" else 0, stacked(groups))


class Watching(L.Callback):
    """Notes the gap between neighbours in `conv2` after each step."""

    def __init__(self) -> None:
        self.gaps: list[float] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.gaps.append(gap(pl_module, "conv2"))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.gaps.append(gap(pl_module, "conv2"))


class Still(LayersOnSelf):
    """Learns nothing, so that the pull alone moves the weights."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize("update_every", [None, 1, 4])
def test_the_gap_closes_on_the_schedule_however_often_it_is_pulled(update_every: int | None, tmp_path: Path) -> None:
    watching = Watching()
    sharing = FilterSharing(2, groups="consecutive", start=4, end=12, update_every=update_every)
    fit(tmp_path, sharing, watching, module=Still())
    relative = [found / watching.gaps[0] for found in watching.gaps]
    assert relative[:4] == [1.0] * 4
    assert relative[8] == pytest.approx(0.125, abs=1e-5)  # half of the way: (1 - 1/2) ** 3
    assert relative[12:] == [0.0] * 5


def test_learning_does_not_keep_filters_apart(tmp_path: Path) -> None:
    watching = Watching()
    fit(tmp_path, FilterSharing(2, groups="consecutive", end=0.5), watching)
    assert watching.gaps[8:] == [0.0] * 9
    assert 0.0 < watching.gaps[7] < 0.1 * watching.gaps[0]


@pytest.mark.parametrize(("over", "groups"), [("inputs", "similar"), ("inputs", "consecutive"), ("outputs", "similar")])
def test_the_small_module_and_the_file_compute_what_was_trained(over: Over, groups: Grouping, tmp_path: Path) -> None:
    sharing = FilterSharing(2, over=over, groups=groups)
    module = fit(tmp_path, sharing, OnnxExport(tmp_path / "model.onnx", latency=False))
    small, record = compact(module)
    assert list(record) == (["conv2", "fc"] if over == "inputs" else ["conv1", "conv2"])
    assert (record["conv2"]["groups"] == PAIRS) == (groups == "consecutive")
    torch.testing.assert_close(outputs(small), outputs(module), rtol=0, atol=1e-5)
    found = outputs_of(tmp_path / "model.onnx", IMAGES)
    torch.testing.assert_close(found, outputs(module), rtol=0, atol=1e-5)
    conv1, conv2, fc = 8 * 9 * 64, 8 * 8 * 9 * 64, 8 * 4
    assert macs(module) == conv1 + conv2 + fc
    if over == "inputs":
        assert macs(small) == conv1 + conv2 // 2 + fc // 2
        assert kernel_shapes(tmp_path / "model.onnx") == [(4, 4), (8, 1, 3, 3), (8, 4, 3, 3)]
    else:
        assert macs(small) == conv1 // 2 + conv2 // 2 + fc
        assert kernel_shapes(tmp_path / "model.onnx") == [(4, 1, 3, 3), (4, 8), (4, 8, 3, 3)]


def test_the_report_counts_what_is_written(tmp_path: Path) -> None:
    export = OnnxExport(tmp_path / "model.onnx", latency=False)
    module = fit(tmp_path, FilterSharing(2), export)
    assert export.report is not None
    assert export.report.statistics is not None
    assert export.report.statistics.macs == macs(compact(module).model) < macs(module)
    # 23,056 of 41,504, and 471 of 812
    assert export.report.notes[-1] == (
        "small layers: 55.6% of the multiply-accumulates and 58.0% of the parameters remain; fp32 is with the layers "
        "of full shape"
    )
    assert type(module.conv2) is nn.Conv2d  # the live module is left as it is


def test_a_last_group_may_be_smaller_and_sizes_may_differ(tmp_path: Path) -> None:
    sharing = FilterSharing(2, overrides={"conv2": 3})
    module = fit(tmp_path, sharing)
    assert sorted(len(group) for group in sharing.groups["conv2"]) == [2, 3, 3]
    assert sharing.left_alone == {"conv1": "has 1 inputs, fewer than two groups of 2"}
    torch.testing.assert_close(outputs(compact(module).model), outputs(module), rtol=0, atol=1e-5)


def adam(module: nn.Module) -> Any:
    return torch.optim.AdamW(module.parameters(), lr=0.01, weight_decay=0.1)


class WithAdam(LayersOnSelf):
    def configure_optimizers(self) -> Any:
        return adam(self)


def test_tied_filters_have_one_momentum(tmp_path: Path) -> None:
    class Looking(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            (optimizer,) = trainer.optimizers
            state = optimizer.state[pl_module.get_parameter("conv2.weight")]
            for name in ("exp_avg", "exp_avg_sq"):
                assert float(state[name].abs().max()) > 0
                assert spread(state[name], 1, stacked(PAIRS)) < 1e-6 * float(state[name].abs().max())

    module = fit(tmp_path, FilterSharing(groups="consecutive"), Looking(), module=WithAdam(), gradient_clip_val=0.5)
    assert gap(module, "conv2") == 0.0


def test_a_run_is_resumed_to_the_bit_and_the_groups_travel_with_the_weights(tmp_path: Path) -> None:
    def sharing() -> FilterSharing:
        return FilterSharing(2, start=1, end=13, update_every=3)

    whole = fit(tmp_path, sharing(), keep_all(tmp_path / "kept"), enable_checkpointing=True, max_epochs=3)
    for step in (8, 16):  # between two pulls, and tied
        resumed = fit(tmp_path, sharing(), max_epochs=3, ckpt=tmp_path / "kept" / f"step={step}.ckpt")
        torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)
    assert not LayersOnSelf.load_from_checkpoint(tmp_path / "kept" / "step=16.ckpt").state_dict().keys() ^ (
        whole.state_dict().keys()
    )
    loaded = load_compressed_state(LayersOnSelf(), tmp_path / "kept" / "step=16.ckpt")
    assert compact(loaded).record == compact(whole).record


@pytest.mark.parametrize("averaging", AVERAGES)
@pytest.mark.parametrize("comes_first", [True, False])
def test_averaged_weights_are_tied_too(averaging: str, comes_first: bool, tmp_path: Path) -> None:
    sharing, average = FilterSharing(groups="consecutive"), AVERAGES[averaging]()
    module = fit(tmp_path, *([sharing, average] if comes_first else [average, sharing]), max_epochs=4)
    assert gap(module, "conv2") == gap(module, "fc") == 0.0
    assert list(compact(module).record) == ["conv2", "fc"]


def test_manual_optimization_ties_filters_too(tmp_path: Path) -> None:
    module = fit(tmp_path, FilterSharing(groups="consecutive"), module=ManualOptimization())
    assert gap(module, "conv2") == 0.0


def test_two_processes_share_the_same_filters(tmp_path: Path) -> None:
    strategy = DDPStrategy(process_group_backend="gloo", start_method="spawn")
    module = fit(tmp_path, FilterSharing(), AlikeWeights(), strategy=strategy, devices=2)
    assert len(torch.unique(module.conv2.weight[0, :, 0, 0])) == 4


def test_half_precision_ties_filters_too(tmp_path: Path) -> None:
    module = fit(tmp_path, FilterSharing(groups="consecutive"), precision="bf16-mixed")
    assert gap(module, "conv2") == 0.0
    whole = fit(tmp_path, FilterSharing(groups="consecutive"), precision="bf16-true")
    assert gap(whole, "conv2") == 0.0


def test_tied_filters_are_rounded_alike_and_the_file_keeps_their_shape(tmp_path: Path) -> None:
    module = fit(
        tmp_path,
        FilterSharing(2, end=0.3),
        QuantizationAwareTraining(start=0.4),
        KnowledgeDistillation(LayersOnSelf(12)),
        export := OnnxExport(tmp_path / "model.onnx", latency=False),
    )
    assert kernel_shapes(tmp_path / "model.onnx") == [(4, 8), (8, 1, 3, 3), (8, 8, 3, 3)]
    torch.testing.assert_close(outputs_of(tmp_path / "model.onnx", IMAGES), outputs(module), rtol=0, atol=0.05)
    assert export.report is not None
    assert any("quantize `compact(model)` in a second fit" in note for note in export.report.notes)
    with pytest.raises(
        CompressionError,
        match=r"^`LayersOnSelf` is quantized, and small layers would round other values than those that were trained\. "
        r"Fit without `QuantizationAwareTraining`, take the small module by `compact\(model\)`, and quantize that in a "
        r"second fit\.$",
    ):
        compact(module)


def test_a_try_run_ties_and_writes_nothing(tmp_path: Path) -> None:
    sharing = FilterSharing(2)
    fit(tmp_path, sharing, OnnxExport(tmp_path / "model.onnx"), fast_dev_run=True)
    assert sharing.complete
    assert not (tmp_path / "model.onnx").exists()


def test_a_run_that_ends_early_tells_how_far_it_came(tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning,
        match=r"`FilterSharing` had closed 0\.\d{3} of the gap between the filters, which were to be tied after step "
        r"12\.",
    ):
        module = fit(tmp_path, FilterSharing(end=12), max_steps=8)
    with pytest.raises(
        CompressionError,
        match=r"^The layers of `LayersOnSelf` are not yet what small ones could stand for: the fit ended before the "
        r"`end` of `FilterSharing` or `Factorize`\. Resume it, or choose an earlier `end`\.$",
    ):
        compact(module)


def test_a_second_fit_without_the_callback_unties_them(tmp_path: Path) -> None:
    module = fit(tmp_path, FilterSharing(2))
    fit(tmp_path, export := OnnxExport(tmp_path / "model.onnx", latency=False), module=module)
    assert (8, 8, 3, 3) in kernel_shapes(tmp_path / "model.onnx")
    assert export.report is not None
    assert "2 layers are no longer shared or of a low rank, and have their full shape" in export.report.notes
    with pytest.raises(
        CompressionError,
        match=r"^The layers `conv2`, `fc` of `LayersOnSelf` are no longer shared or of a low rank: they were "
        r"replaced, trained on without `FilterSharing` or `Factorize`, or have become NaN\. Fit with the callback "
        r"again, from finite weights\.$",
    ):
        compact(module)


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"size": 1}, ValueError, r"^`size` is the number of channels that share a filter, at least 2, got 1\.$"),
        ({"size": 2.0}, TypeError, r"^`size` is a number of channels, an int, got float\.$"),
        ({"overrides": {"fc": True}}, TypeError, r"^`overrides\['fc'\]` is a number of channels, an int, got bool\.$"),
        ({"over": "both"}, ValueError, r"^`over` must be one of inputs, outputs, got 'both'\.$"),
        ({"groups": "random"}, ValueError, r"^`groups` must be one of similar, consecutive, got 'random'\.$"),
        ({"start": 0.6, "end": 0.5}, ValueError, "^`start` must not come after `end`"),
    ],
)
def test_bad_settings(settings: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        FilterSharing(**settings)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (MagnitudePruning(0.5), "single zeros would not last in weights that are tied or of low rank"),
        (ChannelPruning(0.5), "the channels that one removes are among those that the other replaces"),
        (WeightClustering(4), "the values that weights share would be moved apart again"),
        (Factorize(0.5), "each would undo the form that the other gives to the weights"),
    ],
)
def test_what_contradicts_it_is_refused_before_the_training(other: Any, reason: str, tmp_path: Path) -> None:
    name = type(other).__name__
    with pytest.raises(
        CompressionError,
        match=rf"^`FilterSharing` and `{name}` do not work in one fit: {reason}\. Fit with `FilterSharing`, take the "
        rf"small module by `compact\(model\)`, and use `{name}` in a second fit on it; or leave one of them out\.$",
    ):
        fit(tmp_path, FilterSharing(2), other)


def test_layers_that_cannot_share_are_told_before_the_training(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"^`overrides` names `conv1`, which `FilterSharing` cannot replace: it has 1 inputs, fewer than two "
        r"groups of 4\. Take it out of `overrides`\.$",
    ):
        fit(tmp_path, FilterSharing(2, overrides={"conv1": 4}))
    with pytest.raises(
        CompressionError,
        match=r"^`LayersOnSelf` has no layer that `FilterSharing` could replace \(`conv1` has 1 inputs, fewer than two "
        r"groups of 2\)\. Exclude fewer, or leave `FilterSharing` out\.$",
    ):
        fit(tmp_path, FilterSharing(2, exclude=["conv2", "fc"]))


def test_another_run_does_not_go_on_with_the_groups(tmp_path: Path) -> None:
    fit(tmp_path, FilterSharing(2), keep_all(tmp_path / "kept"), enable_checkpointing=True, max_steps=8)
    with pytest.raises(CompressionError, match=r"was written with size=2, this run has size=4\."):
        fit(tmp_path, FilterSharing(4), ckpt=tmp_path / "kept" / "step=8.ckpt")
