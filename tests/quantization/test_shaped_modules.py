"""Modules whose control flow hangs on sizes: traced once the shapes that they are called with are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from lightning_compress.export import export_onnx
from lightning_compress.graph import UntraceableError, shaped_key, trace_module
from lightning_compress.quantization import Quantization, calibrate, prepare
from lightning_compress.quantization.rewrite import MAX_CALL_KEYS


@fx.wrap
def hidden_product(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply by a weight, differently for wide inputs."""
    if x.shape[-1] > 100:
        return x
    return F.linear(x, weight)


class SamePadding(nn.Conv2d):
    """A convolution that pads as much as the size of its input asks for."""

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = x.shape[-2:]
        down, right = max((-(rows // -2) - 1) * 2 + 3 - rows, 0), max((-(columns // -2) - 1) * 2 + 3 - columns, 0)
        if down > 0 or right > 0:
            x = F.pad(x, [right // 2, right - right // 2, down // 2, down - down // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride)


class Windows(nn.Module):
    """Attention inside windows of two by two, whose number hangs on the size of the batch and of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.proj = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        batch, rows, columns, channels = x.shape
        if rows % 2:
            x = F.pad(x, (0, 0, 0, 0, 0, 1))
        _, padded, _, _ = x.shape
        x = x.view(batch, padded // 2, 2, columns // 2, 2, channels).permute(0, 1, 3, 2, 4, 5)
        x = x.reshape(batch * (padded // 2) * (columns // 2), 4, channels)
        q, k, v = self.qkv(x).chunk(3, -1)
        mask = x.new_zeros((4, 4))
        mask[0, 1] = -1.0
        x = self.proj(hidden_product(((q @ k.transpose(-2, -1)) + mask).softmax(-1) @ v, self.proj.weight))
        x = x.view(batch, padded // 2, columns // 2, 2, 2, channels).permute(0, 1, 3, 2, 4, 5)
        return x.reshape(batch, padded, columns, channels)[:, :rows].contiguous()


@fx.wrap
def add_into(x: Tensor, y: Tensor) -> None:
    """Add to the first, and return nothing."""
    x[:, 1:].add_(y[:, 1:])


class WritesIntoParts(nn.Module):
    """Writes into parts of what it computed, by itself and in a function; numbers made on the way lie in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, sizes: tuple[int, int]) -> Any:
        rows, columns = sizes
        positions = torch.arange(rows)[:, None] * 0.1 if rows < 10 else torch.zeros(1)
        y = self.first(x)
        y[:, 1:] += positions[1:]
        y = self.second(y)
        y[:, :1] = 0.5
        add_into(y, x)
        y.add_(torch.ones(columns))
        return self.last(y)


class HoldsIt(nn.Module):
    """Tells it the size of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.writes = WritesIntoParts()

    def forward(self, x: Tensor) -> Any:
        return self.writes(x, (3, 4))


class WritesIntoItsInput(nn.Module):
    """Writes where its caller reads."""

    def forward(self, x: Tensor) -> Any:
        x[:, :1] = 0.0
        return x * 2


def trained(model: nn.Module, *shapes: tuple[int, ...]) -> Quantization:
    quantization = prepare(model)
    quantization.is_observing = quantization.is_quantizing = True
    for shape in shapes:
        model(torch.randn(shape)).square().mean().backward()
        quantization.ranges.update()
    quantization.is_observing = False
    model.eval()
    return quantization


@pytest.mark.parametrize(
    ("make", "shape"), [(lambda: SamePadding(3, 4, 3, stride=2), (2, 3, 9, 8)), (Windows, (2, 3, 4, 8))]
)
def test_after_the_first_step_they_run_in_integers(make: Any, shape: tuple[int, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(make(), nn.Tanh())
    quantization = trained(model, shape, shape, shape)
    assert quantization.untraceable == {}
    result = export_onnx(model, torch.randn(shape), tmp_path / "net.onnx", verify_inputs=[torch.randn(5, *shape[1:])])
    assert result.audit.integer_mac_share == 1.0
    assert result.has_dynamic_batch
    assert result.parity.snr_db > 60


def test_the_graph_gives_what_the_forward_gives_for_any_batch() -> None:
    torch.manual_seed(0)
    model = Windows()
    x = torch.randn(2, 3, 4, 8)
    trace = trace_module(model, shaped_key((("x", "<value>"),), {"x": x}))
    run = fx.GraphModule(model, trace.evaluation)
    for batch in (1, 2, 7):
        x = torch.randn(batch, 3, 4, 8)
        assert torch.equal(run(x), model(x))


def test_the_graph_is_the_same_wherever_the_weights_lie() -> None:
    key = shaped_key((("x", "<value>"),), {"x": torch.randn(2, 3, 4, 8)})
    here, elsewhere = trace_module(Windows(), key), trace_module(Windows().to("meta"), key)
    assert str(here.evaluation) == str(elsewhere.evaluation)


def test_what_is_written_into_parts_is_what_ships(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = HoldsIt()
    x = torch.randn(2, 3, 4)
    expected = model(x)
    quantization = trained(model, *[(2, 3, 4)] * 3)
    assert quantization.untraceable == {}
    quantization.is_quantizing, quantization.is_observing = False, True
    assert torch.equal(model(x), expected)
    quantization.is_quantizing, quantization.is_observing = True, False
    result = export_onnx(model, x, tmp_path / "net.onnx", verify_inputs=[torch.randn(5, 3, 4)])
    assert result.audit.integer_mac_share == 1.0
    assert result.parity.snr_db > 60


def test_what_is_written_into_an_input_or_by_a_hidden_function_has_no_graph() -> None:
    x = torch.randn(2, 3)
    key = (("x", "<value>"),)
    with pytest.raises(UntraceableError, match="it writes into a part of `x`, which others may read"):
        trace_module(WritesIntoItsInput(), shaped_key(key, {"x": x}))

    class CallsIt(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            add_into(y, x)
            return y

    with pytest.raises(UntraceableError, match="it calls `add_into` for what that changes, which no graph tells"):
        trace_module(CallsIt(), key)
    trace = trace_module(CallsIt(), shaped_key(key, {"x": x}))
    assert torch.equal(fx.GraphModule(CallsIt(), trace.evaluation)(x), CallsIt()(x))


def test_nothing_changes_while_only_ranges_are_observed() -> None:
    torch.manual_seed(0)
    model = Windows()
    x = torch.randn(2, 3, 4, 8)
    expected = model(x)
    quantization = prepare(model)
    quantization.is_observing = True
    for _ in range(3):
        assert torch.equal(model(x), expected)
        quantization.ranges.update()


def test_too_many_shapes_leave_the_layers_rounded_one_by_one() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Windows())
    shapes = [(2, 2 * size, 2, 8) for size in range(1, MAX_CALL_KEYS + 3)]
    quantization = trained(model, *shapes, *shapes[-2:])
    assert list(quantization.untraceable) == ["0"]
    quantization.recorded = []
    model(torch.randn(2, 4, 4, 8))
    assert {"0.qkv.input", "0.qkv", "0.proj.input", "0.proj"} <= {name for name, _ in quantization.recorded}


def test_one_batch_is_enough_to_calibrate_them() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Windows(), SamePadding(3, 3, 3))
    quantization = prepare(model)
    calibrate(model, [torch.randn(2, 3, 4, 8)])
    assert quantization.untraceable == {}
    assert all(quantization.ranges.is_seen(index) for index in range(len(quantization.ranges.names)))


def test_a_checkpoint_brings_the_shapes_along() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Windows(), SamePadding(3, 3, 3))
    quantization = trained(model, *[(2, 3, 4, 8)] * 3)
    torch.manual_seed(0)
    fresh = nn.Sequential(Windows(), SamePadding(3, 3, 3)).eval()
    prepare(fresh).load_state_dict(quantization.state_dict())
    x = torch.randn(2, 3, 4, 8)
    assert torch.equal(fresh(x), model(x))
