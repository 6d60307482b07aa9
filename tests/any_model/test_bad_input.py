"""What goes wrong with data and weights: it works, or is refused in one sentence that names it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.errors import CompressionError, ExportError
from lightning_compress.export import export_onnx
from lightning_compress.quantization import Quantization, prepare
from tests.any_model.inputs import random_values
from tests.any_model.journey import loss_of

IMAGE = random_values(3, 8, 8)


def network() -> nn.Module:
    """A convolution with a batch norm, and a linear layer."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(6), nn.Flatten(), nn.Linear(8, 4)
    )


def rounding(model: nn.Module, dtype: torch.dtype = torch.float32) -> Quantization:
    """Prepare ``model``, show it three batches, and let it round and observe in train mode."""
    quantization = prepare(model)
    quantization.is_observing = True
    for seed in range(3):
        model(IMAGE(16, seed).to(dtype))
        quantization.ranges.update()
    quantization.is_quantizing = True
    return quantization


class BareWeight(nn.Module):
    """A parameter that belongs to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.rand(4, 3))

    def forward(self, x: Tensor) -> Any:
        return F.linear(x, self.matrix)


WEIGHTS: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "a convolution": (network, "0.weight", "weight of layer `0` is NaN or infinite"),
    "a bias": (network, "5.bias", "parameter `5.bias` is NaN"),
    "a batch norm": (network, "1.weight", "parameter `1.weight` is NaN"),
    "a transposed convolution": (
        lambda: nn.Sequential(nn.ConvTranspose1d(2, 2, 1)),
        "0.weight",
        "weight of layer `0` is NaN or infinite",
    ),
    "no layer": (BareWeight, "matrix", "parameter `matrix` is NaN"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_are_not_finite_are_refused_by_name(name: str) -> None:
    build, parameter, named = WEIGHTS[name]
    model = build()
    model.get_parameter(parameter).data.flatten()[0] = torch.nan
    with pytest.raises(CompressionError) as caught:
        prepare(model)
    assert str(caught.value) == (
        f"The {named} and cannot be compressed. Start from a checkpoint from before the training diverged."
    )


def test_a_mask_of_minus_infinity_among_the_parameters_is_no_mistake() -> None:
    model = network()
    model.register_parameter("mask", nn.Parameter(torch.full((3, 3), -torch.inf), requires_grad=False))
    assert prepare(model).layer_bits.keys() == {"0", "5"}


@pytest.mark.parametrize("is_quantizing", [False, True])
def test_an_empty_batch_changes_nothing(is_quantizing: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    quantization = rounding(model)
    quantization.is_quantizing = is_quantizing
    before = quantization.ranges.as_dict()
    model(torch.empty(0, 3, 8, 8)).sum().backward()
    quantization.ranges.update()
    assert quantization.ranges.as_dict() == before


def test_an_empty_batch_may_be_the_first() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    quantization = prepare(model)
    quantization.is_observing = quantization.is_quantizing = True
    assert model(torch.empty(0, 3, 8, 8)).shape == (0, 2)
    quantization.ranges.update()
    model(IMAGE(4, 0))
    quantization.ranges.update()
    assert quantization.ranges.unseen() == []


def test_a_batch_of_one_trains_where_the_norm_has_more_than_one_value_to_look_at() -> None:
    model = network()
    rounding(model)
    loss_of(model, IMAGE(1, 0)).backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_batch_of_one_that_torch_refuses_is_refused_in_its_words_until_the_norm_is_frozen() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    quantization = prepare(model)
    quantization.is_observing = quantization.is_quantizing = True
    model(torch.rand(8, 3))
    quantization.ranges.update()
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        model(torch.rand(1, 3))
    model[1].eval()
    assert model(torch.rand(1, 3)).shape == (1, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_of_another_precision_trains_in_it_and_ships_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    model = network().to(dtype)
    quantization = rounding(model, dtype)
    outputs = model(IMAGE(16, 3).to(dtype))
    assert outputs.dtype == dtype
    outputs.float().square().mean().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and gradient.dtype == dtype and gradient.isfinite().all() for gradient in gradients)
    quantization.is_observing = False
    result = export_onnx(model.eval(), IMAGE(4, 4), tmp_path / "model.onnx", verify_inputs=[IMAGE(16, 5)])
    assert result.audit.counts()["conv"] == result.audit.counts()["gemm"] == (1, 1)
    assert result.parity.max_diff_steps is not None
    assert result.parity.max_diff_steps <= 2.0


def dead_convolution() -> nn.Module:
    """A network whose first ReLU never fires."""
    model = network()
    nn.init.zeros_(model.get_parameter("1.weight"))
    nn.init.constant_(model.get_parameter("1.bias"), -1.0)
    return model


def all_zero() -> nn.Module:
    """A network of zeros."""
    model = network()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model


@pytest.mark.parametrize(("build", "dead"), [(dead_convolution, ["2", "3"]), (all_zero, ["2", "3", "5"])])
def test_what_is_always_zero_is_named_and_divides_nothing_by_zero(
    build: Callable[[], nn.Module], dead: list[str], tmp_path: Path
) -> None:
    model = build()
    quantization = rounding(model)
    loss_of(model, IMAGE(8, 3)).backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    assert quantization.ranges.always_zero() == dead
    quantization.is_observing = False
    result = export_onnx(model.eval(), IMAGE(4, 4), tmp_path / "model.onnx")
    assert result.parity.max_abs_diff == 0.0


def test_integers_where_a_layer_wants_floats_are_refused_as_by_the_float_model() -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    prepare(model).is_observing = True
    with pytest.raises(RuntimeError, match="same dtype"):
        model(torch.ones(2, 3, dtype=torch.long))


class SingularValues(nn.Module):
    """An operation that ONNX has no word for."""

    def forward(self, x: Tensor) -> Any:
        return torch.linalg.svdvals(x.view(-1, 2, 2))


def test_an_operator_that_no_file_can_hold_is_named_with_its_module_and_a_way_out(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), SingularValues()), nn.Linear(2, 2))
    quantization = prepare(model)
    quantization.is_observing = quantization.is_quantizing = True
    model(torch.rand(8, 4))
    quantization.ranges.update()
    with pytest.raises(ExportError) as caught:
        export_onnx(model, torch.rand(2, 4), tmp_path / "model.onnx")
    assert str(caught.value).startswith(
        "`Sequential` cannot be exported as a whole, because `torch.export` cannot follow its `1.1` "
        '(ONNX has no form of `aten._linalg_svd.default`), but its `0` can: `OnnxExport(..., module="0")`'
    )
