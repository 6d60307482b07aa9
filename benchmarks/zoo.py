"""Coverage: every model of torchvision through quantization-aware training, export and ONNX Runtime.

Each model has random weights and batch-norm statistics from real forward passes, and runs in a process of its own:
prepare for int8, two training steps with rounding on, eval, `export_onnx` with its proof in ONNX Runtime, and the share
of multiply-accumulates that run in integer operators, read from ONNX Runtime's optimized graph with the shapes of a
real run. Images are as small as a network takes them, and residual branches weigh less than what they are added to, as
in a trained network. Where a model as a whole cannot be exported, the part that the
error offers is exported instead.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torchvision import models

from benchmarks.records import Records, markdown_table, print_machine
from lightning_compress.errors import ParityError
from lightning_compress.export import export_onnx
from lightning_compress.export.arguments import CallArguments, names_of_inputs, tensors_of
from lightning_compress.export.audit import AuditReport, audit
from lightning_compress.export.parity import compare_outputs
from lightning_compress.export.parts import UnexportableError
from lightning_compress.graph import Operation, trace_program
from lightning_compress.quantization import prepare

TASKS = {
    "classification": models,
    "segmentation": models.segmentation,
    "video": models.video,
    "detection": models.detection,
    "optical flow": models.optical_flow,
}

SIZES: dict[str, tuple[int, ...]] = {
    "alexnet": (96, 96),
    "densenet": (64, 64),
    "googlenet": (96, 96),
    "inception": (299, 299),  # the auxiliary head takes no less
    "maxvit": (224, 224),  # partitions of 7 x 7
    "swin_transformer": (112, 112),
    "vgg": (64, 64),
    "deeplabv3": (96, 96),
    "fcn": (96, 96),
    "lraspp": (96, 96),
    "mvit": (16, 224, 224),
    "resnet/video": (4, 64, 64),
    "s3d": (16, 224, 224),  # its last pooling is 2 x 7 x 7
    "swin_transformer/video": (4, 64, 64),
    "ssd": (300, 300),
    "ssdlite": (320, 320),
    "raft": (128, 128),
}
"""Size of the images or clips of a family, where it is not 64 x 64 (128 x 128 for detection)."""

KEYWORDS: dict[str, dict[str, Any]] = {
    "inception_v3": {"init_weights": False, "aux_logits": True},
    "googlenet": {"init_weights": False, "aux_logits": True},
    "maxvit_t": {"input_size": (224, 224)},
    **{name: {"image_size": 64} for name in ("vit_b_16", "vit_l_16")},
    **{name: {"image_size": 96} for name in ("vit_b_32", "vit_l_32")},
    "vit_h_14": {"image_size": 56},
    **{name: {"aux_loss": True} for name in models.list_models(models.segmentation) if "lraspp" not in name},
}
"""Arguments of single models: images smaller than usual, and auxiliary heads, which are the harder case."""

N_CLASSES, N_DETECTED = 10, 5

GIANT_BYTES = 800e6
"""Of fp32 weights; larger models get batches of two."""


def main() -> None:
    """Measure what is missing and print the table; with ``--child``, measure one model."""
    options = _parse()
    if options.child:
        _child(options.child, Path(options.folder))
        return
    print_machine()
    records = Records(options.records)
    names = options.models or _names()
    names = [name for name in names if not options.family or _family(name) in options.family]
    names = [name for name in names if not options.task or _task(name) in options.task]
    if options.again:
        records.drop(lambda row: row["model"] in names)
    missing = [name for name in names if records.find(model=name) is None]
    with ThreadPoolExecutor(options.jobs) as pool:
        futures = {pool.submit(_measure, name, options.limit): name for name in missing}
        for future in as_completed(futures):
            records.get(future.result, model=futures[future])
    rows = [row for name in names if (row := records.find(model=name)) is not None]
    print(f"\n{markdown_table([_line(row) for row in rows])}\n\n{markdown_table(_causes(rows))}")


def _line(row: dict[str, Any]) -> dict[str, Any]:
    share = row.get("integer_mac_share")
    parity = row.get("snr_db")
    is_classifier = row["task"] in ("classification", "video")
    counts = {kind: f"{integer}/{total} {kind}" for kind, (integer, total) in row.get("counts", {}).items()}
    return {
        "model": row["model"],
        "family": row["family"],
        "task": row["task"],
        "status": row["status"] + (f" ({row['part']} alone)" if row.get("part") else ""),
        "parity, dB": "" if parity is None else f"{parity:.1f}",
        "torch - torch, dB": "" if parity is None else f"{row['own_snr_db']:.1f}",
        "top-1 agreement": f"{100 * row['top1']:.0f} %" if row.get("top1") is not None and is_classifier else "",
        "MACs in integers": "" if share is None else f"{100 * share:.1f} %",
        "operations in integers": ", ".join(counts.values()),
        "file / fp32 weights": "" if "bytes" not in row else round(row["bytes"] / row["weight_bytes"], 2),
        "s": round(row["seconds"]),
    }


def _causes(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return why multiply-accumulates stay in float: how many models, and how much of them on average."""
    shares: dict[str, list[tuple[float, str]]] = {}
    for row in rows:
        for reason, share in row.get("float_causes", {}).items():
            shares.setdefault(reason, []).append((share, row["model"]))
    return [
        {
            "why in float": reason,
            "models": len(found),
            "share of their MACs": f"{100 * sum(share for share, _ in found) / len(found):.1f} %",
            "most in": max(found)[1],
        }
        for reason, found in sorted(shares.items(), key=lambda item: -sum(share for share, _ in item[1]))
    ] or [{"why in float": "nothing", "models": 0}]


