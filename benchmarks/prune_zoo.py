"""Coverage of channel pruning: torchvision's classifiers and segmentation networks at half the multiply-accumulates.

Each model has random weights and batch-norm statistics from real forward passes, and runs in a process of its own:
find which channels go together (every removal is proved in float64), plan half of the multiply-accumulates, mask,
remove, compare the masked and the removed network in float64, one training step of the small network, export to ONNX
with its proof in ONNX Runtime, and read the shapes of the weights from the file.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

from benchmarks.records import Records, markdown_table, print_machine
from benchmarks.zoo_models import (
    Progress,
    batch_size_of,
    build,
    inputs_of,
    loss_of,
    measure_alone,
    task_of,
    warm_up,
    zoo_names,
)
from lightning_compress import export_onnx, shrink
from lightning_compress.callbacks.shrinking import check_shrunk
from lightning_compress.pruning.channels.groups import find_channel_groups
from lightning_compress.pruning.channels.importance import channel_importance
from lightning_compress.pruning.channels.places import removed_places
from lightning_compress.pruning.channels.plan import CostModel, plan_channels
from lightning_compress.report import model_statistics

TASKS_PRUNED = ("classification", "segmentation")

FLOOR = 0.02
"""Least share of its channels that a group keeps: where residual streams stay, hidden layers bear it all."""


def main() -> None:
    """Measure what is missing and print the table; with ``--child``, measure one model."""
    options = _parse()
    if options.child:
        _child(options.child, Path(options.folder), options.macs)
        return
    print_machine()
    records = Records("prune_zoo")
    names = options.models or [name for name in zoo_names() if task_of(name) in TASKS_PRUNED]
    if options.again:
        records.drop(lambda row: row["model"] in names)
    missing = [name for name in names if records.find(model=name) is None]
    with ThreadPoolExecutor(options.jobs) as pool:
        futures = {pool.submit(measure_alone, "prune_zoo", name, options.limit): name for name in missing}
        for future in as_completed(futures):
            records.get(future.result, model=futures[future])
    rows = [row for name in names if (row := records.find(model=name)) is not None]
    print(f"\n{markdown_table([_line(row) for row in rows])}")


def _line(row: dict[str, Any]) -> dict[str, Any]:
    if "macs" not in row:
        return {**dict.fromkeys(_COLUMNS, ""), "model": row["model"], "status": row["status"]}
    return {
        "model": row["model"],
        "status": row["status"],
        "groups": row["groups"],
        "channels that can go": f"{100 * row['free']:.0f} %",
        "MACs left": f"{100 * row['macs']:.1f} %",
        "parameters left": f"{100 * row['parameters']:.0f} %",
        "masked - removed": f"{row['difference']:.0e}",
        "ONNX Runtime - torch, dB": f"{row['snr_db']:.0f}" if "snr_db" in row else "",
        "file / dense weights": f"{row['bytes'] / row['dense_bytes']:.2f}" if "bytes" in row else "",
        "left alone": ", ".join(f"{count}: {reason}" for reason, count in row["left_alone"].items()),
        "s": round(row["seconds"]),
    }


_COLUMNS = (
    "model",
    "status",
    "groups",
    "channels that can go",
    "MACs left",
    "parameters left",
    "masked - removed",
    "ONNX Runtime - torch, dB",
    "file / dense weights",
    "left alone",
    "s",
)


def _child(name: str, folder: Path, share: float) -> None:
    torch.manual_seed(0)
    progress = Progress(folder / "result.json")
    with progress.stage("build"):
        model = build(name)
        weight_bytes = 4 * sum(parameter.numel() for parameter in model.parameters())
        size = batch_size_of(name, weight_bytes)
        warm_up(model, name, size)
        model.eval()
        args = inputs_of(name, size, seed=0)
        before = model_statistics(model, args)
    with progress.stage("find"):
        found = find_channel_groups(model, args)
        # Names of layers are left out, so that reasons can be counted.
        reasons = Counter(re.sub(r" in `[^`]*`$", "", reason) for reason in found.left_alone.values())
        n_free = sum(len(member.channels) for group in found.groups for member in group.members if member.side == "out")
        n_made = sum(layer.weight.shape[0] for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear))
        progress.row |= {
            "groups": len(found.groups),
            "left_alone": dict(reasons.most_common()),
            "free": n_free / n_made,
            "dense_bytes": weight_bytes,
        }
    with progress.stage("plan"):
        cost = CostModel(model, found.groups, found.costs, before.macs)
        whole = [torch.ones(group.n_units, dtype=torch.bool) for group in found.groups]
        scores = channel_importance(model, found.groups, "l2")
        floors = [FLOOR] * len(found.groups)
        kept = plan_channels(found.groups, scores, whole, cost, share, scope="layer", floors=floors)
    with progress.stage("remove"):
        with torch.no_grad():
            for place in removed_places(model, found.groups, kept):
                place.clear_(model.get_parameter(place.parameter))
        small, _ = shrink(model, tuple(args))
        difference = check_shrunk(model, small, found.groups, kept, [(args, {})])
        after = model_statistics(small, args)
        progress.row |= {
            "macs": after.macs / before.macs,
            "parameters": after.parameters / before.parameters,
            "difference": difference,
        }
        assert abs(after.macs / before.macs - share) <= 0.01, f"{after.macs / before.macs:.3f} of the MACs remain"
    with progress.stage("train"):
        optimizer = torch.optim.SGD(small.parameters(), 1e-5)
        loss = loss_of(small.train(), name, size, seed=100)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        small.eval()
    with progress.stage("export"):
        result = export_onnx(small, args, folder / "small.onnx")
        progress.row |= {
            "status": "ok",
            "snr_db": min(result.parity.snr_db, 200.0),
            "bytes": _bytes(folder / "small.onnx"),
        }
        shapes = {tuple(item.dims) for item in onnx.load(folder / "small.onnx").graph.initializer}
        ran = _convolutions_that_run(small, args)
        assert {tuple(layer.weight.shape) for layer in ran} <= shapes, "the file holds convolutions of other shapes"


def _convolutions_that_run(model: nn.Module, args: tuple[Any, ...]) -> list[nn.Conv2d]:
    """Return the convolutions that one forward calls: auxiliary heads run in training alone, and are in no file."""
    found: list[nn.Conv2d] = []
    convolutions = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    handles = [layer.register_forward_hook(lambda layer, *_: found.append(layer)) for layer in convolutions]
    with torch.no_grad():
        model(*args)
    for handle in handles:
        handle.remove()
    return found


def _bytes(path: Path) -> int:
    return sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*"))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", help="by default all classifiers and segmentation networks")
    parser.add_argument("--macs", type=float, default=0.5, help="share of the multiply-accumulates that remains")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--limit", type=float, default=1200.0, help="seconds for each model")
    parser.add_argument("--again", action="store_true", help="measure again what was measured before")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
