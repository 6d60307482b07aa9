"""Weights in frequencies: the transform by hand and against SciPy, bits by hand, then fits, files and archives."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_compress import (
    DCT,
    ChannelPruning,
    MagnitudePruning,
    OnnxExport,
    QuantizationAwareTraining,
    WeightClustering,
    load_compressed,
    load_compressed_state,
    save_compressed,
    shrink,
)
from lightning_compress.errors import ArchiveError, CompressionError
from lightning_compress.quantization import calibrate, prepare, quantization_of
from lightning_compress.quantization.coefficients import BITS, CoefficientQuantizer, allocate_bits
from lightning_compress.quantization.dct import dct_matrix, from_frequencies, to_frequencies, transform_matrix
from lightning_compress.quantization.scheme import Scheme
from lightning_compress.quantization.weights import WeightQuantizer
from lightning_compress.storage.bits import varint
from lightning_compress.storage.coding import encode_stream
from lightning_compress.storage.tensors import FrequencyWeight, IntegerWeight, _as_frequencies, decode_tensor
from tests.compatibility.runs import LIGHTNING_NOISE, outputs_of
from tests.training import quiet_trainer
from tests.user_modules import Images, LayersOnSelf, loader

pytestmark = [pytest.mark.filterwarnings(*LIGHTNING_NOISE)]


def random_weight(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_the_transform_is_scipys(n: int) -> None:
    from scipy.fft import dct  # type: ignore[import-untyped]

    assert np.allclose(dct_matrix(n).numpy(), dct(np.eye(n), axis=0, norm="ortho"), atol=1e-15)


@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (2, 5, 7), (3, 2, 1, 5), (2, 2, 3, 3, 3)])
def test_kernels_come_back(shape: tuple[int, ...]) -> None:
    from scipy.fft import dctn

    weight, matrix = random_weight(*shape), transform_matrix(shape, None)
    assert matrix is not None
    found = to_frequencies(weight, matrix)
    expected = dctn(weight.double().numpy(), axes=tuple(range(2, len(shape))), norm="ortho")
    assert np.allclose(found.reshape(shape).numpy(), expected, atol=1e-12)
    assert torch.allclose(from_frequencies(found, matrix, shape), weight.double(), atol=1e-12)


def test_blocks_of_inputs_come_back_though_the_last_is_not_full() -> None:
    weight, matrix = random_weight(3, 7), transform_matrix((3, 7), 4)
    assert matrix is not None
    found = to_frequencies(weight, matrix)
    assert found.shape == (3, 2, 4)
    assert torch.allclose(found[:, 0], weight[:, :4].double() @ dct_matrix(4).T)
    assert torch.allclose(from_frequencies(found, matrix, (3, 7)), weight.double(), atol=1e-12)


@pytest.mark.parametrize("budget", [0, 3, 5, 9])
def test_no_other_bits_have_a_smaller_error(budget: int) -> None:
    errors, bits = (random_weight(3, 4).abs().tolist()), (0, 2, 3, 4)
    found = allocate_bits(errors, bits, budget)
    sums = {
        sum(row[i] for row, i in zip(errors, choice, strict=True))
        for choice in itertools.product(range(4), repeat=3)
        if sum(bits[i] for i in choice) <= budget
    }
    assert sum(found) <= budget
    assert sum(row[bits.index(one)] for row, one in zip(errors, found, strict=True)) == pytest.approx(min(sums))


def smooth_weight() -> torch.Tensor:
    """Kernels that hardly change from place to place."""
    return random_weight(8, 6, 1, 1) + 0.05 * random_weight(8, 6, 3, 3)


def test_smooth_kernels_are_nearer_with_bits_in_the_frequencies_that_tell() -> None:
    weight = smooth_weight()
    plain = WeightQuantizer(bits=3, method="mse")
    quantizers = [
        WeightQuantizer(bits=3, method="mse", coefficients=CoefficientQuantizer(3, DCT(allocates=allocates)))
        for allocates in (False, True)
    ]
    errors = [float((one.rounded(weight) - weight).square().mean()) for one in (plain, *quantizers)]
    assert errors[2] < 0.1 * min(errors[:2])
    assert quantizers[1].coefficients is not None
    assert quantizers[1].coefficients.limits is not None
    assert int(quantizers[1].coefficients.limits.argmax()) == 0  # the mean of a kernel


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_ships_is_what_is_computed(axis: int, bits: int) -> None:
    weight = random_weight(4, 6, 3, 3)
    quantizer = WeightQuantizer(bits, axis, coefficients=CoefficientQuantizer(bits))
    integers, scales = quantizer.integers(weight)
    values = integers.float() * scales[:, None, None, None]
    assert torch.equal(values if axis == 0 else values.transpose(0, 1), quantizer.rounded(weight))
    assert torch.equal(scales, quantizer.scales(weight))


def test_each_step_is_learned_as_by_the_paper() -> None:
    weight = random_weight(2, 3, 3, 3).requires_grad_()
    quantizer = CoefficientQuantizer(3, DCT(allocates=False))
    quantizer.fit(weight)
    step = quantizer.step(weight, covers=False).requires_grad_()
    slope = random_weight(2, 3, 3, 3).double()
    (quantizer.rounded(weight, step) * slope).sum().backward()  # type: ignore[no-untyped-call]
    matrix = transform_matrix(weight.shape, None)
    assert matrix is not None
    assert quantizer.ratios is not None
    expected_step, expected_weight = torch.zeros(2), torch.zeros(2, 3, 9, dtype=torch.float64)
    coefficients, slopes = to_frequencies(weight.detach(), matrix), to_frequencies(slope, matrix)
    for o, i, f in itertools.product(range(2), range(3), range(9)):
        ratio = float(coefficients[o, i, f] / quantizer.ratios[f] / step[o].detach())
        inside = -3 < ratio < 3
        derivative = round(ratio) - ratio if inside else (3.0 if ratio > 0 else -3.0)
        expected_step[o] += float(slopes[o, i, f] * quantizer.ratios[f]) * derivative / (27 * 3) ** 0.5
        expected_weight[o, i, f] = slopes[o, i, f] if inside else 0.0
    assert step.grad is not None
    assert weight.grad is not None
    assert torch.allclose(step.grad, expected_step, atol=1e-5)
    found = from_frequencies(expected_weight, matrix, weight.shape)
    assert torch.allclose(weight.grad.double(), found, atol=1e-6)


def fit(folder: Path, *callbacks: L.Callback, module: Any = None, ckpt: Any = None, **settings: Any) -> Any:
    torch.manual_seed(0)
    module = LayersOnSelf() if module is None else module
    trainer = quiet_trainer(folder, callbacks, **settings)
    trainer.fit(module, loader(), loader(16, seed=1), ckpt_path=ckpt)
    return module


def rounding(**settings: Any) -> QuantizationAwareTraining:
    given = {"weight_bits": 3, "edge_bits": 3, "start": 0.4, "weight_transform": DCT(block=4), **settings}
    return QuantizationAwareTraining(**given)


@pytest.mark.parametrize("before", [[], [MagnitudePruning(0.6, end=0.3)], [WeightClustering(8, start=0.2)]])
def test_the_file_computes_what_was_trained_and_the_archive_holds_it(tmp_path: Path, before: list[L.Callback]) -> None:
    module = fit(tmp_path, *before, rounding(), OnnxExport(tmp_path / "model.onnx", latency=False))
    found = Images(16, seed=3).images
    with torch.no_grad():
        expected = module.eval()(found)
    torch.testing.assert_close(outputs_of(tmp_path / "model.onnx", found), expected, rtol=0, atol=0.05)
    size = save_compressed(module, tmp_path / "model.lcz")
    weights = load_compressed(tmp_path / "model.lcz", fresh := LayersOnSelf())
    state = quantization_of(module)
    assert state is not None
    for name, quantizer in state.weights.items():
        assert torch.equal(weights[f"{name}.weight"], quantizer.rounded(module.get_parameter(f"{name}.weight")))
    assert torch.equal(fresh.conv2.weight, weights["conv2.weight"])
    assert {tensor.form for tensor in size.tensors if tensor.name.endswith("bias")} <= {"raw", "shared"}


def test_pruned_weights_stay_zero(tmp_path: Path) -> None:
    module = fit(tmp_path, MagnitudePruning(0.6, end=0.3), rounding())
    state = quantization_of(module)
    assert state is not None
    weight = module.conv2.weight
    assert bool((weight == 0).any())
    assert not bool(state.weights["conv2"].rounded(weight)[weight == 0].any())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_an_archive_keeps_the_integers_of_the_frequencies(tmp_path: Path, masked: bool, transposed: bool) -> None:
    torch.manual_seed(0)
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer = kind(64, 64, 3, bias=False)
    net = nn.Sequential(layer)
    with torch.no_grad():
        layer.weight.mul_((torch.rand(64, 64, 3, 3) > 0.1) if masked else torch.ones(()))
    quantization = prepare(net, weight_bits=3, edge_bits=3, weight_transform="dct", ranges="mse")
    quantization.is_quantizing = True
    size = save_compressed(net, tmp_path / "net.lcz")
    (tensor,) = size.tensors
    assert tensor.form == ("sparse frequencies" if masked else "frequencies")
    # Three bits a coefficient, where it lies if there are zeros, and the steps.
    assert tensor.coded_bits < (3.0 + 0.6 * masked) * 64 * 64 * 9 + 32 * (64 + 9) + 600 * 9
    weights = load_compressed(tmp_path / "net.lcz")
    assert torch.equal(weights["0.weight"], quantization.weights["0"].rounded(layer.weight))


def test_no_forged_tensor_does_anything_but_fail_or_be_read() -> None:
    weight = random_weight(2, 3, 2, 2)
    quantizer = WeightQuantizer(3, coefficients=CoefficientQuantizer(3))
    integers, scales = quantizer.integers(weight)
    assert quantizer.coefficients is not None
    step = quantizer.coefficient_step(weight)
    codes = quantizer.coefficients.integers(weight, step)
    assert quantizer.coefficients.ratios is not None
    plain = IntegerWeight(integers, scales)
    parts = FrequencyWeight(codes, step, quantizer.coefficients.ratios, plain, None, 8, is_whole=True)
    payload = _as_bytes(parts)
    assert torch.equal(decode_tensor(payload, torch.float32, (2, 3, 2, 2)), plain.values())
    n_failed = 0
    for position, value in itertools.product(range(len(payload)), (0, 1, 2, 127, 128, 255)):
        forged = bytearray(payload)
        forged[position] = value
        try:
            assert decode_tensor(bytes(forged), torch.float32, (2, 3, 2, 2)).shape == (2, 3, 2, 2)
        except ArchiveError:
            n_failed += 1
    assert n_failed > 20


def _as_bytes(weight: FrequencyWeight) -> bytes:
    """Return the payload in frequencies, which a weight as small as this would not be written in."""
    values = _as_frequencies(weight)
    coded = [encode_stream(symbols, size, ["fixed", "huffman"]) for symbols, size in values.streams]
    return b"".join([bytes([3 << 1]), values.table, *coded])


def test_a_run_is_resumed_to_the_bit_and_loaded_without_a_trainer(tmp_path: Path) -> None:
    kept = ModelCheckpoint(
        tmp_path / "kept", filename="{step}", save_top_k=-1, every_n_epochs=1, enable_version_counter=False
    )
    whole = fit(tmp_path, rounding(), kept, max_epochs=3, enable_checkpointing=True)
    for step in (8, 16):  # before it rounds, and after
        again = fit(tmp_path, rounding(), max_epochs=3, ckpt=tmp_path / "kept" / f"step={step}.ckpt")
        torch.testing.assert_close(again.state_dict(), whole.state_dict(), rtol=0, atol=0)
    loaded = load_compressed_state(LayersOnSelf(), tmp_path / "kept" / "step=24.ckpt")
    found = Images(16, seed=3).images
    with torch.no_grad():
        assert torch.equal(loaded.eval()(found), whole.eval()(found))


def test_bad_settings_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'^`weight_transform` must be "dct", a `DCT` or None, got \'fft\'\.$'):
        QuantizationAwareTraining(weight_transform="fft")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^`block` must be from 2 to 64 inputs, got 1\.$"):
        DCT(block=1)
    with pytest.raises(TypeError, match=r"^`block` is a number of inputs, an int, or None, got 2\.5\.$"):
        DCT(block=2.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^`allocates` must be True or False, got 'no'\.$"):
        DCT(allocates="no")  # type: ignore[arg-type]
    assert type(DCT(block=np.int64(4)).block) is int  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"^`weight_transform` has the setting 'blok'; a `DCT` has `block` and `allocates`\.$"
    ):
        Scheme(weight_transform={"blok": 4})
    with pytest.raises(
        ValueError, match=r"^`weight_transform` rounds coefficients to 2 to 8 bits, got `weight_bits=1`\.$"
    ):
        QuantizationAwareTraining(weight_bits=1, weight_transform="dct")
    with pytest.raises(
        ValueError,
        match=r"^`weight_transform=DCT\(block=4, allocates=True\)` transforms 4 inputs of a layer together: where "
        r"channels are removed, the coefficients of the others would change\. Transform kernels alone with "
        r'`weight_transform="dct"`\.$',
    ):
        fit(tmp_path, ChannelPruning(macs=0.6, end=0.3), rounding())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("begins", ["zeros", "a channel of zeros", "ones in the middle"])
def test_weights_that_are_zero_learn(begins: str, bits: int) -> None:
    target = random_weight(4, 2, 3, 3)
    weight = {
        "zeros": torch.zeros(4, 2, 3, 3),
        "a channel of zeros": target * torch.tensor([0.0, 1.0, 1.0, 1.0])[:, None, None, None],
        "ones in the middle": torch.nn.init.dirac_(torch.empty(4, 2, 3, 3)),
    }[begins].requires_grad_()
    quantizer = WeightQuantizer(bits, coefficients=CoefficientQuantizer(bits), method="mse")
    optimizer = torch.optim.Adam([weight], 0.05)
    losses = []
    for _ in range(60):
        loss = (quantizer.rounded(weight) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    assert bool((weight != 0).all())
    assert losses[-1] < 0.5 * losses[0]


def test_what_defines_a_grid_is_not_clipped() -> None:
    weight = random_weight(4, 2, 3, 3).requires_grad_()
    slope = random_weight(4, 2, 3, 3)
    quantizer = WeightQuantizer(8, coefficients=CoefficientQuantizer(8, DCT(allocates=False)))
    (quantizer.rounded(weight) * slope).sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    assert torch.allclose(weight.grad, slope, atol=1e-6)


def test_bits_of_large_kernels_are_chosen_in_a_moment_and_of_larger_ones_not_at_all() -> None:
    errors = random_weight(1024, len(BITS)).abs().sort(1, descending=True)[0]
    found = allocate_bits(errors.tolist(), BITS, 4 * 1024)
    assert sum(found) <= 4 * 1024
    assert transform_matrix((2, 2, 33, 32), None) is None
    assert transform_matrix((2, 0, 3, 3), None) is None
    weight = random_weight(2, 2, 33, 32)
    plain = WeightQuantizer(3, method="mse")
    coded = WeightQuantizer(3, method="mse", coefficients=CoefficientQuantizer(3))
    assert torch.equal(coded.rounded(weight), plain.rounded(weight))


def test_channels_that_no_layer_reads_stay_where_inputs_are_transformed_together() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        net[2].weight[:, 3] = 0  # type: ignore[operator]
    quantization = prepare(net, weight_bits=3, edge_bits=3, weight_transform=DCT(block=4), ranges="mse")
    calibrate(net, [torch.rand(16, 8)])
    quantization.is_quantizing = True
    with pytest.raises(ValueError, match="where channels are removed, the coefficients of the others would change"):
        shrink(net, torch.rand(4, 8))


class Sized(nn.Module):
    """A function on a parameter, called with ever new sizes: it is given up, and its weight dropped from use."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(random_weight(4, 4, 3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(x, self.kernel) if x.shape[-1] > 2 else x


