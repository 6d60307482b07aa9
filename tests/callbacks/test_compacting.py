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
from lightning_compress.callbacks.compacting import check_compacted
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
            match=r"^With small layers the network computes something else: the largest difference is inf of the "
            r"largest output\. The layers that break it: `fc`\. Leave them out with `exclude=\[\.\.\.\]` of "
            r"`FilterSharing` or `Factorize`\.$",
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
            match=rf"^`{type(model).__name__}` has no shared and no factorised layers: it is no LightningModule that "
            r"was trained with `FilterSharing` or `Factorize`\. `compact_like\(model, record\)` takes the record of "
            r"one that was\.$",
        ):
            compact(model)
    with pytest.raises(
        CompressionError,
        match=r"^The checkpoint holds no masks, no ranges, no groups and no ranks: it was written without "
        r"`MagnitudePruning`, `ChannelPruning`, `QuantizationAwareTraining`, `FilterSharing` and `Factorize`\. Load it "
        r"as ever, with `load_from_checkpoint`\.$",
    ):
        load_compressed_state(LayersOnSelf(), {"state_dict": LayersOnSelf().state_dict()})
