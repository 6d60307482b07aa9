"""Batch norms: folded exactly, and frozen."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_compress.export.lowering import lower
from lightning_compress.quantization.affine import integer_weight
from lightning_compress.quantization.batchnorm import fold_batchnorm, freeze_batchnorm_, norm_factor_and_offset
from tests.small_networks import PreActivation, Residual, images, quantized, warmed


def trained_norm(n_channels: int) -> nn.BatchNorm2d:
    """A norm in eval mode with a negative, a zero and a tiny gamma among its channels."""
    norm = nn.BatchNorm2d(n_channels).eval()
    nn.init.uniform_(norm.weight, 0.5, 2.0)
    nn.init.normal_(norm.bias)
    norm.running_mean = torch.randn(n_channels)
    norm.running_var = torch.rand(n_channels) * 3.0
    norm.running_var[3] = 0.0
    norm.weight.data[:3] = torch.tensor([-1.5, 0.0, 1e-20])
    return norm


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_folding_leaves_the_integers_and_gives_what_both_gave(bits: int, has_bias: bool, groups: int) -> None:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(8, 8, 3, padding=1, groups=groups, bias=has_bias), trained_norm(8)
    integers, scales = integer_weight(conv.weight, bits)
    folded, folded_scales, bias = fold_batchnorm(integers, scales, conv.bias, norm)

    signs = torch.ones(8, dtype=torch.int8)
    signs[0] = -1
    assert torch.equal(folded, integers * signs.view(8, 1, 1, 1))
    assert (folded.dtype, folded_scales[1].item()) == (torch.int8, 0.0)
    assert bool((folded_scales >= 0).all())

    x = torch.randn(4, 8, 6, 6)
    rounded = (integers * scales.view(-1, 1, 1, 1)).double()
    conv_bias = None if conv.bias is None else conv.bias.double()
    both = norm.double()(torch.conv2d(x.double(), rounded, conv_bias, padding=1, groups=groups))
    one = torch.conv2d(x, folded * folded_scales.view(-1, 1, 1, 1), bias, padding=1, groups=groups)
    largest = float(both.detach().abs().max())
    torch.testing.assert_close(one.double(), both, rtol=1e-5, atol=1e-5 * largest)


def test_a_norm_without_gamma_and_beta_folds() -> None:
    norm = nn.BatchNorm1d(1, eps=0.0, affine=False)
    norm.running_mean, norm.running_var = torch.tensor([3.0]), torch.tensor([4.0])
    integers, scales, bias = fold_batchnorm(torch.tensor([[5]]), torch.tensor([0.2]), torch.tensor([1.0]), norm)
    # (x * 5 * 0.2 + 1 - 3) / 2
    assert (integers.tolist(), bias.item()) == ([[5]], -1.0)
    assert scales.item() == pytest.approx(0.1)


def test_gradients_reach_gamma_and_beta() -> None:
    norm = nn.BatchNorm1d(1, eps=0.0)
    norm.running_mean, norm.running_var = torch.tensor([3.0]), torch.tensor([4.0])
    factor, offset = norm_factor_and_offset(norm)
    (factor * 10.0 + offset).sum().backward()  # type: ignore[no-untyped-call]
    # (10 - 3) / 2 and 1
    assert (norm.weight.grad.item(), norm.bias.grad.item()) == (3.5, 1.0)  # type: ignore[union-attr]


def test_freezing_leaves_norms_without_statistics_alone() -> None:
    net = nn.Sequential(nn.BatchNorm1d(1), nn.BatchNorm1d(1, track_running_stats=False), nn.Dropout())
    freeze_batchnorm_(net.train())
    assert [module.training for module in net] == [False, True, True]
    net.train()
    assert net[0].training


def test_norms_converted_to_synchronized_ones_fold_like_before() -> None:
    torch.manual_seed(0)
    model = warmed(Residual())
    quantization = quantized(model)
    expected = model(images())
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    quantization.refresh()
    assert isinstance(converted.get_submodule("bn1"), nn.SyncBatchNorm)
    assert torch.equal(converted(images()), expected)
    assert [row.is_integer for row in quantization.rows if row.operation == "SyncBatchNorm"] == [True, True]


def test_a_norm_on_its_own_ships_as_scale_and_shift_for_any_gamma() -> None:
    torch.manual_seed(0)
    model = warmed(PreActivation())
    norm = model.get_submodule("norm")
    assert isinstance(norm, nn.BatchNorm2d)
    norm.weight.data = torch.tensor([1.0, -2.0, 0.0, 1e-9, 0.5, -0.3, 3.0, 1.0])
    quantized(model)
    x = images(64, 9)
    with torch.no_grad():
        difference = (lower(model)(x) - model(x)).abs()
    assert difference.max() < 1e-5