def test_a_weight_that_has_dropped_out_of_use_is_not_in_the_checkpoint() -> None:
    def network() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 4, 3), Sized(), nn.Conv2d(4, 2, 1))

    scheme = Scheme(weight_bits=3, edge_bits=3, weight_transform="dct", ranges="mse")
    net = network()
    quantization = prepare(net, scheme)
    quantization.is_observing = quantization.is_quantizing = True
    for size in range(6, 18):
        net(torch.rand(1, 1, size, size))
        quantization.ranges.update()
    again = prepare(network(), scheme)
    again.load_state_dict(quantization.state_dict())
    saved = quantization.state_dict()
    saved["coefficients"]["nowhere"] = {}
    with pytest.raises(CompressionError, match="quantizes the weight of `nowhere`, which this model does not have"):
        prepare(network(), scheme).load_state_dict(saved)


def test_a_network_of_other_precision_is_archived(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(8, 8, 3)).double()
    quantization = prepare(net, weight_bits=3, edge_bits=3, weight_transform="dct", ranges="mse")
    quantization.is_quantizing = True
    save_compressed(net, tmp_path / "net.lcz")
    weight = quantization.weights["0"].rounded(net[0].weight)  # type: ignore[arg-type]
    assert torch.equal(load_compressed(tmp_path / "net.lcz")["0.weight"], weight)


