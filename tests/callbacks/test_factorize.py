"""`Factorize` in real fits: ranks fall, are held, and the two layers compute what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
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
from lightning_compress.decomposition.low_rank import Scheme, as_matrix
from lightning_compress.errors import CompressionError
from tests.callbacks.decomposed import AVERAGES, IMAGES, AlikeWeights, fit, keep_all, kernel_shapes, macs, outputs
from tests.compatibility.runs import LIGHTNING_NOISE, outputs_of
from tests.user_modules import LayersOnSelf, ManualOptimization

pytestmark = [pytest.mark.filterwarnings(*LIGHTNING_NOISE)]


def rank(module: nn.Module, layer: str = "conv2", scheme: Scheme = "channel") -> int:
    matrix = as_matrix(module.get_parameter(f"{layer}.weight").detach(), scheme)
    return int(torch.linalg.matrix_rank(matrix, rtol=1e-5))


class Watching(L.Callback):
    """Notes the rank of `conv2` after each step."""

    def __init__(self) -> None:
        self.ranks: list[int] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.ranks.append(rank(pl_module))


def test_the_rank_falls_on_the_schedule_and_is_held_at_every_step(tmp_path: Path) -> None:
    watching, factors = Watching(), Factorize(2, layers=["conv2"], start=4, end=12, update_every=2)
    fit(tmp_path, factors, watching)
    # From 8 to 2: 2 + 6 (1 - t)**3 at t = 0, 1/4, 1/2, 3/4, 1, the value held for two steps each.
    assert watching.ranks == [8] * 5 + [5] * 2 + [3] * 2 + [2] * 7
    assert factors.ranks == {"conv2": (8, 2)}
    assert factors.complete


class Still(LayersOnSelf):
    """Learns nothing, so that the fall of the rank alone changes the weights."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_without_learning_it_ends_at_the_singular_value_decomposition(tmp_path: Path) -> None:
    torch.manual_seed(0)
    matrix = LayersOnSelf().conv2.weight.detach().flatten(1).double()
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    module = fit(tmp_path, Factorize(3, layers=["conv2"]), module=seeded(Still))
    expected = ((left[:, :3] * values[:3]) @ right[:3]).float().view(8, 8, 3, 3)
    torch.testing.assert_close(module.conv2.weight.detach(), expected, rtol=1e-4, atol=1e-6)


def seeded(kind: Any) -> Any:
    torch.manual_seed(0)
    return kind()


@pytest.mark.parametrize(
    ("scheme", "kernels"),
    [("channel", [(2, 8, 3, 3), (8, 2, 1, 1)]), ("spatial", [(2, 8, 3, 1), (8, 2, 1, 3)])],
)
def test_the_small_module_and_the_file_compute_what_was_trained(
    scheme: Scheme, kernels: list[tuple[int, ...]], tmp_path: Path
) -> None:
    factors = Factorize(2, scheme=scheme, exclude=["conv1"], overrides={"fc": 1})
    export = OnnxExport(tmp_path / "model.onnx", latency=False)
    module = fit(tmp_path, factors, export)
    small, record = compact(module)
    assert record == {"conv2": {"scheme": scheme, "rank": 2}, "fc": {"scheme": "channel", "rank": 1}}
    assert rank(module, scheme=scheme) == 2
    torch.testing.assert_close(outputs(small), outputs(module), rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs_of(tmp_path / "model.onnx", IMAGES), outputs(module), rtol=0, atol=1e-5)
    assert kernel_shapes(tmp_path / "model.onnx") == sorted([*kernels, (8, 1, 3, 3)])  # and two vectors
    per_pixel = sum(torch.Size(shape).numel() for shape in kernels)
    assert macs(small) == 8 * 9 * 64 + per_pixel * 64 + 8 + 4
    assert export.report is not None
    assert export.report.statistics is not None
    assert export.report.statistics.macs == macs(small) < macs(module)


