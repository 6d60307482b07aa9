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
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from benchmarks.records import Records, markdown_table, print_machine
from benchmarks.zoo_models import (
    TASKS,
    Progress,
    batch_size_of,
    build,
    family_of,
    inputs_of,
    loss_of,
    measure_alone,
    task_of,
    warm_up,
    zoo_names,
)
from lightning_compress.errors import ParityError
from lightning_compress.export import export_onnx
from lightning_compress.export.arguments import CallArguments, names_of_inputs, tensors_of
from lightning_compress.export.audit import AuditReport, audit
from lightning_compress.export.parity import compare_outputs
from lightning_compress.export.parts import UnexportableError
from lightning_compress.quantization import prepare


def main() -> None:
    """Measure what is missing and print the table; with ``--child``, measure one model."""
    options = _parse()
    if options.child:
        _child(options.child, Path(options.folder))
        return
    print_machine()
    records = Records(options.records)
    names = options.models or zoo_names()
    names = [name for name in names if not options.family or family_of(name) in options.family]
    names = [name for name in names if not options.task or task_of(name) in options.task]
    if options.again:
        records.drop(lambda row: row["model"] in names)
    missing = [name for name in names if records.find(model=name) is None]
    with ThreadPoolExecutor(options.jobs) as pool:
        futures = {pool.submit(measure_alone, "zoo", name, options.limit): name for name in missing}
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


def _child(name: str, folder: Path) -> None:
    torch.manual_seed(0)
    progress = Progress(folder / "result.json")
    with progress.stage("build"):
        model = build(name)
        weight_bytes = 4 * sum(parameter.numel() for parameter in model.parameters())
        progress.row["weight_bytes"] = weight_bytes
        size = batch_size_of(name, weight_bytes)
        warm_up(model, name, size)
    with progress.stage("prepare"):
        quantization = prepare(model)
    with progress.stage("train"):
        optimizer = torch.optim.SGD(model.parameters(), 1e-5)
        quantization.is_quantizing = quantization.is_observing = True
        for step in range(2):
            optimizer.zero_grad()
            loss = loss_of(model, name, size, seed=100 + step)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            quantization.ranges.update()
        optimizer.zero_grad()
        quantization.is_observing = False
        progress.row["loss"] = float(loss.detach())
        progress.row["unreached"] = quantization.unreached_layers()
        progress.row["untraceable"] = {name: why[:100] for name, why in quantization.untraceable.items()}
    model.eval()
    path, args = folder / "model.onnx", inputs_of(name, size, seed=0)
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
