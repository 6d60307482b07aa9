"""Exports of torchvision's networks: what runs in integers, how large the file is, and how fast ResNet-50 is.

The networks have random weights with batch-norm statistics from real forward passes, or ImageNet's where a file is
given. Each is trained for two steps with int8 in the loop and exported; operators are counted in the graph that ONNX
Runtime made of the file. Networks with random weights amplify every rounding, so the difference to torch stands beside
what torch itself makes of an input moved by 0.001.

Latency: ResNet-50 at 224 pixels in float, by this package, and by ONNX Runtime's own static quantization (QDQ, one
scale per channel, uint8 activations, int8 weights), interleaved.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import numpy as np
import onnx
import onnxruntime
import torch
import torchvision
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.records import OUT, Records, markdown_table, print_machine
from examples.image_data import Batch, ImageData, ImageSet
from lightning_compress import OnnxExport, QuantizationAwareTraining, export_onnx
from lightning_compress.errors import ParityError
from lightning_compress.report import compare_latency

INTEGER_OPS = ("QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "QLinearAdd")
FLOAT_OPS = ("Conv", "FusedConv", "NhwcFusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "Add")


class Classifier(L.LightningModule):
    """Trains a network for a step or two; the learning rate is too small to matter."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Map images to logits."""
        return self.network(images)  # type: ignore[no-any-return]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the cross-entropy of a batch."""
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Call the network, for the export's proof."""
        self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain gradient descent."""
        return torch.optim.SGD(self.parameters(), 1e-3)


def main() -> None:
    """Measure what is missing and print the tables."""
    options = _parse()
    print_machine()
    records = Records("exports")
    rows: list[dict[str, Any]] = []
    for name in options.models:
        row = records.get(partial(_export, name, 96, options.weights), model=name, pixels=96)
        rows.append(
            {
                "model": name,
                "integer conv, gemm, add": f"{row['integer']} of {row['integer'] + row['float']}",
                "left in float": row["float_ops"] or "none",
                "file / fp32 file": round(row["bytes"] / row["float_bytes"], 3),
                "ONNX Runtime - torch, largest": f"{row['largest_difference']:.2g}",
                "torch - torch, input moved by 0.001": f"{row['largest_difference_nudged']:.2g}",
            }
        )
    print(f"\n{markdown_table(rows)}")
    if options.latency:
        print(f"\n{markdown_table(_latency(records, options.rounds))}")


def _export(name: str, pixels: int, weights: Path | None) -> dict[str, Any]:
    network = _network(name, pixels, weights)
    path, float_path = _path(name, pixels, "int8"), _path(name, pixels, "float")
    example = _photos(1, pixels, seed=7)
    export_onnx(network, (example,), float_path)
    parity = "passed"
    try:
        _quantize(network, path, pixels)
    except ParityError as error:  # the file is kept; what it is made of can still be counted
        parity = str(error)
    ops = _optimized_ops(path)
    integer = {op: ops[op] for op in INTEGER_OPS if ops[op]}
    left = {op: ops[op] for op in FLOAT_OPS if ops[op]}
    network.eval()
    with torch.no_grad():
        expected = network(example).numpy()
        nudge = 1e-3 * torch.randn(example.shape, generator=torch.Generator().manual_seed(8))
        nudged = network(example + nudge).numpy()
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    output = session.run(None, {session.get_inputs()[0].name: example.numpy()})[0]
    return {
        "integer": sum(integer.values()),
        "float": sum(left.values()),
        "integer_ops": integer,
        "float_ops": left,
        "bytes": path.stat().st_size,
        "float_bytes": float_path.stat().st_size,
        "parity": parity,
        "largest_difference": float(np.abs(output - expected).max()),
        "largest_difference_nudged": float(np.abs(nudged - expected).max()),
    }


def _latency(records: Records, rounds: int) -> list[dict[str, Any]]:
    pixels = 224
    records.get(partial(_export, "resnet50", pixels, None), model="resnet50", pixels=pixels)
    files = {
        "float": _path("resnet50", pixels, "float"),
        "ONNX Runtime static quantization": _path("resnet50", pixels, "static"),
        "lightning_compress": _path("resnet50", pixels, "int8"),
    }
    if not files["ONNX Runtime static quantization"].exists():
        _quantize_static(files["float"], files["ONNX Runtime static quantization"], pixels)
    photo = _photos(1, pixels, seed=7).numpy()
    feeds = {onnx.load(path).graph.input[0].name: photo for path in files.values()}
    times = compare_latency(files, feeds, batch_sizes=(1, 8), rounds=rounds, budget_s=300.0)
    return [
        {
            "file": row.file,
            "batch": row.batch_size,
            "median, ms": round(row.median_ms, 1),
            "10th - 90th percentile, ms": f"{row.p10_ms:.1f} - {row.p90_ms:.1f}",
            "speed over float": f"{times.speedup(row.file, row.batch_size):.2f}x",
            "rounds": row.rounds,
        }
        for row in times.rows
    ]


def _network(name: str, pixels: int, weights: Path | None) -> nn.Module:
    torch.manual_seed(0)
    network: nn.Module = torchvision.models.get_model(name, weights=None)
    if weights is not None and name == "mobilenet_v2":
        network.load_state_dict(torch.load(weights, weights_only=True))
    else:
        _warm_up_batch_norm(network, pixels)
    return network.eval()


def _warm_up_batch_norm(network: nn.Module, pixels: int) -> None:
    # Random weights with the initial statistics 0 and 1 would give outputs and ranges that no trained network has.
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # an equal average over the batches
    network.train()
    with torch.no_grad():
        for seed in range(3):
            network(_photos(4, pixels, seed))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _quantize(network: nn.Module, path: Path, pixels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 3, pixels, pixels), generator=generator, dtype=torch.uint8)
    labels = torch.arange(40)
    noise = ImageSet("noise", images, labels, images, labels, mean=(0.5, 0.5, 0.5), std=(0.289, 0.289, 0.289))
    data = ImageData(noise, batch_size=4, n_train=8)  # two steps
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[QuantizationAwareTraining(start=0.0), OnnxExport(path, latency=False)],
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=OUT,
    )
    trainer.fit(Classifier(network.train()), datamodule=data)


def _quantize_static(source: Path, path: Path, pixels: int) -> None:
    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """Serves four batches of four images."""

        def __init__(self) -> None:
            name = onnx.load(source).graph.input[0].name
            self.feeds: Iterator[dict[str, Any]] = iter([{name: _photos(4, pixels, seed).numpy()} for seed in range(4)])

        def get_next(self) -> dict[str, Any] | None:
            """Return the next feed, or None at the end."""
            return next(self.feeds, None)

    with TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(path),
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )


def _optimized_ops(path: Path) -> Counter[str]:
    with TemporaryDirectory() as folder:
        settings = onnxruntime.SessionOptions()
        settings.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        settings.log_severity_level = 3  # it warns that the optimized file is for this machine, which is what is asked
        onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
        return Counter(node.op_type for node in onnx.load(settings.optimized_model_filepath).graph.node)


def _photos(n: int, pixels: int, seed: int) -> Tensor:
    return torch.randn(n, 3, pixels, pixels, generator=torch.Generator().manual_seed(seed))


def _path(name: str, pixels: int, kind: str) -> Path:
    return OUT / f"{name}_{pixels}_{kind}.onnx"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet50", "mobilenet_v2"])
    parser.add_argument("--weights", type=Path, help="file with MobileNetV2's ImageNet weights")
    parser.add_argument("--no-latency", dest="latency", action="store_false", help="leave ResNet-50's latency out")
    parser.add_argument("--rounds", type=int, default=50, help="interleaved rounds for each batch size")
    return parser.parse_args()


if __name__ == "__main__":
    main()
