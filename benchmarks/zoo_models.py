"""The models of torchvision for benchmarks: built with random weights, warmed up, fed, and measured each on its own."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torchvision import models

from lightning_compress.graph import Operation, trace_program

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


def zoo_names() -> list[str]:
    return [name for module in TASKS.values() for name in models.list_models(module)]


def task_of(name: str) -> str:
    return next(task for task, module in TASKS.items() if name in models.list_models(module))


def family_of(name: str) -> str:
    family = models.get_model_builder(name).__module__.rpartition(".")[2]
    return f"{family}/video" if task_of(name) == "video" and family in ("resnet", "swin_transformer") else family


def measure_alone(program: str, name: str, limit_s: float) -> dict[str, Any]:
    """Measure one model in a process of its own, which may run out of time or memory.

    Args:
        program: Name of the module under `benchmarks` that does it, with ``--child`` and ``--folder``.
        name: Name of the model.
        limit_s: Seconds until it is stopped.

    Returns:
        What the process has told, with its status.
    """
    begun = time.perf_counter()
    row: dict[str, Any] = {"family": family_of(name), "task": task_of(name)}
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", f"benchmarks.{program}", "--child", name, "--folder", folder]
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


class Progress:
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


def build(name: str) -> nn.Module:
    keywords: dict[str, Any] = {"weights": None, **KEYWORDS.get(name, {})}
    task = task_of(name)
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


def warm_up(model: nn.Module, name: str, size: int) -> None:
    """Give batch norms the statistics of real inputs: 0 and 1 belong to no trained network."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # an equal average over the batches
    with torch.no_grad():
        for seed in range(3 if norms else 0):
            loss_of(model, name, size, seed)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def loss_of(model: nn.Module, name: str, size: int, seed: int) -> Tensor:
    args, task = inputs_of(name, size, seed), task_of(name)
    if task == "detection":
        return torch.stack(list(model(*args, _targets(name, len(args[0]))).values())).sum()
    outputs = [leaf for leaf in pytree.tree_leaves(model(*args)) if isinstance(leaf, Tensor)]
    if task == "optical flow":
        return torch.stack([output.abs().mean() for output in outputs]).mean()
    return torch.stack([F.cross_entropy(output, output.detach().argmin(1)) for output in outputs]).sum()


def inputs_of(name: str, size: int, seed: int) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)
    task = task_of(name)
    pixels = SIZES.get(family_of(name), (128, 128) if task == "detection" else (64, 64))
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


def batch_size_of(name: str, weight_bytes: float) -> int:
    """Return how many images a model is given at a time."""
    size = 2 if weight_bytes > GIANT_BYTES or task_of(name) not in ("classification", "segmentation") else 4
    return {"mvit": 1, "s3d": 1, "maxvit": 2}.get(family_of(name), size)
