"""The exported file: what is in it, how it runs, and what the export leaves alone."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from lightning_compress.errors import ExportError
from lightning_compress.export import export_onnx
from lightning_compress.export.arguments import CallArguments
from lightning_compress.quantization import calibrate, prepare
from tests.small_networks import NETWORKS, Residual, images, plain, quantized, warmed


def run(path: Path, **feeds: Tensor) -> list[Tensor]:
    """Run a file as a user would."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(value) for value in session.run(None, {name: x.numpy() for name, x in feeds.items()})]


def initializers(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {
        item.name: (onnx.TensorProto.DataType.Name(item.data_type), tuple(item.dims))
        for item in onnx.load(path).graph.initializer
    }


@pytest.mark.parametrize("bits", [8, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_file_computes_what_the_model_computes(name: str, bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = warmed(NETWORKS[name]())
    quantized(model, weight_bits=bits, activation_bits=bits)
    result = export_onnx(model, images(), tmp_path / "model.onnx", verify_inputs=[images(32, 5), images(3, 6)])
    assert result.parity.samples == 35
    assert result.parity.snr_db > 25.0
    assert result.has_dynamic_batch


def test_weights_are_int8_biases_int32_and_pairs_are_counted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = warmed(plain())
    quantized(model)
    path = export_onnx(model, images(), tmp_path / "model.onnx").path
    kinds = initializers(path).values()
    assert {("INT8", (8, 3, 3, 3)), ("INT8", (5, 128)), ("INT32", (8,)), ("INT32", (5,))} <= set(kinds)
    assert not any(kind == "FLOAT" and len(shape) > 1 for kind, shape in kinds)
    counts = Counter(node.op_type for node in onnx.load(path).graph.node)
    # Rounded: input, ReLU, pooled, flattened, result. Taken back besides: two weights, two biases.
    assert (counts["QuantizeLinear"], counts["DequantizeLinear"]) == (5, 9)
    assert counts["BatchNormalization"] == counts["Relu"] == counts["Clip"] == 0


@pytest.mark.parametrize("n_images", [1, 3, 8])
@pytest.mark.parametrize("n_example", [1, 4])
def test_the_file_takes_batches_of_any_size(n_images: int, n_example: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = warmed(Residual())
    quantized(model)
    result = export_onnx(model, images(n_example), tmp_path / "model.onnx")
    assert result.has_dynamic_batch
    (found,) = run(result.path, x=images(n_images, 3))
    with torch.no_grad():
        torch.testing.assert_close(found, model(images(n_images, 3)), rtol=0, atol=0.02)


def test_a_plain_model_is_exported_in_float(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = warmed(plain())
    result = export_onnx(model, images(), tmp_path / "model.onnx")
    assert "INT8" not in {kind for kind, _ in initializers(result.path).values()}
    with torch.no_grad():
        torch.testing.assert_close(run(result.path, input=images())[0], model.eval()(images()))


class Named(nn.Module):
    """Two inputs, one of them by keyword, one that nothing reads; results in nested containers."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Linear(4, 3)
        self.table = nn.Linear(2, 3)

    def forward(self, image: Tensor, unused: Tensor, *, table: Tensor, scale: float = 1.0) -> dict[str, Any]:
        left, right = self.image(image), self.table(table) * scale
        return {"sum": left + right, "parts": (left, right), "nothing": None}


def test_inputs_and_outputs_are_named_as_in_the_forward(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Named()
    batch = CallArguments((torch.rand(6, 4), torch.rand(6, 9)), {"table": torch.rand(6, 2), "scale": 2.0})
    quantization = prepare(model)
    calibrate(model, [batch], forward=lambda call: model(*call.args, **call.kwargs))
    quantization.is_quantizing = True
    result = export_onnx(model, batch, tmp_path / "model.onnx")
    assert result.input_names == ("image", "unused", "table")
    assert result.output_names == ("sum", "parts_0", "parts_1")
    session = onnxruntime.InferenceSession(str(result.path), providers=["CPUExecutionProvider"])
    assert [item.name for item in session.get_outputs()] == ["sum", "parts_0", "parts_1"]
    assert result.parity.max_diff_steps is not None


def test_a_name_that_is_input_and_output_is_told_apart(tmp_path: Path) -> None:
    class Same(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"x": self.layer(x)}

    result = export_onnx(Same(), torch.rand(2, 4), tmp_path / "model.onnx")
    assert (result.input_names, result.output_names) == (("x",), ("x_out",))


def test_batches_may_name_their_inputs_in_another_order(tmp_path: Path) -> None:
    class Minus(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, first: Tensor, second: Tensor) -> Any:
            return self.layer(first) - second

    first, second = torch.rand(2, 4), torch.rand(2, 4)
    batches: list[Any] = [{"second": second, "first": first}, (first, second)]
    result = export_onnx(Minus(), {"first": first, "second": second}, tmp_path / "model.onnx", verify_inputs=batches)
    assert result.parity.snr_db > 100.0


class Distribution:
    """What an ONNX file cannot hold."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class Returns(nn.Module):
    """Returns what it was made with, called on the logits."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.layer(x))


@pytest.mark.parametrize(
    ("wrap", "found"),
    [(Distribution, "a `Distribution`"), (lambda logits: None, "no tensor"), (lambda logits: 1, "no tensor")],
)
def test_a_result_that_no_file_can_hold_is_named(wrap: Any, found: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError) as caught:
        export_onnx(Returns(wrap), torch.rand(2, 4), tmp_path / "model.onnx")
    assert str(caught.value) == (
        f"The forward of `Returns` returns {found}, which an ONNX file cannot hold. "
        "Return a tensor, or tuples, lists, dicts and dataclasses of tensors."
    )


def looks_at_its_values(logits: Tensor) -> Tensor:
    return logits * 2 if logits.sum() > 0 else logits


def test_a_failed_export_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"the last good file")
    with pytest.raises(ExportError, match=r"^`Returns` cannot be exported as a whole, because "):
        export_onnx(Returns(looks_at_its_values), torch.rand(2, 4), path)
    assert path.read_bytes() == b"the last good file"
    assert [item.name for item in tmp_path.iterdir()] == ["model.onnx"]


def test_a_file_is_replaced_as_a_whole_and_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "model.onnx"
    for bias in (1.0, 2.0):
        model = nn.Linear(2, 1)
        nn.init.constant_(model.weight, 0.0)
        nn.init.constant_(model.bias, bias)
        export_onnx(model, torch.rand(3, 2), path)
    assert run(path, input=torch.rand(1, 2))[0].tolist() == [[2.0]]
    assert [item.name for item in path.parent.iterdir()] == ["model.onnx"]


def test_export_leaves_the_model_as_it_was_and_it_trains_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = warmed(Residual(inplace=True))
    quantized(model)
    model.train()
    model.get_submodule("bn1").eval()
    twin = copy.deepcopy(model)
    export_onnx(model, images(), tmp_path / "model.onnx")
    assert [module.training for module in model.modules()] == [module.training for module in twin.modules()]
    for module in (model, twin):
        module(images()).square().mean().backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad)
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in model.state_dict().items())


def test_inputs_of_the_caller_are_not_overwritten(tmp_path: Path) -> None:
    x = images()
    export_onnx(nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 2, 1)), x, tmp_path / "model.onnx")
    assert torch.equal(x, images())


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[str] = []
    export_onnx(nn.Linear(2, 1), torch.rand(3, 2), tmp_path / "model.onnx", progress=told.append)
    assert told == ["writing the ONNX file", "verifying it in ONNX Runtime", "reading what runs in integers"]


@pytest.mark.parametrize("kind", ["attention", "lstm"])
def test_networks_around_modules_without_integer_form_are_exported(kind: str, tmp_path: Path) -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.lstm = nn.LSTM(8, 8, batch_first=True)
            self.last = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Any:
            x = self.first(x[:, 0])
            inner = self.attention(x, x, x)[0] if kind == "attention" else self.lstm(x)[0]
            return self.last(inner[:, -1])

    torch.manual_seed(0)
    model = Around()
    quantization = quantized(model)
    assert quantization.ranges.unseen() == []
    assert quantization.unreached_layers() == []
    result = export_onnx(model, images(), tmp_path / "model.onnx")
    assert result.audit.counts()["gemm"][0] == 1
    assert result.parity.snr_db > 25.0


def test_a_causal_mask_of_minus_infinity_is_exported(tmp_path: Path) -> None:
    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(8, 24)
            self.last = nn.Linear(8, 5)
            self.register_buffer("mask", torch.triu(torch.full((8, 8), -torch.inf), 1))

        def forward(self, x: Tensor) -> Any:
            query, key, value = self.mix(x[:, 0]).chunk(3, -1)
            scores = query @ key.transpose(1, 2) + self.mask
            return self.last((scores.softmax(-1) @ value)[:, -1])

    torch.manual_seed(0)
    model = Causal()
    quantized(model)
    result = export_onnx(model, images(), tmp_path / "model.onnx")
    assert result.parity.snr_db > 25.0


def test_a_model_that_needs_its_batch_size_is_exported_for_the_one_it_got(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Any:
            return self.layer(x) + torch.arange(int(x.shape[0])).tolist()[-1]

    torch.manual_seed(0)
    result = export_onnx(Fixed(), torch.rand(3, 4), tmp_path / "model.onnx")
    assert not result.has_dynamic_batch
    assert result.parity.snr_db > 100.0
