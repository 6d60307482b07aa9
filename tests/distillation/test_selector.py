import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_compress.distillation import OutputSelector, check_selector, select_logits

LOGITS = torch.tensor([[1.0, 2.0]])


@dataclass
class Output:
    logits: Tensor
    scores: Tensor


@pytest.mark.parametrize(
    ("output", "selector"),
    [
        (LOGITS, None),
        ({"logits": LOGITS, "features": torch.zeros(3)}, None),
        (Output(logits=LOGITS, scores=torch.zeros(3)), None),
        ({"main": LOGITS}, "main"),
        (Output(logits=torch.zeros(3), scores=LOGITS), "scores"),
        ((torch.zeros(3), LOGITS), 1),
        ([torch.zeros(3), LOGITS], -1),
        ({"aux": [torch.zeros(3), LOGITS]}, lambda output: output["aux"][1]),
    ],
)
def test_the_selector_finds_the_logits(output: Any, selector: OutputSelector) -> None:
    assert select_logits(output, selector, "student") is LOGITS


@pytest.mark.parametrize(
    ("output", "selector", "sought", "found"),
    [
        ((LOGITS, LOGITS), None, "`logits`", "a tuple of Tensor, Tensor"),
        ({"main": LOGITS}, None, "`logits`", "a dict with the keys 'main'"),
        ({"main": LOGITS}, "head", "`output='head'`", "a dict with the keys 'main'"),
        ({"main": None}, "main", "`output='main'`", "a dict with the keys 'main'"),
        (LOGITS, 1, "`output=1`", "a Tensor of shape (1, 2)"),
        ((LOGITS,), 1, "`output=1`", "a tuple of Tensor"),
        (None, None, "`logits`", "a NoneType"),
    ],
)
def test_an_output_without_the_logits_is_described(
    output: Any, selector: OutputSelector, sought: str, found: str
) -> None:
    message = (
        f"No tensor of logits was found by {sought} in the teacher's output, which is {found}: "
        f"pass `output` as a key, a position or a function of the output."
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        select_logits(output, selector, "teacher")


@pytest.mark.parametrize(("selector", "kind"), [(0.5, "float"), (True, "bool"), (["logits"], "list")])
def test_what_cannot_select_is_refused(selector: object, kind: str) -> None:
    message = f"`output` must be a key (str), a position (int), a callable or None, got {kind}."
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        check_selector(selector)
