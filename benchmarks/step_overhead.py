"""What quantization-aware training costs: the time of a training step over the plain step, and peak memory.

Forward, backward and the optimizer's step (SGD) on random images, interleaved in one process: in every round each
contender makes one step. Ours is measured in the quantized phase, with the callback's schedule (ranges are observed at
every 8th step, so every time is a mean over 8 steps where it says so), and before `start`, prepared but in float.
Peers are taken through their documented routes, where they are installed: torchao PT2E with its x86 quantizer, NNCF
(`nncf.quantize`, then training), Brevitas (`preprocess_for_quantize`, `quantize`) and ModelOpt (`INT8_DEFAULT_CFG`).

Peak memory is that of a fresh process for each contender: resident set on a CPU, the allocator's peak on a GPU, each
less what it was before the first step.

`--compile` measures networks through `torch.compile` instead: plain and ours.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.records import OUT, Row, machine, markdown_table, print_machine
from lightning_compress.quantization import Quantization, prepare

OBSERVE_EVERY = 8
"""The callback's default: steps between two observations of the ranges."""
WARM_UP = 8
"""Steps of each contender before the first one that counts; a compiled network compiles in them."""

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""The second is for a machine shared with others; threads that wait for one another count in it."""


@dataclass(frozen=True)
class Task:
    """A network and its input.

    Args:
        network: Name of the network, one of `NETWORKS`.
        batch_size: Images in a batch.
        pixels: Height and width of an image.
        device: ``"cpu"`` or ``"cuda"``.
        precision: ``"32"`` or ``"bf16-mixed"``.
    """

    network: str
    batch_size: int
    pixels: int
    device: str
    precision: str

    def images(self) -> Tensor:
        """Return a batch of random images."""
        return torch.randn(self.batch_size, 3, self.pixels, self.pixels, device=self.device)

    def labels(self) -> Tensor:
        """Return a batch of random labels."""
        return torch.randint(0, 1000, (self.batch_size,), device=self.device)

    def build(self) -> nn.Module:
        """Return the network, with the same random weights each time, in train mode."""
        torch.manual_seed(0)
        return NETWORKS[self.network](self).to(self.device).train()

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context of a forward pass."""
        if self.precision == "32":
            return contextlib.nullcontext()
        return torch.autocast(self.device, torch.bfloat16)

    def wait(self) -> None:
        """Wait until the device is done."""
        if self.device == "cuda":
            torch.cuda.synchronize()


def _vit_small(task: Task) -> nn.Module:
    network: nn.Module = torchvision.models.VisionTransformer(
        image_size=task.pixels, patch_size=16, num_layers=12, num_heads=6, hidden_dim=384, mlp_dim=1536
    )
    return network


NETWORKS: dict[str, Callable[[Task], nn.Module]] = {
    "resnet18": lambda _: torchvision.models.resnet18(),
    "mobilenet_v2": lambda _: torchvision.models.mobilenet_v2(),
    "vit_small": _vit_small,
    "resnet50": lambda _: torchvision.models.resnet50(),
}


