"""The pitch example with small networks in the place of the trained ones."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from examples import distill_pitch
from examples.distill_pitch import FIRST_BIN_CENTS, N_BINS, PitchNetwork, heard_pitches, tones


def test_a_tone_has_the_pitch_that_goes_with_it() -> None:
    frames, cents = tones(40, seed=3)
    assert torch.equal(frames, tones(40, seed=3)[0])
    torch.testing.assert_close(frames.mean(1), torch.zeros(40), atol=1e-5, rtol=0)
    torch.testing.assert_close(frames.std(1), torch.ones(40))
    assert 10 * 2 ** (float(cents.min()) / 1200) >= 50
    assert 10 * 2 ** (float(cents.max()) / 1200) <= 1000
    # A frame is like itself one period later; noise and glide leave most of that.
    likeness = []
    for frame, pitch in zip(frames, cents, strict=True):
        period = round(distill_pitch.RATE / (10 * 2 ** (float(pitch) / 1200)))
        likeness.append(float((frame[:-period] * frame[period:]).mean()))
    assert sorted(likeness)[len(likeness) // 2] > 0.6


def test_the_heard_pitch_is_the_mean_around_the_likeliest() -> None:
    logits = torch.full((1, N_BINS), -math.inf)
    logits[0, 100], logits[0, 101], logits[0, 200] = 3.0, 3.0, 2.0
    network = nn.Flatten()  # hands the logits on
    assert float(heard_pitches(network, logits)) == pytest.approx(FIRST_BIN_CENTS + 20 * 100.5)


def test_a_small_network_learns_of_a_large_one_without_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, width in (("full", 4), ("tiny", 2)):
        torch.manual_seed(width)
        torch.save(PitchNetwork([width] * 6).state_dict(), tmp_path / f"{name}.pth")
    arguments = ["--weights", str(tmp_path), "--frames", "40", "--test-frames", "10", "--epochs", "2"]
    distill_pitch.main([*arguments, "--batch-size", "10", "--cache", str(tmp_path / "cache")])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    names = [line.split(" | ")[0] for line in lines[1:]]
    assert names == [
        "| teacher, as it comes",
        "| small, as it comes",
        "| small, from scratch, distilled without labels, seed 0",
        "| small, from its trained weights, distilled without labels, seed 0",
        "| small, from scratch, with labels alone, seed 0",
    ]
    assert len(list((tmp_path / "cache").glob("*-done.bin"))) == 1
