"""Models that cannot be exported as a whole: what is said, and that the part that is offered can be."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.export import export_onnx
from lightning_compress.export.arguments import CallArguments
from lightning_compress.export.parts import UnexportableError, exportable_part
from tests.small_networks import images, quantized


class Heads(nn.Module):
    """Keeps the positions that score above the mean, and decides by their number."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(8, 1)

    def forward(self, features: list[Tensor]) -> Any:
        rows = features[0].flatten(2).transpose(1, 2).flatten(0, 1)
        scores = self.score(rows)[:, 0]
        kept = rows[scores > scores.mean()]
        return kept if len(kept) > 3 else rows


class Detector(nn.Module):
    """A backbone that can be exported and heads that cannot, like a detection network."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        self.heads = Heads()

    def forward(self, x: Tensor) -> Any:
        return self.heads([self.backbone(x)])


class Wrapper(nn.Module):
    """Holds the whole network as its only child."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Detector()

    def forward(self, x: Tensor) -> Any:
        return self.network(x)


@pytest.mark.parametrize("is_quantized", [False, True])
def test_the_sentence_names_what_stands_in_the_way_and_what_can_be_exported(is_quantized: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Detector()
    quantized(model).is_quantizing = is_quantized
    with pytest.raises(UnexportableError) as caught:
        export_onnx(model, images(), tmp_path / "model.onnx")
    head, _, tail = str(caught.value).partition(" (")
    assert head == "`Detector` cannot be exported as a whole, because `torch.export` cannot follow its `heads`"
    assert tail.rpartition("), ")[2] == (
        'but its `backbone` can: `OnnxExport(..., module="backbone")`, or `export_onnx(model.backbone, ...)`.'
    )
    assert "data-dependent" in tail
    assert export_onnx(model.backbone, images(), tmp_path / "model.onnx").parity.snr_db > 40.0


def test_a_part_inside_the_only_child_is_found(tmp_path: Path) -> None:
    with pytest.raises(UnexportableError) as caught:
        export_onnx(Wrapper(), images(), tmp_path / "model.onnx")
    assert caught.value.part == "network.backbone"


class Decides(nn.Module):
    """One layer, and a decision by its values."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4, 4))

    def forward(self, x: Tensor) -> Any:
        y = x @ self.weight
        return y if y.sum() > 0 else x


def test_where_no_part_can_be_exported_the_sentence_says_so(tmp_path: Path) -> None:
    with pytest.raises(UnexportableError) as caught:
        export_onnx(nn.Sequential(Decides()), torch.rand(2, 4), tmp_path / "model.onnx")
    assert caught.value.part == ""
    assert str(caught.value).endswith(
        "), and no part of it with many of its parameters can: keep what depends on values out of the forward."
    )


def test_the_largest_part_that_works_is_offered() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 8), nn.Linear(8, 2))
    tried: list[str] = []

    def export(part: nn.Module, inputs: CallArguments) -> None:
        tried.append(next(name for name, module in model.named_modules() if module is part))
        assert part is not model[1], "cannot be exported"

    assert exportable_part(model, CallArguments((torch.rand(1, 4),), {}), export) == "0"
    assert tried == ["1", "0"]


class Pair:
    """No tensor, though it holds one."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


class TakesPair(nn.Module):
    """Takes an object that no file can."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, pair: Pair) -> Any:
        return self.layer(pair.x)


class MakesPair(nn.Module):
    """Hands its child an object."""

    def __init__(self) -> None:
        super().__init__()
        self.child = TakesPair()

    def forward(self, x: Tensor) -> Any:
        return self.child(Pair(x))


def test_a_part_that_takes_what_no_file_can_is_not_offered() -> None:
    inputs = CallArguments((torch.rand(1, 4),), {})
    assert exportable_part(MakesPair(), inputs, lambda part, inputs: None) == "child.layer"


def test_the_error_is_pickled_and_told_from_the_users_module() -> None:
    error = UnexportableError("Detector", "heads", "values decide", "backbone")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    inner = error.within("net")
    assert str(inner).endswith('`OnnxExport(..., module="net.backbone")`, or `export_onnx(model.net.backbone, ...)`.')
    assert str(error.within("")) == str(error)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated", "ignore:The .grad attribute of a Tensor")
def test_a_scripted_part_is_no_obstacle_to_saying_what_can_be_exported() -> None:
    model = nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU())), nn.Linear(4, 64))
    with pytest.raises(UnexportableError) as caught:
        export_onnx(model, torch.rand(2, 4), "never.onnx")
    assert "cannot be exported as a whole" in str(caught.value)
    assert caught.value.part == "1"