def test_layers_are_chosen_by_pattern_and_ranks_by_layer(tmp_path: Path) -> None:
    factors = Factorize(4, layers=["conv*"], overrides={"conv2": 1}, scheme="spatial")
    module = fit(tmp_path, factors, KnowledgeDistillation(LayersOnSelf(12)))
    assert factors.ranks == {"conv2": (24, 1)}
    # 4 * (1 * 3 + 8 * 3) for 8 * 9
    assert factors.left_alone == {"conv1": "costs no more multiply-accumulates than two factors of rank 4"}
    assert rank(module, scheme="spatial") == 1


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
def test_a_share_is_one_of_the_channels_where_there_are_enough(scheme: Scheme, tmp_path: Path) -> None:
    factors = Factorize(0.25, scheme=scheme)
    module = fit(tmp_path, factors, module=LayersOnSelf(16))
    assert factors.ranks == {"conv2": (16 if scheme == "channel" else 48, 4)}
    assert factors.left_alone == {
        "conv1": "has 9 channels, too few for a share of them",
        "fc": "has 4 channels, too few for a share of them",
    }
    assert rank(module, scheme=scheme) == 4


def test_a_run_is_resumed_to_the_bit_and_the_ranks_travel_with_the_weights(tmp_path: Path) -> None:
    def factors() -> Factorize:
        return Factorize(2, start=1, end=13, update_every=3)

    whole = fit(tmp_path, factors(), keep_all(tmp_path / "kept"), enable_checkpointing=True, max_epochs=3)
    for step in (8, 16):  # between two falls, and held
        resumed = fit(tmp_path, factors(), max_epochs=3, ckpt=tmp_path / "kept" / f"step={step}.ckpt")
        torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)
    plain = LayersOnSelf.load_from_checkpoint(tmp_path / "kept" / "step=16.ckpt")
    assert rank(plain) == 2
    loaded = load_compressed_state(LayersOnSelf(), tmp_path / "kept" / "step=16.ckpt")
    torch.testing.assert_close(outputs(compact(loaded).model), outputs(plain), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("averaging", "comes_first"),
    [("WeightAveraging", True), ("WeightAveraging", False), ("StochasticWeightAveraging", True)],
)
def test_averaged_weights_are_of_the_rank_too(averaging: str, comes_first: bool, tmp_path: Path) -> None:
    factors, average = Factorize(2), AVERAGES[averaging]()
    best = ModelCheckpoint(tmp_path / "kept", monitor="val_loss")
    export = OnnxExport(tmp_path / "model.onnx", weights="best", latency=False)
    ordered = [factors, average] if comes_first else [average, factors]
    module = fit(tmp_path, *ordered, best, export, max_epochs=4, enable_checkpointing=True)
    assert (2, 8, 3, 3) in kernel_shapes(tmp_path / "model.onnx")
    assert (rank(module), rank(module, "fc")) == (2, 2)
    assert list(compact(module).record) == ["conv1", "conv2", "fc"]


def test_manual_optimization_holds_the_rank_too(tmp_path: Path) -> None:
    watching = Watching()
    fit(tmp_path, Factorize(2, end=8), watching, module=seeded(ManualOptimization))
    assert watching.ranks[8:] == [2] * 8


def test_two_processes_end_at_the_same_rank(tmp_path: Path) -> None:
    strategy = DDPStrategy(process_group_backend="gloo", start_method="spawn")
    module = fit(tmp_path, Factorize(2), AlikeWeights(), strategy=strategy, devices=2)
    assert (rank(module), rank(module, "fc")) == (2, 2)


class WithAdam(LayersOnSelf):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)


def test_adam_in_mixed_precision_holds_the_rank(tmp_path: Path) -> None:
    watching = Watching()
    fit(tmp_path, Factorize(2, end=8), watching, module=seeded(WithAdam), precision="bf16-mixed")
    assert watching.ranks[8:] == [2] * 8


def test_weights_of_half_precision_are_refused_before_a_step(tmp_path: Path) -> None:
    with pytest.raises(
        CompressionError,
        match=r"^The weight of layer `conv1` is torch\.bfloat16, in which no low rank can be held\. Train with "
        r'`precision="bf16-mixed"` or "16-mixed", which keep weights in float32\.$',
    ):
        fit(tmp_path, Factorize(2), precision="bf16-true")


def test_a_try_run_reaches_the_rank_and_writes_nothing(tmp_path: Path) -> None:
    factors = Factorize(2)
    module = fit(tmp_path, factors, OnnxExport(tmp_path / "model.onnx"), fast_dev_run=True)
    assert factors.complete
    assert rank(module) == 2
    assert not (tmp_path / "model.onnx").exists()