@dataclass
class Contender:
    """A network in training.

    Args:
        network: What is called, perhaps compiled.
        owner: What holds the parameters.
        quantization: Its quantization, where it is ours and quantizes.
    """

    network: Callable[[Tensor], Tensor]
    owner: nn.Module
    quantization: Quantization | None = None
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.SGD(self.owner.parameters(), lr=1e-3)
        self.n_steps = 0

    def step(self, task: Task, images: Tensor, labels: Tensor) -> None:
        """Make one training step, as Lightning and our callback make it."""
        quantization = self.quantization
        if quantization is not None:
            quantization.is_quantizing = True
            quantization.is_observing = self.n_steps % OBSERVE_EVERY == 0
        self.optimizer.zero_grad()
        with task.autocast():
            loss = F.cross_entropy(self.network(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        if quantization is not None and quantization.is_observing:
            quantization.is_observing = False
            quantization.ranges.update()
        self.n_steps += 1


def plain(task: Task) -> Contender:
    """Return the network as it is."""
    network = task.build()
    return Contender(network, network)


def ours(task: Task) -> Contender:
    """Return the network in the quantized phase."""
    network = task.build()
    return Contender(network, network, prepare(network))


def ours_before_start(task: Task) -> Contender:
    """Return the network prepared, neither observing nor quantizing."""
    network = task.build()
    prepare(network)
    return Contender(network, network)


def torchao(task: Task) -> Contender:
    """Return torchao's: export, then the x86 quantizer's default scheme for training."""
    pt2e = importlib.import_module("torchao.quantization.pt2e")
    workflow = importlib.import_module("torchao.quantization.pt2e.quantize_pt2e")
    x86 = importlib.import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    exported = torch.export.export(task.build(), (task.images(),), strict=True).module()
    network = workflow.prepare_qat_pt2e(exported, quantizer)
    pt2e.move_exported_model_to_train(network)
    return Contender(network, network)


def nncf(task: Task) -> Contender:
    """Return NNCF's: post-training quantization, then training."""
    library = importlib.import_module("nncf")
    library.set_log_level(50)
    dataset = library.Dataset([task.images()[:1]] * 2)
    network = library.quantize(task.build().eval(), dataset, subset_size=2).train()
    return Contender(network, network)


def brevitas(task: Task) -> Contender:
    """Return Brevitas': its FX flow at its default bits, 8."""
    library = importlib.import_module("brevitas.graph.quantize")
    network = library.quantize(library.preprocess_for_quantize(task.build().eval())).to(task.device).train()
    return Contender(network, network)


def modelopt(task: Task) -> Contender:
    """Return ModelOpt's: its default int8 configuration, calibrated on a batch."""
    quantization = importlib.import_module("modelopt.torch.quantization")
    images = task.images()
    network = quantization.quantize(task.build().eval(), quantization.INT8_DEFAULT_CFG, lambda model: model(images))
    return Contender(network.train(), network)


def compiled(make: Callable[[Task], Contender]) -> Callable[[Task], Contender]:
    """Return a maker of contenders whose network is compiled."""

    def make_compiled(task: Task) -> Contender:
        contender = make(task)
        contender.network = torch.compile(contender.owner)
        return contender

    return make_compiled


CONTENDERS: dict[str, tuple[Callable[[Task], Contender], str]] = {
    "plain": (plain, "torch"),
    "ours": (ours, "torch"),
    "ours, before start": (ours_before_start, "torch"),
    "ModelOpt": (modelopt, "nvidia-modelopt"),
    "torchao PT2E": (torchao, "torchao"),
    "NNCF": (nncf, "nncf"),
    "Brevitas": (brevitas, "brevitas"),
}
"""What makes each contender, and the distribution whose version counts."""
MODULES = {"torchao": "torchao", "nncf": "nncf", "brevitas": "brevitas", "nvidia-modelopt": "modelopt"}

COMPILED = {
    "plain": (plain, "torch"),
    "plain, compiled": (compiled(plain), "torch"),
    "ours": (ours, "torch"),
    "ours, compiled": (compiled(ours), "torch"),
    "ours, before start, compiled": (compiled(ours_before_start), "torch"),
}


def measure(
    task: Task, names: Sequence[str], n_rounds: int, clock: Callable[[], float] = time.perf_counter
) -> list[Row]:
    """Time the contenders' steps in turn.

    Args:
        task: What to train.
        names: The contenders; the first is the one the others are divided by.
        n_rounds: Steps of each that count.
        clock: Tells the time in seconds.

    Returns:
        A row for each contender that could be made, and the reason for each that could not.
    """
    images, labels = task.images(), task.labels()
    rows: dict[str, Row] = {}
    running: dict[str, Contender] = {}
    for name in names:
        make, library = {**CONTENDERS, **COMPILED}[name]
        if library in MODULES and importlib.util.find_spec(MODULES[library]) is None:
            rows[name] = {"contender": name, "skipped": "not installed"}
            continue
        rows[name] = {"contender": name, "version": version(library)}
        try:
            contender = make(task)
            for _ in range(WARM_UP + 1):
                contender.step(task, images, labels)
            running[name] = contender
        except Exception as error:  # whatever a peer raises is its result here
            rows[name]["skipped"] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
        print(name, "ready" if name in running else rows[name]["skipped"], flush=True)
    for _ in range(n_rounds):
        for contender in running.values():
            task.wait()
            started = clock()
            contender.step(task, images, labels)
            task.wait()
            contender.seconds.append(clock() - started)
    reference = running[names[0]].seconds
    for name, contender in running.items():
        rows[name] |= {
            "ms (least)": round(min(contender.seconds) * 1e3, 2),
            "ms (median)": round(statistics.median(contender.seconds) * 1e3, 2),
            "ratio of minima": round(min(contender.seconds) / min(reference), 3),
            "ratio of medians": round(statistics.median(contender.seconds) / statistics.median(reference), 3),
            "ratio of observing steps": _observing_ratio(contender, reference),
        }
    return list(rows.values())


def _observing_ratio(contender: Contender, reference: Sequence[float]) -> float | None:
    if contender.quantization is None:
        return None
    # The warm-up makes OBSERVE_EVERY + 1 steps, so the rounds begin with step 9 and step 16 is the first to observe.
    first = -(WARM_UP + 1) % OBSERVE_EVERY
    return round(min(contender.seconds[first::OBSERVE_EVERY], default=float("nan")) / min(reference), 3)


def peak_mib(task: Task, name: str) -> float:
    """Return by how many MiB the steps of one contender raise the peak memory of this, a fresh, process."""
    make, _ = {**CONTENDERS, **COMPILED}[name]
    images, labels = task.images(), task.labels()
    contender = make(task)
    before = _memory(task)
    for _ in range(WARM_UP + 2):
        contender.step(task, images, labels)
    return round((_memory(task, peak=True) - before) / 2**20, 1)


def _memory(task: Task, peak: bool = False) -> float:
    if task.device == "cuda":
        return float(torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated())
    if peak:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
    with open("/proc/self/statm") as file:
        return float(file.read().split()[1]) * resource.getpagesize()


def _peak_in_a_fresh_process(name: str, arguments: Sequence[str]) -> float | None:
    command = [sys.executable, "-m", "benchmarks.step_overhead", *arguments, "--peak-of", name]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return float(json.loads(found.stdout.splitlines()[-1])) if found.returncode == 0 else None


def main() -> None:
    """Measure one network and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet18", choices=NETWORKS)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--pixels", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=64, help="training steps of each contender that are timed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", default="wall", choices=CLOCKS, help="cpu: the process's own time, with one thread")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="32", choices=["32", "bf16-mixed"])
    parser.add_argument("--compile", action="store_true", help="measure compiled networks: plain and ours")
    parser.add_argument("--only", nargs="+", help="contenders to measure besides plain")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")  # the peers' own
    torch.set_num_threads(options.threads)
    task = Task(options.network, options.batch_size, options.pixels, options.device, options.precision)
    if options.peak_of:
        print(json.dumps(peak_mib(task, options.peak_of)))
        return
    print_machine()
    choice = COMPILED if options.compile else CONTENDERS
    names = ["plain", *(options.only or [name for name in choice if name != "plain"])]
    rows = measure(task, names, options.rounds, CLOCKS[options.clock])
    if not options.no_memory:
        add_memory(rows)
    name = f"step_overhead_{task.network}_{task.device}_{task.precision}{'_compiled' if options.compile else ''}"
    name += "" if options.clock == "wall" else "_cpu_time"
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / f"{name}.json").write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")
    print(f"\n{task.network}, {task.pixels} px, batch {task.batch_size}, {task.device}, {task.precision}\n")
    columns = dict.fromkeys(column for row in rows for column in row)
    print(markdown_table([{column: row.get(column, "") for column in columns} for row in rows]))


def add_memory(rows: Sequence[Row]) -> None:
    """Measure the peak memory of every contender that was timed, each in a process of its own."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--compile"]
    reference = None
    for row in rows:
        if "skipped" in row:
            continue
        peak = _peak_in_a_fresh_process(row["contender"], arguments)
        reference = reference or peak
        row["peak MiB"] = peak
        row["ratio of peaks"] = round(peak / reference, 2) if peak and reference else None


if __name__ == "__main__":
    main()
