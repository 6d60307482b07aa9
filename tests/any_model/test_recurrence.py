"""Recurrent networks: torch's layers in float between integer layers, cells written out, states passed in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.export.arguments import CallArguments
from tests.any_model.inputs import random_values
from tests.any_model.journey import Example, check

SEQUENCE = random_values(6, 5)


class Recurrent(nn.Module):
    """A recurrent layer between a convolution over time and a linear layer."""

    def __init__(self, recurrent: nn.Module, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(5, 8, 3, padding=1)
        self.recurrent = recurrent
        self.fc = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.conv(x.transpose(1, 2))).transpose(1, 2)
        return self.fc(self.recurrent(x)[0][:, -1])


class StatePassed(nn.Module):
    """One step of a recurrent network; its state comes in and goes out (streaming)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.cell = nn.LSTMCell(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> Any:
        hidden, memory = self.cell(torch.relu(self.embed(x)), state)
        return self.head(hidden), (hidden, memory)


class WrittenOut(nn.Module):
    """A gated recurrent unit of linear layers, over time by a loop, each called at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.gates, self.candidate = nn.Linear(5 + 8, 16), nn.Linear(5 + 8, 8)

    def forward(self, x: Tensor, hidden: Tensor) -> Any:
        for step in x.unbind(1):
            reset, update = torch.sigmoid(self.gates(torch.cat([step, hidden], 1))).chunk(2, 1)
            candidate = torch.tanh(self.candidate(torch.cat([step, reset * hidden], 1)))
            hidden = update * hidden + (1 - update) * candidate
        return hidden


def one_step(n_samples: int, seed: int) -> CallArguments:
    """Return an input with a state."""
    state = (random_values(8)(n_samples, seed + 1).tanh(), random_values(8)(n_samples, seed + 2))
    return CallArguments((random_values(5)(n_samples, seed), state), {})


def with_hidden(n_samples: int, seed: int) -> CallArguments:
    """Return three steps with a hidden state."""
    return CallArguments((random_values(3, 5)(n_samples, seed), torch.zeros(n_samples, 8)), {})


TORCH_LAYERS = {
    "LSTM": lambda: Recurrent(nn.LSTM(8, 6, bidirectional=True, batch_first=True), 12),
    "GRU": lambda: Recurrent(nn.GRU(8, 6, num_layers=2, batch_first=True), 6),
}


@pytest.mark.parametrize("name", TORCH_LAYERS)
def test_recurrent_layers_stay_in_float_and_the_rest_runs_in_integers(name: str, tmp_path: Path) -> None:
    example = Example(TORCH_LAYERS[name], SEQUENCE, {"conv": (1, 1), "gemm": (1, 1)})
    assert check(example, tmp_path).floats == {"recurrent": "no integer form"}


def test_a_state_passed_in_and_out_keeps_its_place(tmp_path: Path) -> None:
    journey = check(Example(StatePassed, one_step, {"gemm": (2, 4)}), tmp_path)
    assert journey.result.input_names == ("x", "state_0", "state_1")
    assert journey.result.output_names == ("output_0", "output_1", "output_2")


def test_a_cell_written_out_has_one_grid_for_every_step(tmp_path: Path) -> None:
    check(Example(WrittenOut, with_hidden, {"gemm": (6, 6)}), tmp_path)
