"""What a forward may decide by where its shapes are known: all but the batch, and nothing may stay on its modules."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.quantization import calibrate, prepare
from lightning_compress.quantization.rewrite import MAX_CALL_KEYS
from tests.quantization.test_shaped_modules import SamePadding


class Decides(nn.Module):
    """A linear layer before and after a decision, of a forward that looks at an even size first."""

    def __init__(self, decision: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.decision = decision

    def forward(self, x: Tensor) -> Any:
        if x.shape[1] % 2:
            x = F.pad(x, (0, 1))
        return self.last(self.decision(self.first(x)))


def in_groups(x: Tensor) -> Tensor:
    group = min(4, x.shape[0])
    return x - x.view(group, -1, x.shape[1])[:, :1].mean(0).repeat(x.shape[0], 1)[: x.shape[0]]


DECISIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "more than four samples": lambda x: x * 2 if x.shape[0] > 4 else x,
    "one sample": lambda x: x * 3 if x.shape[0] == 1 else x,
    "groups of at most four": in_groups,
    "a chunk for every four samples": lambda x: torch.cat([part.cumsum(0) for part in x.chunk(max(1, len(x) // 4))]),
    "parts of four samples": lambda x: torch.cat([part * 2 for part in torch.split(x, 4)]),
    "a factor": lambda x: x * (x.shape[0] // 4),
    "the largest size": lambda x: x * max(x.shape),
    "the number of values": lambda x: x * 2 if x.numel() >= 64 else x,
    "two halves": lambda x: x.chunk(2, 0)[-1],
    "the first two": lambda x: x[:2] * x[:2].shape[0],
    "the layout": lambda x: x if x.is_contiguous() else x * 2,
}


@pytest.mark.parametrize("name", DECISIONS)
def test_no_batch_is_treated_as_another_would_be(name: str) -> None:
    torch.manual_seed(0)
    model = Decides(DECISIONS[name])
    plain = copy.deepcopy(model)
    quantization = prepare(model)
    quantization.is_observing = True
    for _ in range(2):
        for size in (8, 3, 1, 16, 64):
            x = torch.randn(size, 3)
            assert torch.equal(model(x), plain(x))
            quantization.ranges.update()


class Caches(nn.Module):
    """Keeps a table as long as its input, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.table: Tensor | None = None
        self.calls = 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        if self.table is None or self.table.shape[0] != x.shape[1]:
            self.table = torch.arange(x.shape[1], dtype=x.dtype)
        return x + self.table


class HoldsCaches(nn.Module):
    """Calls it after a look at a size."""

    def __init__(self) -> None:
        super().__init__()
        self.caches, self.last = Caches(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.caches(F.pad(x, (0, 1)) if x.shape[1] % 2 else x))


def test_children_that_ran_for_their_shapes_keep_nothing_of_it() -> None:
    model, met = HoldsCaches(), list[type]()
    model.caches.register_forward_hook(lambda module, args, result: met.append(type(result)))
    quantization = prepare(model)
    quantization.is_observing = True
    for count in range(1, 4):
        model(torch.randn(2, 3))
        quantization.ranges.update()
        assert model.caches.calls == count
    assert met == [Tensor] * 3
    assert type(model.caches.table) is Tensor
    pickle.dumps(model.caches.table)


class InFloat(nn.Module):
    """A softmax in float32 whatever the precision around it, after a look at a size."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        h = self.first(F.pad(x, (0, 1)) if x.shape[1] % 2 else x)
        h = h.softmax(-1, dtype=torch.float32).to(h.dtype)
        return self.last(h * 2 if h.dtype is torch.bfloat16 else h)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_every_precision_has_its_own_graph(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = InFloat().to(dtype)
    x = torch.randn(2, 3, dtype=dtype)
    expected = model(x)
    calibrated = prepare(model)
    calibrate(model, [x])
    calibrated.is_observing = True
    assert calibrated.untraceable == {}
    assert torch.equal(model(x), expected)


def test_precision_that_is_switched_on_for_a_while_has_its_own_graph() -> None:
    torch.manual_seed(0)
    model = InFloat()
    x = torch.randn(2, 3)
    expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected_in_bfloat16 = model(x)
        quantization = prepare(model)
        calibrate(model, [x])
    quantization.is_observing = True
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(x), expected_in_bfloat16)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("first", [9, 8])
def test_a_batch_norm_folds_into_what_is_before_it_at_every_size(first: int) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8)
    nn.init.constant_(norm.weight, 10.0)
    nn.init.constant_(norm.bias, 3.0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), SamePadding(8, 8, 3, stride=2, bias=False), norm, nn.ReLU(), nn.Conv2d(8, 4, 1)
    ).eval()
    plain = copy.deepcopy(model)
    quantization = prepare(model)
    images = {size: torch.randn(64, 3, size, size) for size in (first, 17 - first)}
    calibrate(model, images.values())
    quantization.is_quantizing = True
    for x in images.values():
        assert (model(x) - plain(x)).norm() < 0.03 * plain(x).norm()
    assert {row.quantizer for row in quantization.rows if row.name in ("1.conv2d", "2", "3")} == {"3"}


class CountedPadding(nn.Module):
    """Called with a whole number, which is another one every time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, step: int) -> Any:
        return self.layer(x * 2 if step % 2 else x)


def test_too_many_calls_are_given_up_once_and_a_checkpoint_of_it_is_taken_up() -> None:
    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.counted, self.steps = CountedPadding(), 0

        def forward(self, x: Tensor) -> Any:
            self.steps += 1
            return self.counted(x, self.steps)

    model = Holds()
    quantization = prepare(model)
    quantization.is_observing = True
    rows = []
    for _ in range(3 * MAX_CALL_KEYS):
        model(torch.randn(2, 4))
        quantization.ranges.update()
        rows.append(quantization.rows)
    assert len({id(row) for row in rows[MAX_CALL_KEYS:]}) == 1
    assert quantization.shapeless == {"counted"}
    fresh = prepare(Holds())
    fresh.load_state_dict(quantization.state_dict())
    assert fresh.shapeless == {"counted"}
    assert fresh.ranges.as_dict() == {
        name: extremes for name, extremes in quantization.ranges.as_dict().items() if name in fresh.ranges.names
    }
