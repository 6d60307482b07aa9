"""`compact` and `compact_like`: an ordinary module that saves, trains on, is quantized and is made again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_compress import (
    Archive,
    ChannelPruning,
    Factorize,
    FilterSharing,
    MagnitudePruning,
    OnnxExport,
    QuantizationAwareTraining,
    compact,
    compact_like,
    load_compressed,
    load_compressed_state,
    save_compressed,
)
from lightning_compress.callbacks.compacting import check_compacted, compact_record
from lightning_compress.errors import CompressionError
from tests.callbacks.decomposed import IMAGES, fit, kernel_shapes, macs, outputs
from tests.compatibility.runs import LIGHTNING_NOISE, outputs_of
from tests.user_modules import LayersOnSelf, NetWithKeywords, TwoNetworks

pytestmark = [pytest.mark.filterwarnings(*LIGHTNING_NOISE)]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return fit(tmp_path_factory.mktemp("shared"), FilterSharing(2))


@pytest.fixture(scope="module")
def factorised(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return fit(tmp_path_factory.mktemp("factorised"), Factorize(2))


@pytest.mark.parametrize("kind", ["shared", "factorised"])
def test_a_fresh_model_takes_the_weights_by_the_record(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    module = request.getfixturevalue(kind)
    small, record = compact(module)
    torch.save(small.state_dict(), tmp_path / "small.pt")
    (tmp_path / "record.json").write_text(json.dumps(record))
    again = compact_like(LayersOnSelf(), json.loads((tmp_path / "record.json").read_text()))
    again.load_state_dict(torch.load(tmp_path / "small.pt", weights_only=True))
    torch.testing.assert_close(outputs(again), outputs(small), rtol=0, atol=0)
    assert macs(again) == macs(small) < macs(module)
    n_parameters = [sum(parameter.numel() for parameter in one.parameters()) for one in (again, module)]
    assert n_parameters[0] < n_parameters[1]


@pytest.mark.parametrize("kind", ["shared", "factorised"])
def test_the_small_module_trains_on_and_is_quantized_in_a_second_fit(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    small, _ = compact(request.getfixturevalue(kind))
    before = [parameter.detach().clone() for parameter in small.parameters()]
    export = OnnxExport(tmp_path / "model.onnx", latency=False)
    fit(tmp_path, QuantizationAwareTraining(start=0.3), export, module=small)
    assert all(not torch.equal(one, other) for one, other in zip(before, small.parameters(), strict=True))
    torch.testing.assert_close(outputs_of(tmp_path / "model.onnx", IMAGES), outputs(small), rtol=0, atol=0.05)
    expected = (8, 4, 3, 3) if kind == "shared" else (2, 8, 3, 3)
    assert expected in kernel_shapes(tmp_path / "model.onnx")
    assert (8, 8, 3, 3) not in kernel_shapes(tmp_path / "model.onnx")


def test_the_small_module_is_pruned_in_a_second_fit(factorised: Any, tmp_path: Path) -> None:
    small, _ = compact(factorised)
    fit(tmp_path, MagnitudePruning(0.5), module=small)
    weights = [parameter for parameter in small.parameters() if parameter.dim() > 1]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    assert zeros == round(0.5 * sum(weight.numel() for weight in weights))


def test_the_small_module_loses_channels_in_a_second_fit(factorised: Any, tmp_path: Path) -> None:
    small, _ = compact(factorised)
    pruning = ChannelPruning(0.6, round_to=1)
    export = OnnxExport(tmp_path / "model.onnx", latency=False)
    fit(tmp_path, pruning, export, module=small)
    torch.testing.assert_close(outputs_of(tmp_path / "model.onnx", IMAGES), outputs(small), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("kind", "callback"), [(NetWithKeywords, FilterSharing), (TwoNetworks, Factorize)])
def test_layers_of_inner_networks_are_replaced(kind: Any, callback: Any, tmp_path: Path) -> None:
    export = OnnxExport(tmp_path / "model.onnx", latency=False)
    module = fit(tmp_path, callback(2), export, module=kind())
    small, record = compact(module)
    assert record
    assert all("." in name for name in record)
    torch.testing.assert_close(outputs(small), outputs(module), rtol=0, atol=1e-5)
    assert export.report is not None
    assert any(note.startswith("small layers: ") for note in export.report.notes)


def test_an_archive_of_the_small_module_comes_back(factorised: Any, tmp_path: Path) -> None:
    small, record = compact(factorised)
    save_compressed(small, tmp_path / "small.lcz")
    again = compact_like(LayersOnSelf(), record)
    load_compressed(tmp_path / "small.lcz", again)
    torch.testing.assert_close(outputs(again), outputs(small), rtol=0, atol=0)


@pytest.mark.parametrize("callback", [Factorize(2), FilterSharing(2), FilterSharing(2, over="outputs")])
def test_an_archive_in_the_fit_holds_small_layers_and_makes_those_of_a_fresh_module(
    callback: L.Callback, tmp_path: Path
) -> None:
    module = fit(tmp_path, callback, Archive(tmp_path / "model.lcz"))
    small, _ = compact(module)
    weights = load_compressed(tmp_path / "model.lcz", fresh := LayersOnSelf())
    torch.testing.assert_close(weights, dict(small.state_dict()), rtol=0, atol=0)
    torch.testing.assert_close(outputs(fresh), outputs(small), rtol=0, atol=0)


def test_an_archive_of_a_quantized_module_with_shared_filters_holds_the_full_shape(tmp_path: Path) -> None:
    rounding = QuantizationAwareTraining(start=0.6)
    fit(tmp_path, FilterSharing(2), rounding, Archive(tmp_path / "model.lcz"))
    weights = load_compressed(tmp_path / "model.lcz", LayersOnSelf())
    assert weights["conv2.weight"].shape == LayersOnSelf().conv2.weight.shape


def weight_sum(module: Any) -> Any:
    return module.fc.weight.sum()


class ReadsWeight(LayersOnSelf):
    """Uses a layer's weight in a function, which nobody looks into before the training."""

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = super().forward(image) + weight_sum(self)
        return logits


