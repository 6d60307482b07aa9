from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import ChannelPruning, QuantizationAwareTraining, sensitivity
from lightning_compress.report.sensitivity import Kind, SensitivityReport, SensitivityRow
from tests.compatibility.runs import LIGHTNING_NOISE
from tests.training import quiet_trainer
from tests.user_modules import LayersOnSelf, NetWithKeywords, loader

pytestmark = [pytest.mark.filterwarnings(message) for message in LIGHTNING_NOISE]


class Sum(LayersOnSelf):
    """Two hidden units of weight 1 and 10; the metric is what they add up to for an input of ones."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False)
        self.hidden.weight.data = torch.tensor([[1.0], [10.0]])
        self.out.weight.data = torch.ones(1, 2)

    def forward(self, image: Tensor) -> Tensor:
        return self.out(self.hidden(image.new_ones(len(image), 1)))  # type: ignore[no-any-return]

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("sum", self(batch["image"]).mean())


def test_the_figures_by_hand() -> None:
    report = sensitivity(Sum(), loader(8), "sum", channels=[0.5], bits=[2])
    assert report.baseline == 11.0
    found = {(row.name, row.kind): row.metric for row in report.rows}
    # Without the smaller unit 10 remains; a row of one weight is rounded to itself.
    assert found["hidden", "channels"] == 10.0
    assert found["hidden", "bits"] == pytest.approx(11.0)
    assert report.drop(report.rows[0]) == 1.0


@pytest.mark.parametrize("kind", [LayersOnSelf, NetWithKeywords])
def test_the_model_is_left_as_it_is_and_budgets_are_taken(kind: type[LayersOnSelf], tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = kind(16)
    before = copy.deepcopy(module.state_dict())
    report = sensitivity(module, loader(16), "val_acc", channels=[0.75, 0.5], bits=[4])
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())
    report.plot(tmp_path / "sensitivity.png")
    assert (tmp_path / "sensitivity.png").read_bytes()[:4] == b"\x89PNG"
    pruning = ChannelPruning(macs=0.9, round_to=1, budget=report.channel_budget(max_drop=1.0))
    quantization = QuantizationAwareTraining(start=0.6, freeze=0.8, overrides=report.weight_bits(max_drop=1.0))
    quiet_trainer(tmp_path, [pruning, quantization]).fit(module, loader(), loader(16))
    assert all(has >= 8 for _, has in pruning.widths.values())
    assert set(quantization.quantization.layer_bits.values()) <= {4, 8}


def test_a_budget_stops_before_the_first_amount_that_costs_too_much() -> None:
    trials: dict[Kind, tuple[float, ...]] = {"channels": (0.75, 0.5, 0.25), "bits": (4, 3, 2)}
    rows = tuple(
        SensitivityRow("conv", kind, amount, metric)
        for kind, amounts in trials.items()
        for amount, metric in zip(amounts, (0.89, 0.7, 0.9), strict=True)
    )
    report = SensitivityReport("val_acc", 0.9, True, rows)
    assert report.channel_budget(0.02) == {"conv": 0.75}
    assert report.weight_bits(0.02) == {"conv": {"weight_bits": 4}}
    assert report.channel_budget(0.5) == {"conv": 0.25}
    assert report.channel_budget(0.0) == {"conv": 1.0}
    assert report.weight_bits(0.0) == {"conv": {"weight_bits": 8}}


def test_where_less_is_better_a_gain_is_a_gain() -> None:
    report = SensitivityReport("val_loss", 1.0, False, (SensitivityRow("conv", "bits", 4, 1.5),))
    assert report.drop(report.rows[0]) == 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": [1.0]}, r"`channels` are shares that stay, in \(0, 1\), got 1.0."),
        ({"bits": [1]}, r"`bits` must be 2 to 8, got 1."),
        ({"importance": "taylor"}, r'`importance="taylor"` needs the gradients of a training.'),
        ({"metric": "accuracy"}, r"does not log `accuracy`; it logs `val_loss`, `val_acc`."),
    ],
)
def test_bad_arguments_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sensitivity(LayersOnSelf(), loader(8), **{"metric": "val_acc", **settings})