def _names() -> list[str]:
    return [name for module in TASKS.values() for name in models.list_models(module)]


def _task(name: str) -> str:
    return next(task for task, module in TASKS.items() if name in models.list_models(module))


def _family(name: str) -> str:
    family = models.get_model_builder(name).__module__.rpartition(".")[2]
    return f"{family}/video" if _task(name) == "video" and family in ("resnet", "swin_transformer") else family


def _measure(name: str, limit_s: float) -> dict[str, Any]:
    """Measure one model in a process of its own, which may run out of time or memory."""
    begun = time.perf_counter()
    row: dict[str, Any] = {"family": _family(name), "task": _task(name)}
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.zoo", "--child", name, "--folder", folder]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        result, log = Path(folder) / "result.json", Path(folder) / "log.txt"
        with log.open("w") as output:
            try:
                code = subprocess.run(
                    command, env=environment, stdout=output, stderr=subprocess.STDOUT, timeout=limit_s
                ).returncode
                ended = f"the process ended with code {code}"
            except subprocess.TimeoutExpired:
                ended = f"no end after {limit_s:.0f} s"
        row |= json.loads(result.read_text()) if result.exists() else {"status": f"start: {ended}"}
        if "doing" in row:
            row["status"] = f"{row.pop('doing')}: {ended}"
    return {**row, "seconds": time.perf_counter() - begun}