def test_a_layer_whose_weight_is_read_is_named_when_the_small_ones_are_compared(tmp_path: Path) -> None:
    with (
        pytest.raises(
            CompressionError,
            match=r"^With small layers the network computes something else: its forward fails \('Sequential' object "
            r"has no attribute 'weight'\)\. The layers that break it: `fc`\. Leave them out with "
            r"`exclude=\[\.\.\.\]` of `FilterSharing` or `Factorize`\.$",
        ),
        pytest.warns(UserWarning, match="weights are kept in"),
    ):
        fit(tmp_path, Factorize(2), OnnxExport(tmp_path / "model.onnx", latency=False), module=ReadsWeight())


def test_the_check_tells_small_layers_that_are_not_the_same(shared: Any) -> None:
    small, record = compact(shared)
    calls: Any = [((IMAGES,), {})]
    assert check_compacted(shared, small, record, calls) < 1e-6
    with torch.no_grad():
        small.get_parameter("fc.1.weight").mul_(1.001)
    with pytest.raises(CompressionError, match=r"The layers that break it: several together\."):
        check_compacted(shared, small, record, calls)


def test_a_model_without_shared_or_factorised_layers_is_told(tmp_path: Path) -> None:
    for model in (nn.Linear(2, 2), LayersOnSelf()):
        with pytest.raises(
            CompressionError,
            match=rf"^Nothing is known of shared or factorised layers of `{type(model).__name__}`: it is no "
            r"LightningModule that was trained with `FilterSharing` or `Factorize` in this process, or it was stripped "
            r"since\. Load a checkpoint with `load_compressed_state`; `compact_like\(model, record\)` takes the record "
            r"of one that was\.$",
        ):
            compact(model)
    with pytest.raises(
        CompressionError,
        match=r"^The checkpoint holds no masks, no ranges, no groups and no ranks: it was written without "
        r"`MagnitudePruning`, `ChannelPruning`, `QuantizationAwareTraining`, `FilterSharing` and `Factorize`\. Load it "
        r"as ever, with `load_from_checkpoint`\.$",
    ):
        load_compressed_state(LayersOnSelf(), {"state_dict": LayersOnSelf().state_dict()})


@pytest.mark.parametrize("callback", [Factorize(2), FilterSharing(2)])
@pytest.mark.parametrize("change", ["NaN", "another head", "small layers"])
def test_layers_that_have_become_others_are_named_and_exported_in_full_shape(
    callback: L.Callback, change: str, tmp_path: Path
) -> None:
    module = fit(tmp_path, callback)
    record = compact(module).record
    if change == "NaN":
        with torch.no_grad():
            module.fc.weight[0, 0] = torch.nan
    elif change == "another head":
        module.fc = nn.Linear(8, 4)
        module.conv2 = nn.Conv2d(8, 8, 5, padding=2)
    else:
        compact_like(module, record)
    with pytest.raises(CompressionError, match="they were replaced, trained on without"):
        compact(module)
    assert compact_record(module) == {}


def test_a_network_that_is_one_small_layer_is_written_as_such(tmp_path: Path) -> None:
    fit(tmp_path, Factorize(2), OnnxExport(tmp_path / "model.onnx", latency=False, module="fc"))
    assert (2, 8) in kernel_shapes(tmp_path / "model.onnx") or (8, 2) in kernel_shapes(tmp_path / "model.onnx")


def test_spawned_processes_tell_that_they_leave_nothing_but_weights(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from lightning.pytorch.strategies import DDPStrategy

    strategy = DDPStrategy(process_group_backend="gloo", start_method="spawn")
    fit(tmp_path, Factorize(2), strategy=strategy, devices=1)
    assert "bring back the weights alone, not what `Factorize` knows of them" in capfd.readouterr().err


def test_a_frozen_layer_is_told(tmp_path: Path) -> None:
    module = LayersOnSelf()
    module.conv2.requires_grad_(False)
    with pytest.warns(UserWarning, match="`Factorize` changes frozen layers, which no gradient can repair: `conv2`"):
        fit(tmp_path, Factorize(2), module=module)


class WithTeacher(LayersOnSelf):
    """Layers in two networks, the second made after the first: what both return is spared."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


def test_the_last_layer_of_each_network_keeps_its_outputs(tmp_path: Path) -> None:
    sharing = FilterSharing(2, over="outputs")
    fit(tmp_path, sharing, module=WithTeacher())
    assert "other.2" not in sharing.groups
    assert "other.0" in sharing.groups
    assert sharing.left_alone["other.2"] == "is the last layer, whose outputs are those of the model"


def test_an_override_of_what_stays_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"^`overrides` names 'fc', and `layers` leaves all of it as it is\. Add it to `layers`, or take it out "
        r"of `overrides`\.$",
    ):
        fit(tmp_path, Factorize(2, layers=["conv2"], overrides={"fc": 1}))
