"""Channels that go, together with everything else."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import onnx
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn

from lightning_compress import (
    ChannelPruning,
    OnnxExport,
    QuantizationAwareTraining,
    load_compressed_state,
    rebuild,
    shrink,
)
from tests.callbacks.test_channel_pruning import IMAGES, callbacks, fit, zeros
from tests.compatibility.runs import LIGHTNING_NOISE, assert_ships
from tests.compatibility.table import works
from tests.test_promises import Stateful
from tests.training import quiet_trainer
from tests.user_modules import LayersOnSelf, ManualOptimization, NetWithKeywords, TwoNetworks, loader

AREA = "Channel pruning"

pytestmark = [pytest.mark.filterwarnings(*LIGHTNING_NOISE)]


@works(
    AREA,
    "distillation, channels, then int8 in one run, with automatic and manual optimization",
    "the file has the smaller layers",
)
@pytest.mark.parametrize("network", [LayersOnSelf, NetWithKeywords, TwoNetworks, ManualOptimization])
def test_everything_in_one_run_ships_a_smaller_file(network: type[LayersOnSelf], tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = network(16)
    added = callbacks(tmp_path, round_to=4)
    fit(module, tmp_path, *added, max_epochs=4)
    pruning, export = added[1], added[3]
    assert isinstance(pruning, ChannelPruning)
    assert isinstance(export, OnnxExport)
    assert pruning.complete
    name = next(iter(pruning.widths))
    had, has = pruning.widths[name]
    assert has < had == 16
    weights = {tuple(item.dims) for item in onnx.load(tmp_path / "model.onnx").graph.initializer if len(item.dims) == 4}
    assert all(16 not in shape for shape in weights)
    assert_ships(module, tmp_path / "model.onnx")
    assert export.report is not None
    assert "channels removed: " in export.report.to_text()


@works(AREA, "stopped in any phase and resumed", "bit-identical weights and file, with scores summed up over steps too")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize(("step", "importance"), [(4, "l2"), (9, "taylor"), (12, "l2"), (17, "l2"), (28, "taylor")])
def test_a_resumed_run_is_the_same_to_the_bit(step: int, importance: str, tmp_path: Path) -> None:
    def run(folder: Path, ckpt_path: Path | None = None) -> LayersOnSelf:
        torch.manual_seed(0)
        module = LayersOnSelf(16)
        saving = L.pytorch.callbacks.ModelCheckpoint(
            folder, filename="{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False
        )
        added = callbacks(folder, importance=importance, round_to=4, start=6, end=16)
        trainer = quiet_trainer(folder, [*added, saving], max_epochs=4, enable_checkpointing=True)
        trainer.fit(module, Stateful(), loader(16, seed=1), ckpt_path=ckpt_path, weights_only=True)
        return module

    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "resumed", tmp_path / "whole" / f"step={step}.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    files = [(tmp_path / name / "model.onnx").read_bytes() for name in ("whole", "resumed")]
    assert files[0] == files[1]


@works(AREA, "`load_compressed_state`, then `shrink`", "the same small network")
def test_the_checkpoint_is_plain_and_brings_the_channels_back(tmp_path: Path) -> None:
    module = LayersOnSelf(16)
    trainer = fit(module, tmp_path, *callbacks(tmp_path, round_to=4), max_epochs=4)
    trainer.save_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    torch.load(tmp_path / "last.ckpt", weights_only=True)
    again = load_compressed_state(LayersOnSelf(16), tmp_path / "last.ckpt")
    small, record = shrink(again)
    assert record == shrink(module).record
    assert torch.equal(small.eval()(IMAGES), shrink(module).model.eval()(IMAGES))
    LayersOnSelf.load_from_checkpoint(tmp_path / "last.ckpt")


@works(AREA, "`EMAWeightAveraging`", "the average is under the masks")
def test_averaged_weights_are_under_the_masks(tmp_path: Path) -> None:
    module = LayersOnSelf(16)
    fit(module, tmp_path, EMAWeightAveraging(), *callbacks(tmp_path, round_to=4), max_epochs=4)
    assert 0 < zeros(module)["conv2.weight"] < 16
    assert_ships(module, tmp_path / "model.onnx")


class Transformer(LayersOnSelf):
    """Rows of the image as tokens, an encoder layer, a mean."""

    def __init__(self) -> None:
        super().__init__(8)
        self.embed = nn.Linear(8, 16)
        self.encoder = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(image[:, 0])).mean(1))  # type: ignore[no-any-return]


@works(AREA, "attention heads and hidden layers of `nn.TransformerEncoderLayer`, then 8 or 4 bits")
@pytest.mark.parametrize("bits", [8, 4])
def test_heads_go(bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Transformer()
    pruning = ChannelPruning(macs=0.6, end=0.4, round_to=1, scope="layer")
    quantization = QuantizationAwareTraining(weight_bits=bits, activation_bits=bits, start=0.5, freeze=0.75)
    fit(module, tmp_path, pruning, quantization, OnnxExport(tmp_path / "model.onnx", latency=False), max_epochs=4)
    assert pruning.widths["encoder.self_attn"][1] < 4
    assert pruning.widths["encoder.linear1"][1] < 32
    small, record = shrink(module)
    assert torch.allclose(small.eval()(IMAGES), module.eval()(IMAGES), atol=1e-6)
    again = rebuild(Transformer(), record)
    again.load_state_dict(small.state_dict())
    assert_ships(module, tmp_path / "model.onnx")