def test_a_run_that_ends_early_writes_the_full_shape(tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"`Factorize` was at 0\.\d{3} of the full ranks, and 0\.300 was due after step 12"
    ):
        fit(tmp_path, Factorize(2, end=12), OnnxExport(tmp_path / "model.onnx", latency=False), max_steps=8)
    assert (8, 8, 3, 3) in kernel_shapes(tmp_path / "model.incomplete.onnx")


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"rank": 1.0}, ValueError, r"^`rank` as a float is a share of a layer's channels, in \(0, 1\), got 1\.0\."),
        ({"rank": 0}, ValueError, r"^`rank` as a number is at least 1, got 0\.$"),
        (
            {"rank": "8"},
            TypeError,
            r"^`rank` is a share of a layer's channels \(float\) or a number \(int\), got str\.$",
        ),
        ({"overrides": {"fc": 0}}, ValueError, r"^`overrides\['fc'\]` as a number is at least 1, got 0\.$"),
        ({"scheme": "cp"}, ValueError, r"^`scheme` must be one of channel, spatial, got 'cp'\.$"),
        ({"end": 1.5}, ValueError, "^`end` as a float is a share of the run"),
    ],
)
def test_bad_settings(settings: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        Factorize(**settings)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (MagnitudePruning(0.5), "single zeros would not last in weights that are tied or of low rank"),
        (ChannelPruning(0.5), "the channels that one removes are among those that the other replaces"),
        (WeightClustering(4), "the values that weights share would be moved apart again"),
        (
            QuantizationAwareTraining(),
            "a rounded weight is of full rank, and what training would round is not its factors",
        ),
        (FilterSharing(2), "each would undo the form that the other gives to the weights"),
    ],
)
def test_what_contradicts_it_is_refused_before_the_training(other: Any, reason: str, tmp_path: Path) -> None:
    name = type(other).__name__
    with pytest.raises(
        CompressionError,
        match=rf"^`Factorize` and `{name}` do not work in one fit: {reason}\. Fit with `Factorize`, take the small "
        rf"module by `compact\(model\)`, and use `{name}` in a second fit on it; or leave one of them out\.$",
    ):
        fit(tmp_path, Factorize(0.5), other)


class Grouped(LayersOnSelf):
    def __init__(self) -> None:
        super().__init__()
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=2)


def test_layers_that_have_no_factors_are_told_before_the_training(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"^`layers` names `conv2`, which `Factorize` cannot replace: it is a grouped convolution\. Take it out "
        r"of `layers`\.$",
    ):
        fit(tmp_path, Factorize(2, layers=["conv2"]), module=Grouped())
    with pytest.raises(
        ValueError,
        match=r"^`overrides` names `conv2`, which `Factorize` cannot replace: it costs no more "
        r"multiply-accumulates than two factors of rank 8\. Take it out of `overrides`\.$",
    ):
        fit(tmp_path, Factorize(2, overrides={"conv2": 8}))
    with pytest.raises(ValueError, match=r"^`layers` pattern 'head' matches no layer\. The layers are: `conv1`, "):
        fit(tmp_path, Factorize(0.5, layers=["head"]))
    with pytest.raises(
        CompressionError,
        match=r"^`LayersOnSelf` has no layer that `Factorize` could replace \(`conv1` costs no more .*\)\. Ask for a "
        r"smaller `rank`, or leave `Factorize` out\.$",
    ):
        fit(tmp_path, Factorize(100))


def test_another_run_does_not_go_on_with_the_ranks(tmp_path: Path) -> None:
    fit(tmp_path, Factorize(2), keep_all(tmp_path / "kept"), enable_checkpointing=True, max_epochs=1)
    with pytest.raises(CompressionError, match=r"was written with rank=2, this run has rank=3\."):
        fit(tmp_path, Factorize(3), ckpt=tmp_path / "kept" / "step=8.ckpt")


def test_weights_that_diverged_are_told(tmp_path: Path) -> None:
    module = LayersOnSelf()
    module.conv2.weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(
        CompressionError,
        match=r"^The weight of layer `conv2` holds NaN or infinite values, which cannot be factorised\.$",
    ):
        fit(tmp_path, Factorize(2), module=module)