class _Progress:
    """What is known of a model so far, on disk after every stage."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.row: dict[str, Any] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        self.path.write_text(json.dumps({**self.row, "doing": name}))
        try:
            yield
        except Exception as error:  # whatever it is, the row names it
            text = " ".join(str(error).split()) or type(error).__name__
            self.row["status"] = f"{name}: {type(error).__name__}: {text[:400]}"
            raise
        finally:
            self.row[f"{name}_s"] = round(time.perf_counter() - begun, 1)
            self.row["peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
            self.path.write_text(json.dumps(self.row))


def _child(name: str, folder: Path) -> None:
    torch.manual_seed(0)
    progress = _Progress(folder / "result.json")
    with progress.stage("build"):
        model = _build(name)
        weight_bytes = 4 * sum(parameter.numel() for parameter in model.parameters())
        progress.row["weight_bytes"] = weight_bytes
        size = 2 if weight_bytes > GIANT_BYTES or _task(name) not in ("classification", "segmentation") else 4
        size = {"mvit": 1, "s3d": 1, "maxvit": 2}.get(_family(name), size)
        _warm_up(model, name, size)
    with progress.stage("prepare"):
        quantization = prepare(model)
    with progress.stage("train"):
        optimizer = torch.optim.SGD(model.parameters(), 1e-5)
        quantization.is_quantizing = quantization.is_observing = True
        for step in range(2):
            optimizer.zero_grad()
            loss = _loss(model, name, size, seed=100 + step)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            quantization.ranges.update()
        optimizer.zero_grad()
        quantization.is_observing = False
        progress.row["loss"] = float(loss.detach())
        progress.row["unreached"] = quantization.unreached_layers()
        progress.row["untraceable"] = {name: why[:100] for name, why in quantization.untraceable.items()}
    model.eval()
    path, args = folder / "model.onnx", _inputs(name, size, seed=0)
    part = ""
    with progress.stage("export"):
        try:
            progress.row |= {"status": "ok", **_export(model, CallArguments(args, {}), path)}
        except UnexportableError as error:
            progress.row["status"] = progress.row["whole"] = f"export: {error}"
            part = error.part
    if part:
        with progress.stage("export_part"):
            exported = _export(model.get_submodule(part), _call_of(model, part, args), path)
            progress.row |= {"status": "ok", "part": part, **exported}


def _export(model: nn.Module, inputs: CallArguments, path: Path) -> dict[str, Any]:
    call, row = (inputs.args, dict(inputs.kwargs)), dict[str, Any]()
    try:
        result = export_onnx(model, inputs, path)
        parity, report = result.parity, result.audit
        row = {
            "snr_db": min(parity.snr_db, 200.0),
            "top1": parity.top1_agreement,
            "distinct_top1": parity.distinct_top1,
            "max_diff_steps": parity.max_diff_steps,
            "dynamic_batch": result.has_dynamic_batch,
        }
    except ParityError as error:
        if not path.exists():
            raise
        names, tensors = names_of_inputs(model, *call), tensors_of(*call)
        report = audit(path, dict(zip(names, tensors, strict=True)))
        row = {"status": f"parity: {error}"}
    row["own_snr_db"] = min(_own_snr_db(model, call), 200.0)
    return {**row, **_audited(report), "bytes": sum(item.stat().st_size for item in path.parent.glob("model.onnx*"))}


def _own_snr_db(model: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]]) -> float:
    """Return how near the model stays to itself when every hundredth value of its inputs moves by one of 255 steps.

    Networks with random weights amplify every rounding: no file is nearer to one than it is to itself.
    """
    generator = torch.Generator().manual_seed(0)

    def moved(tensor: Tensor) -> Tensor:
        step = (tensor.max() - tensor.min()) / 255
        return tensor + step * (torch.rand(tensor.shape, generator=generator) < 0.01)

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        with torch.no_grad():
            outputs = model(*args, **kwargs)
        return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]

    return compare_outputs([run(*call)], [run(*pytree.tree_map_only(Tensor, moved, call))]).snr_db


def _audited(report: AuditReport) -> dict[str, Any]:
    total = sum(row.macs for row in report.rows) or 1
    causes: Counter[str] = Counter()
    for row in report.floats():
        if row.macs:
            # Names of operations are left out, so that causes can be counted over layers and models.
            causes[f"{row.kind}: {''.join(row.reason.split('`')[::2])}"] += row.macs
    largest = sorted(report.floats(), key=lambda row: -row.macs)[:12]
    return {
        "macs": total,
        "integer_mac_share": report.integer_mac_share,
        "counts": report.counts(),
        "float_causes": {reason: macs / total for reason, macs in causes.most_common()},
        "largest_float": [[row.kind, row.name, row.reason, row.macs / total] for row in largest if row.macs],
    }


def _build(name: str) -> nn.Module:
    keywords: dict[str, Any] = {"weights": None, **KEYWORDS.get(name, {})}
    task = _task(name)
    if task == "detection":
        keywords |= {"weights_backbone": None, "num_classes": N_DETECTED}
        if not name.startswith("ssd"):
            keywords |= {"min_size": 128, "max_size": 128}
    elif task == "segmentation":
        keywords |= {"weights_backbone": None}
    model: nn.Module = models.get_model(name, **keywords)
    for parameter in model.parameters():
        # Heads and layer scales that begin at (nearly) nothing would make every output the same.
        if parameter.detach().abs().max() < 1e-3:
            nn.init.normal_(parameter, std=0.02)
    _tame_residuals(model)
    return model.train()


def _tame_residuals(model: nn.Module) -> None:
    """Let residual branches add a quarter of what they would: in trained networks a branch only corrects.

    Deep sums of equal random terms amplify every rounding until nothing of the input is left to compare.
    """
    for operation in trace_program(model).operations:
        if getattr(operation.target, "__name__", "") in ("add", "iadd") and len(operation.inputs) == 2:
            for branch, stream in (operation.inputs, operation.inputs[::-1]):
                norm = _norm_before(branch)
                if norm is not None and _leads_to(stream, branch):
                    nn.init.constant_(norm.weight, 0.25)


def _norm_before(operation: Operation) -> Any:
    while getattr(operation.target, "__name__", "") == "stochastic_depth":
        operation = operation.inputs[0]
    is_norm = isinstance(operation.target, nn.modules.batchnorm._BatchNorm) and operation.target.affine
    return operation.target if is_norm else None


def _leads_to(source: Operation, operation: Operation) -> bool:
    pending, seen = [operation], set[int]()
    while pending:
        value = pending.pop()
        if value is source:
            return True
        pending += [before for before in value.inputs if id(before) not in seen]
        seen |= {id(before) for before in value.inputs}
    return False


def _warm_up(model: nn.Module, name: str, size: int) -> None:
    """Give batch norms the statistics of real inputs: 0 and 1 belong to no trained network."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # an equal average over the batches
    with torch.no_grad():
        for seed in range(3 if norms else 0):
            _loss(model, name, size, seed)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _loss(model: nn.Module, name: str, size: int, seed: int) -> Tensor:
    args, task = _inputs(name, size, seed), _task(name)
    if task == "detection":
        return torch.stack(list(model(*args, _targets(name, len(args[0]))).values())).sum()
    outputs = [leaf for leaf in pytree.tree_leaves(model(*args)) if isinstance(leaf, Tensor)]
    if task == "optical flow":
        return torch.stack([output.abs().mean() for output in outputs]).mean()
    return torch.stack([F.cross_entropy(output, output.detach().argmin(1)) for output in outputs]).sum()


