"""Forwards of every signature: many inputs and outputs, containers, keywords, buffers, integers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.export.arguments import CallArguments
from tests.any_model.inputs import random_integers, random_values
from tests.any_model.journey import Example, check


@dataclass
class Detections:
    """What a user's own detector returns."""

    boxes: Tensor
    scores: Tensor
    features: list[Tensor]
    comment: str | None = None


class Pair(NamedTuple):
    """A named result."""

    mean: Tensor
    deviation: Tensor


class Backbone(nn.Module):
    """Hands a dataclass to the head, between modules."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Any:
        first = F.relu(self.conv1(x))
        return {"fine": first, "coarse": F.relu(self.conv2(first))}


class Detector(nn.Module):
    """Returns a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.boxes, self.scores = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Detections:
        maps = self.backbone(x)
        return Detections(self.boxes(maps["coarse"]), self.scores(maps["coarse"]).sigmoid(), [maps["fine"]])


class Returns(nn.Module):
    """Two linear layers, whose results go into a container."""

    def __init__(self, container: Any) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(6, 3)
        self.container = container

    def forward(self, x: Tensor) -> Any:
        return self.container(self.first(x), F.relu(self.second(x)))


def nested(first: Tensor, second: Tensor) -> dict[str, Any]:
    """Return a dict of a tensor, a named tuple and a tuple with nothing in it."""
    return {"logits": first, "pair": Pair(second, second + 1.0), "rest": (None, [first.sigmoid()])}


class ManyInputs(nn.Module):
    """An image, a table and categories, some of them by keyword only, one optional."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.table = nn.Conv2d(3, 6, 3), nn.Linear(4, 6)
        self.category = nn.Embedding(5, 6)
        self.head = nn.Linear(18, 3)

    def forward(
        self, image: Tensor, table: Tensor | None = None, *, category: Tensor, scale: float = 1.0, verbose: bool = False
    ) -> Any:
        parts = [self.conv(image).mean((2, 3)) * scale, self.category(category)]
        parts.append(torch.zeros_like(parts[0]) if table is None else self.table(table))
        return self.head(F.relu(torch.cat(parts, 1)))


def many_inputs(n_samples: int, seed: int) -> CallArguments:
    """Return an image, a table, a category and a number."""
    image, table = random_values(3, 8, 8)(n_samples, seed), random_values(4)(n_samples, seed)
    return CallArguments((image, table), {"category": random_integers(5)(n_samples, seed), "scale": 2.0})


def without_table(n_samples: int, seed: int) -> dict[str, Any]:
    """Return an image and a category by keyword."""
    image = random_values(3, 8, 8)(n_samples, seed)
    return {"image": image, "category": random_integers(5)(n_samples, seed)}


class Nested(nn.Module):
    """Takes a dict of lists."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, batch: dict[str, list[Tensor]]) -> Any:
        return self.first(batch["views"][0]) + self.second(batch["views"][1])


class AnyArguments(nn.Module):
    """Passes on what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = ManyInputs()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


class Buffers(nn.Module):
    """Buffers, parameters and plain numbers meet activations: preprocessing, positions, temperature."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.5, 0.6, 0.7]).view(1, 3, 1, 1))
        self.position = nn.Parameter(torch.randn(1, 36, 6) * 0.1)
        self.token = nn.Parameter(torch.zeros(1, 1, 6))
        self.conv, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.conv((x - self.mean) / self.std).flatten(2).transpose(1, 2) + self.position
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        return self.fc(F.relu(x)) * 0.5 + 1.0


class MadeInside(nn.Module):
    """Makes tensors while it runs: a grid of coordinates, a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(5, 6, 3, padding=1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Any:
        batch, _, height, width = x.shape
        rows = torch.linspace(-1, 1, height, device=x.device).view(1, 1, -1, 1).expand(batch, 1, height, width)
        columns = torch.arange(width, device=x.device, dtype=x.dtype).view(1, 1, 1, -1).expand(batch, 1, height, width)
        return self.last(F.relu(self.conv(torch.cat([x, rows, columns / width], 1))))


class Masked(nn.Module):
    """A boolean mask decides what counts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, is_valid: Tensor) -> Any:
        x = F.relu(self.first(x)).masked_fill(~is_valid.unsqueeze(-1), 0.0)
        return self.last(x.sum(1) / is_valid.sum(1, keepdim=True))


def masked(n_samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return five tokens with a mask that leaves at least two."""
    is_valid = torch.arange(5).expand(n_samples, 5) < random_integers(4, 1)(n_samples, seed) + 2
    return random_values(5, 6)(n_samples, seed), is_valid


class FromIntegers(nn.Module):
    """Images as bytes, turned to floats inside."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, image: Tensor) -> Any:
        return self.conv(image.float() / 255.0 - 0.5)


def byte_images(n_samples: int, seed: int) -> Tensor:
    """Return images as bytes."""
    return random_integers(256, 3, 6, 6)(n_samples, seed).to(torch.uint8)


VALUES = random_values(6)
TWO = {"gemm": (2, 2)}
EXAMPLES = {
    "nested containers": Example(lambda: Returns(nested), VALUES, TWO),
    "dataclass": Example(Detector, random_values(3, 8, 8), {"conv": (4, 4)}),
    "an optional input left out": Example(ManyInputs, without_table, {"conv": (1, 1), "gemm": (1, 1)}),
    "nested inputs": Example(Nested, lambda n, seed: ({"views": [VALUES(n, seed), VALUES(n, seed + 50)]},), TWO),
    "any arguments": Example(AnyArguments, many_inputs, {"conv": (1, 1), "gemm": (2, 2)}),
    "buffers and constants": Example(Buffers, random_values(3, 8, 8), {"conv": (1, 1), "matmul": (1, 1)}),
    "tensors made inside": Example(MadeInside, random_values(3, 8, 8), {"conv": (2, 2)}),
    "boolean mask": Example(Masked, masked, {"matmul": (1, 1), "gemm": (1, 1)}),
    "byte images": Example(FromIntegers, byte_images, {"conv": (1, 1)}),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_forwards_of_any_signature_run_in_integers(name: str, tmp_path: Path) -> None:
    check(EXAMPLES[name], tmp_path)


def test_fields_of_a_dataclass_name_the_outputs(tmp_path: Path) -> None:
    assert check(EXAMPLES["dataclass"], tmp_path).result.output_names == ("boxes", "scores", "features")
