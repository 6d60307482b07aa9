"""Attention heads: window attention in plain operations, and networks that lose heads while they are quantized."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torchvision.models.swin_transformer import (
    PatchMergingV2,
    ShiftedWindowAttention,
    ShiftedWindowAttentionV2,
    SwinTransformer,
    SwinTransformerBlockV2,
)

from lightning_compress import ChannelPruning, OnnxExport, QuantizationAwareTraining, rebuild, shrink
from lightning_compress.graph import window_attention
from tests.compatibility.runs import LIGHTNING_NOISE, assert_ships
from tests.pruning.channels.networks import with_two_of_four_heads
from tests.training import quiet_trainer
from tests.user_modules import Images, LayersOnSelf, loader

pytestmark = [pytest.mark.filterwarnings(message) for message in LIGHTNING_NOISE]

VERSIONS = (ShiftedWindowAttention, ShiftedWindowAttentionV2)


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize(
    ("size", "window", "shift"),
    [
        ((8, 8), [4, 4], [2, 2]),
        ((7, 9), [4, 4], [2, 2]),
        ((4, 8), [4, 4], [2, 2]),
        ((8, 12), [4, 3], [0, 1]),
        ((8, 12), [4, 3], [2, 0]),
        ((3, 3), [4, 4], [2, 2]),
        ((8, 8), [4, 4], [0, 0]),
    ],
)
@pytest.mark.parametrize("version", VERSIONS)
def test_window_attention_gives_the_bits_of_torchvision(
    version: type[ShiftedWindowAttention],
    size: tuple[int, int],
    window: list[int],
    shift: list[int],
    qkv_bias: bool,
    is_training: bool,
) -> None:
    torch.manual_seed(0)
    module = version(16, window, shift, 4, qkv_bias=qkv_bias, attention_dropout=0.1, dropout=0.1).train(is_training)
    if qkv_bias:
        nn.init.normal_(module.qkv.bias)
    x = torch.randn(2, *size, 16)
    torch.manual_seed(1)
    expected = module(x)
    torch.manual_seed(1)
    assert torch.equal(window_attention(module, x), expected)


@pytest.mark.parametrize("version", VERSIONS)
def test_window_attention_without_some_heads_computes_what_it_computes_with_zeros_there(
    version: type[ShiftedWindowAttention],
) -> None:
    torch.manual_seed(0)
    attention = version(16, [4, 4], [2, 2], 4).double().eval()
    masked, small = with_two_of_four_heads(attention)
    x = torch.randn(2, 8, 8, 16, dtype=torch.float64)
    assert torch.allclose(small(x), masked(x), atol=1e-12)
    assert (small.qkv.out_features, small.proj.in_features, small.num_heads) == (24, 8, 2)
    assert not torch.allclose(attention(x), masked(x), atol=1e-2)


class Swin(LayersOnSelf):
    """A Swin transformer of two blocks."""

    def __init__(self, version: int) -> None:
        L.LightningModule.__init__(self)
        parts = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2} if version == 2 else {}
        self.net = SwinTransformer([1, 1], 16, [2], [4], [2, 2], stochastic_depth_prob=0.0, num_classes=4, **parts)

    def forward(self, image: Tensor) -> Tensor:
        return self.net(image.expand(-1, 3, -1, -1))  # type: ignore[no-any-return]


class Rows(LayersOnSelf):
    """Multi-head attention over the rows of an image."""

    def __init__(self) -> None:
        L.LightningModule.__init__(self)
        self.embed = nn.Linear(8, 16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image.flatten(1, 2))
        return self.head(self.attention(x, x, x)[0].mean(1))  # type: ignore[no-any-return]


def network(kind: str) -> LayersOnSelf:
    return Rows() if kind == "rows" else Swin(int(kind[-1]))


def attention_of(module: nn.Module) -> str:
    kinds = (nn.MultiheadAttention, ShiftedWindowAttention)
    return next(str(name) for name, part in module.named_modules() if isinstance(part, kinds))


@pytest.mark.parametrize("kind", ["rows", "swin 1", "swin 2"])
def test_a_network_loses_heads_in_a_run_and_computes_the_same_bits_without_them(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = network(kind)
    name = attention_of(module)
    images = Images(16, seed=2).images
    pruning = ChannelPruning(macs=0.6, end=0.25, scope="layer", round_to=1)
    quantization = QuantizationAwareTraining(weight_bits=4, activation_bits=4, start=0.5, freeze=0.75)
    export = OnnxExport(tmp_path / "model.onnx", latency=False)
    quiet_trainer(tmp_path, [pruning, quantization, export], max_epochs=4).fit(module, loader(), loader(16, seed=1))
    small, record = shrink(module)
    assert len(record[name]["heads"]) < 4
    assert torch.equal(small.eval()(images), module.eval()(images))
    assert_ships(module, tmp_path / "model.onnx")
    again = rebuild(network(kind), record)
    assert [parameter.shape for parameter in again.parameters()] == [p.shape for p in small.parameters()]