def _inputs(name: str, size: int, seed: int) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)
    task = _task(name)
    pixels = SIZES.get(_family(name), (128, 128) if task == "detection" else (64, 64))
    if name in KEYWORDS and "image_size" in KEYWORDS[name]:
        pixels = (KEYWORDS[name]["image_size"],) * 2

    def images(n_images: int) -> Tensor:
        # Smooth patches and noise: neither alone is like a photo.
        patches = torch.randn(n_images, 3, *[max(1, side // 8) for side in pixels], generator=generator)
        noise = torch.randn(n_images, 3, *pixels, generator=generator)
        return F.interpolate(patches, size=pixels) + 0.3 * noise

    if task == "detection":
        return ([image.sigmoid() for image in images(size)],)
    if task == "optical flow":
        return (images(size).tanh(), images(size).tanh())
    return (images(size),)


def _targets(name: str, n_images: int) -> list[dict[str, Tensor]]:
    boxes = torch.tensor([[10.0, 12.0, 70.0, 90.0], [40.0, 30.0, 110.0, 100.0]])
    masks = torch.zeros(2, 128, 128, dtype=torch.uint8)
    masks[0, 12:90, 10:70] = masks[1, 30:100, 40:110] = 1
    keypoints = torch.stack([torch.linspace(20.0, 60.0, 17), torch.linspace(35.0, 80.0, 17), torch.ones(17)], 1)
    target = {
        "boxes": boxes,
        "labels": torch.tensor([1, 1 if name.startswith("keypoint") else 2]),
        **({"masks": masks} if name.startswith("mask") else {}),
        **({"keypoints": keypoints.expand(2, -1, -1)} if name.startswith("keypoint") else {}),
    }
    return [dict(target) for _ in range(n_images)]


def _call_of(model: nn.Module, part: str, args: tuple[Any, ...]) -> CallArguments:
    calls: list[CallArguments] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(CallArguments(args, kwargs))

    handle = model.get_submodule(part).register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(*args)
    handle.remove()
    return calls[0]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", help="by default all of torchvision")
    parser.add_argument("--family", nargs="+", help="names of torchvision's files, e.g. resnet, vision_transformer")
    parser.add_argument("--task", nargs="+", choices=TASKS)
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--limit", type=float, default=1200.0, help="seconds for each model")
    parser.add_argument("--again", action="store_true", help="measure again what was measured before")
    parser.add_argument("--records", default="zoo", help="name of the file under benchmarks/out")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
