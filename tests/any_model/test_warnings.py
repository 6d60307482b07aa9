"""What a fit tells about parts of a network that stay in float or are dead: once, and by name."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import QuantizationAwareTraining
from tests.training import quiet_trainer
from tests.user_modules import LayersOnSelf, loader

pytestmark = pytest.mark.filterwarnings(
    "ignore:The '.*dataloader' does not have many workers", "ignore:The number of training batches"
)


class ReadsRows(LayersOnSelf):
    """Reads images row by row with recurrent layers."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.cells = nn.ModuleList([nn.GRUCell(8, 8)])

    def forward(self, image: Tensor) -> Tensor:
        rows, _ = self.lstm(image[:, 0])
        logits: Tensor = self.fc(self.cells[0](rows[:, -1]))
        return logits


class NeverFires(LayersOnSelf):
    """Its last ReLU gives nothing but zeros, and the loss takes care that it stays so."""

    def forward(self, image: Tensor) -> Tensor:
        features = torch.relu(super().forward(image) - 100.0)
        logits: Tensor = features + image.mean((1, 2, 3)).unsqueeze(1)
        return logits


def messages(model: LayersOnSelf, folder: Path) -> list[str]:
    """Fit ``model`` for a few steps; return what was warned of."""
    torch.manual_seed(0)
    trainer = quiet_trainer(folder, [QuantizationAwareTraining(start=0.5)], max_epochs=1, limit_val_batches=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model, loader(32))
    return [str(item.message) for item in caught]


def test_recurrent_layers_that_stay_in_float_are_named_in_one_warning(tmp_path: Path) -> None:
    found = [message for message in messages(ReadsRows(), tmp_path) if "Recurrent" in message]
    assert found == [
        "Recurrent layers have no integer form: `lstm`, `cells.0` stay in float, the layers around them are quantized. "
        "Cells written out with linear layers are quantized too."
    ]


def test_values_that_were_always_zero_are_named_in_one_warning(tmp_path: Path) -> None:
    found = [message for message in messages(NeverFires(), tmp_path) if "zero" in message]
    assert found == [
        "Nothing but zeros was observed at `relu_2`. What leads there is dead: it learns nothing and ships as zeros. "
        "Check the initialization and the learning rate."
    ]


def test_a_network_without_such_parts_is_fitted_without_a_word(tmp_path: Path) -> None:
    assert [message for message in messages(LayersOnSelf(), tmp_path) if "float" in message or "zero" in message] == []
