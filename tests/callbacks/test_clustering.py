"""`WeightClustering` in real fits: shared weights are trained as one, stay one, and survive what a run may meet."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_avg_fn

from lightning_compress import (
    Archive,
    ChannelPruning,
    MagnitudePruning,
    OnnxExport,
    QuantizationAwareTraining,
    RunReport,
    WeightClustering,
    load_compressed,
    load_compressed_state,
)
from lightning_compress.clustering import kmeans
from lightning_compress.errors import CompressionError
from tests.compatibility.runs import LIGHTNING_NOISE, outputs_of
from tests.training import quiet_trainer
from tests.user_modules import Images, LayersOnSelf, loader

pytestmark = [pytest.mark.filterwarnings(*LIGHTNING_NOISE)]

LAYERS = ("conv1", "conv2", "fc")


def values(module: nn.Module, layer: str) -> Tensor:
    found: Tensor = torch.unique(module.get_parameter(f"{layer}.weight").detach())
    return found


def fit(
    folder: Path, *callbacks: L.Callback, module: Any = None, data: Any = None, ckpt: Any = None, **settings: Any
) -> Any:
    torch.manual_seed(0)
    module = LayersOnSelf() if module is None else module
    trainer = quiet_trainer(folder, callbacks, **settings)
    trainer.fit(module, loader() if data is None else data, loader(16, seed=1), ckpt_path=ckpt)
    return module


class Watching(L.Callback):
    """Counts the values of every layer after each step."""

    def __init__(self) -> None:
        self.counts: list[tuple[int, ...]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.counts.append(tuple(len(values(pl_module, layer)) for layer in LAYERS))


def adam(module: LayersOnSelf) -> Any:
    return torch.optim.AdamW(module.parameters(), lr=0.01, weight_decay=0.1)


def nesterov(module: LayersOnSelf) -> Any:
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01)


class OtherOptimizer(LayersOnSelf):
    def __init__(self, make: Callable[[Any], Any]) -> None:
        super().__init__()
        self.make = make

    def configure_optimizers(self) -> Any:
        return self.make(self)


@pytest.mark.parametrize("make", [adam, nesterov])
def test_from_start_on_every_layer_has_so_many_values(make: Any, tmp_path: Path) -> None:
    watching = Watching()
    clustering = WeightClustering(4, start=0.5, overrides={"conv2": 16})
    # The watcher comes after the clustering, as the exporter would.
    fit(tmp_path, clustering, watching, module=OtherOptimizer(make), gradient_clip_val=0.5)
    assert all(min(counts) > 30 for counts in watching.counts[:7])
    assert all(counts == (4, 16, 4) for counts in watching.counts[7:])
    assert clustering.complete
    assert clustering.n_values == {"conv1": 4, "conv2": 16, "fc": 4}


class Centroids(L.LightningModule):
    """The same training by hand: the weights are made of centroids, which are the parameters."""

    def __init__(self, module: LayersOnSelf, n_clusters: int) -> None:
        super().__init__()
        self.module = module
        self.codes: dict[str, Tensor] = {}
        self.centroids = nn.ParameterDict()
        for layer in LAYERS:
            found = kmeans(module.get_parameter(f"{layer}.weight"), n_clusters)
            self.codes[layer] = found.codes
            self.centroids[layer] = nn.Parameter(found.centroids.float())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        made = {f"{layer}.weight": self.centroids[layer][self.codes[layer]] for layer in LAYERS}
        logits = torch.func.functional_call(self.module, made, (batch["image"],))
        return F.cross_entropy(logits, batch["label"])

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        others = [p for name, p in self.module.named_parameters() if name.removesuffix(".weight") not in LAYERS]
        return torch.optim.SGD([*self.centroids.values(), *others], lr=1e-3, momentum=0.9)


def slow_sgd(module: LayersOnSelf) -> Any:
    return torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9)


def test_the_sum_of_gradients_is_what_centroids_as_parameters_would_learn_from(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours = OtherOptimizer(slow_sgd)
    by_hand = LayersOnSelf()
    by_hand.load_state_dict(ours.state_dict())
    reference = Centroids(by_hand, 8)
    fit(tmp_path, WeightClustering(8, start=0, gradient="sum"), module=ours)
    fit(tmp_path, module=reference)
    for layer in LAYERS:
        expected = reference.centroids[layer][reference.codes[layer]]
        torch.testing.assert_close(ours.get_parameter(f"{layer}.weight"), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("comes_first", [True, False])
def test_zeros_of_pruning_stay_and_take_no_value(comes_first: bool, tmp_path: Path) -> None:
    pruning, clustering = MagnitudePruning(0.8, end=0.5), WeightClustering(8, start=0.5)
    module = fit(tmp_path, *((clustering, pruning) if comes_first else (pruning, clustering)), max_epochs=3)
    assert pruning.counted_sparsity(module) == pytest.approx(0.8, abs=1e-3)
    assert all(count <= 8 for count in clustering.n_values.values())
    assert len(values(module, "conv2")) == 9


def test_a_run_that_clusters_as_another_ends_is_resumed_to_the_bit(tmp_path: Path) -> None:
    def callbacks() -> list[L.Callback]:  # the clustering comes first, and must wait for the last zeros
        return [WeightClustering(8, start=8), MagnitudePruning(0.5, end=8)]

    kept = WatchingCheckpoint(tmp_path / "kept")
    whole = fit(tmp_path, *callbacks(), kept, enable_checkpointing=True)
    resumed = fit(tmp_path, *callbacks(), ckpt=tmp_path / "kept" / "step=8.ckpt")
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)
    last = WeightClustering(8, start=1.0)
    fit(tmp_path, last, MagnitudePruning(0.5, end=1.0))
    assert last.complete


def test_a_run_is_resumed_to_the_bit_and_the_codes_travel_with_the_weights(tmp_path: Path) -> None:
    def callbacks() -> list[L.Callback]:
        return [MagnitudePruning(0.5, end=0.3), WeightClustering(8, start=0.4)]

    kept = WatchingCheckpoint(tmp_path / "kept")
    whole = fit(tmp_path, *callbacks(), kept, max_epochs=3, enable_checkpointing=True)
    for step in (8, 16):  # before it clusters, and after
        checkpoint = tmp_path / "kept" / f"step={step}.ckpt"
        resumed = fit(tmp_path, *callbacks(), max_epochs=3, ckpt=checkpoint)
        torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)
    plain = LayersOnSelf.load_from_checkpoint(tmp_path / "kept" / "step=16.ckpt")
    assert len(values(plain, "conv2")) == 9
    again = LayersOnSelf()
    load_compressed_state(again, tmp_path / "kept" / "step=16.ckpt")
    assert len(values(again, "conv2")) == 9


class WatchingCheckpoint(ModelCheckpoint):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder, filename="{step}", save_top_k=-1, every_n_epochs=1, enable_version_counter=False)


def test_averaged_weights_are_shared_too(tmp_path: Path) -> None:
    averaging = WeightAveraging(avg_fn=get_ema_avg_fn(0.9))  # type: ignore[no-untyped-call]
    module = fit(tmp_path, WeightClustering(8, start=0.5), averaging)
    assert [len(values(module, layer)) for layer in LAYERS] == [8, 8, 8]


def test_two_processes_share_the_same_weights(tmp_path: Path) -> None:
    from lightning.pytorch.strategies import DDPStrategy

    strategy = DDPStrategy(process_group_backend="gloo", start_method="spawn")
    module = fit(tmp_path, WeightClustering(8, start=0.5), strategy=strategy, devices=2)
    assert [len(values(module, layer)) for layer in LAYERS] == [8, 8, 8]


@pytest.mark.parametrize("weight_bits", [8, 4])
def test_the_file_and_the_archive_are_what_the_network_computes(weight_bits: int, tmp_path: Path) -> None:
    archive = Archive(tmp_path / "model.lcz")  # which comes last, and yet is in the report
    module = fit(
        tmp_path,
        MagnitudePruning(0.6, end=0.3),
        WeightClustering(8, start=0.3),
        QuantizationAwareTraining(start=0.5, weight_bits=weight_bits),
        OnnxExport(tmp_path / "model.onnx", latency=False),
        archive,
        max_epochs=3,
    )
    images = Images(32, seed=3).images
    with torch.no_grad():
        expected = module.eval()(images)
    torch.testing.assert_close(outputs_of(tmp_path / "model.onnx", images), expected, rtol=0, atol=0.05)
    fresh = LayersOnSelf()
    load_compressed(tmp_path / "model.lcz", fresh)
    assert archive.size is not None
    assert archive.size.ratio > 2
    assert len(values(fresh, "conv2")) > 1
    report = RunReport.from_dict(json.loads((tmp_path / "report.json").read_text()))
    assert report.archive == archive.summary
    assert report.archive is not None
    told = {tensor.name: tensor for tensor in report.archive.tensors}["conv2.weight"]
    assert told.codebook == tuple(values(fresh, "conv2")[values(fresh, "conv2") != 0].tolist())
    assert told.entries * told.coded == {one.name: one for one in archive.size.tensors}["conv2.weight"].coded_bits
    assert f"{report.archive.bits('coded'):.2f}" in report.to_text()
    assert json.loads((tmp_path / "model.lcz.json").read_text())["file_bytes"] == archive.size.file_bytes
    assert (tmp_path / "model.lcz.png").read_bytes()[:4] == b"\x89PNG"


def test_a_float_network_comes_back_from_its_archive_to_the_bit(tmp_path: Path, capsys: Any) -> None:
    archive = Archive(tmp_path / "model.lcz", weights="best")
    best = ModelCheckpoint(tmp_path / "kept", monitor="val_loss")
    module = fit(tmp_path, WeightClustering(8, start=0.2), archive, best, enable_checkpointing=True, max_epochs=3)
    fresh = LayersOnSelf()
    load_compressed(tmp_path / "model.lcz", fresh)
    kept = LayersOnSelf.load_from_checkpoint(best.best_model_path)
    torch.testing.assert_close(fresh.state_dict(), kept.state_dict(), rtol=0, atol=0)
    assert len(values(module, "conv2")) == 8
    assert "times smaller; the entropy bound is" in capsys.readouterr().out


def test_masked_channels_are_left_out_of_the_archive(tmp_path: Path) -> None:
    module = fit(tmp_path, ChannelPruning(0.5, round_to=1), Archive(tmp_path / "model.lcz"), max_epochs=3)
    fresh = LayersOnSelf()
    load_compressed(tmp_path / "model.lcz", fresh)
    assert fresh.conv1.out_channels < 8
    images = Images(16, seed=3).images
    torch.testing.assert_close(fresh.eval()(images), module.eval()(images), rtol=1e-4, atol=1e-5)


def test_a_run_that_ends_early_marks_its_archive(tmp_path: Path) -> None:
    (tmp_path / "model.lcz").write_text("of an earlier run")
    with pytest.warns(UserWarning, match=r"`WeightClustering` left the weights as they are, as they were due after"):
        fit(tmp_path, WeightClustering(8, start=12), Archive(tmp_path / "model.lcz"), max_steps=8)
    assert (tmp_path / "model.lcz").read_text() == "of an earlier run"
    assert load_compressed(tmp_path / "model.incomplete.lcz").keys() == LayersOnSelf().state_dict().keys()


def test_a_failed_archive_loses_no_weights(tmp_path: Path) -> None:
    class Filling(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            (tmp_path / "model.lcz").unlink(missing_ok=True)
            (tmp_path / "model.lcz").mkdir()

    with pytest.raises(OSError, match=r"model\.lcz"), pytest.warns(UserWarning, match="weights are kept in"):
        fit(tmp_path, Archive(tmp_path / "model.lcz"), Filling())
    assert LayersOnSelf.load_from_checkpoint(tmp_path / "model.lcz.ckpt").state_dict()


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"n_clusters": 1}, ValueError, "`n_clusters` is a number of clusters, 2 to 4096, got 1"),
        ({"n_clusters": 2.0}, TypeError, "`n_clusters` is a number of clusters, an int, got float"),
        ({"overrides": {"fc": 5000}}, ValueError, "`fc` is a number of clusters, 2 to 4096, got 5000"),
        ({"per": "row"}, ValueError, "`per` must be one of layer, channel, group, got 'row'"),
        ({"init": "best"}, ValueError, r"`init` must be one of linear, density, random, kmeans\+\+, got 'best'"),
        ({"gradient": "max"}, ValueError, "`gradient` must be one of mean, sum, got 'max'"),
        ({"group_size": 0}, ValueError, "`group_size` must be at least 1 output channel, got 0"),
        ({"start": 1.5}, ValueError, "`start` as a float is a share of the run"),
    ],
)
def test_bad_settings(settings: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        WeightClustering(**settings)


def test_what_cannot_be_clustered_is_told_before_the_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Layer `fc` has 32 weights in a codebook, fewer than the 64 clusters"):
        fit(tmp_path, WeightClustering(64))
    with pytest.raises(ValueError, match="`overrides` pattern 'head' matches no layer"):
        fit(tmp_path, WeightClustering(8, overrides={"head": 4}))
    with pytest.raises(CompressionError, match="has no convolution or linear layer to cluster"):
        fit(tmp_path, WeightClustering(8, exclude=["conv*", "fc"]))
    with pytest.raises(
        ValueError, match=r"before `MagnitudePruning` has made its last zeros .*`WeightClustering\(start=0.6\)`"
    ):
        fit(tmp_path, MagnitudePruning(0.5, end=0.6), WeightClustering(8, start=0.5))


def test_what_an_archive_cannot_hold_is_told_before_the_training(tmp_path: Path) -> None:
    class WithExtra(LayersOnSelf):
        def get_extra_state(self) -> Any:
            return {"a": 1}

        def set_extra_state(self, state: Any) -> None:
            pass

    module = WithExtra()
    before = {name: tensor.clone() for name, tensor in module.named_parameters()}
    with pytest.raises(ValueError, match="`_extra_state` is no tensor but dict, which an archive cannot hold"):
        fit(tmp_path, Archive(tmp_path / "model.lcz"), module=module)
    torch.testing.assert_close(dict(module.named_parameters()), before, rtol=0, atol=0)


def test_another_run_does_not_go_on_with_the_codes(tmp_path: Path) -> None:
    kept = WatchingCheckpoint(tmp_path / "kept")
    fit(tmp_path, WeightClustering(8, start=0.2), kept, enable_checkpointing=True)
    with pytest.raises(CompressionError, match="was written with n_clusters=8, this run has n_clusters=4"):
        fit(tmp_path, WeightClustering(4, start=0.2), ckpt=tmp_path / "kept" / "step=8.ckpt")
    with pytest.raises(ValueError, match=r'`weights` must be "last" or "best"'):
        Archive("x", weights="first")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`coders` must be some of fixed, huffman, ans, got \['zip'\]"):
        Archive("x", coders=["zip"])  # type: ignore[list-item]


def test_infinite_values_are_archived_and_drawn(tmp_path: Path) -> None:
    class Masked(LayersOnSelf):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.randn(20, 20).masked_fill(torch.eye(20, dtype=torch.bool), -torch.inf))
            self.register_buffer("mask", torch.zeros(4, 4).masked_fill(torch.eye(4, dtype=torch.bool), -torch.inf))

    fit(tmp_path, Archive(tmp_path / "model.lcz"), module=Masked())
    table = json.loads((tmp_path / "model.lcz.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert [row["codebook"] for row in table["tensors"] if row["name"] == "mask"] == [["-inf"]]
    assert (tmp_path / "model.lcz.png").exists()