@pytest.mark.parametrize(
    ("shape", "block", "axis"),
    [((2, 0, 2, 2), 0, 0), ((2, 3, 0), 4, 0), ((2, 0), 4, 0), ((0, 2, 2, 2), 0, 1), ((1, 1, 60_000), 0, 0)],
)
def test_hostile_shapes_are_refused_before_anything_is_made(shape: tuple[int, ...], block: int, axis: int) -> None:
    n = int(np.prod(shape[2:])) if np.prod(shape[2:]) > 1 else block
    header = bytes([3 << 1, axis, 8, block]) + varint(n) + varint(shape[axis])
    payload = header + bytes([128] * n) + np.ones(n + shape[axis], "<f4").tobytes()
    with pytest.raises(ArchiveError):
        decode_tensor(payload, torch.float32, shape)


def test_removed_channels_leave_the_coefficients_of_the_others(tmp_path: Path) -> None:
    callbacks = [ChannelPruning(macs=0.6, end=0.3), rounding(weight_transform="dct")]
    module = fit(tmp_path, *callbacks, OnnxExport(tmp_path / "model.onnx", latency=False))
    found = Images(16, seed=3).images
    with torch.no_grad():
        torch.testing.assert_close(outputs_of(tmp_path / "model.onnx", found), module.eval()(found), rtol=0, atol=0.05)
