"""Weights that are shared or computed: tied, called twice, normalized, parametrized."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from tests.any_model.inputs import random_integers, random_values
from tests.any_model.journey import Example, check

IMAGE = random_values(3, 8, 8)


class TiedDecoder(nn.Module):
    """A language model whose last layer is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.mix = nn.Linear(8, 8)
        self.decoder = nn.Linear(8, 12, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Any:
        return self.decoder(F.relu(self.mix(self.embedding(tokens))))


class TiedAutoencoder(nn.Module):
    """A decoder that multiplies by the transposed weight of the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(8, 4)
        self.bias = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Any:
        return F.linear(torch.relu(self.encoder(x)), self.encoder.weight.t(), self.bias)


class CalledTwice(nn.Module):
    """One block at two depths, and a head for maps of two sizes (RetinaNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.block(self.block(F.relu(self.stem(x))))
        return self.head(x), self.head(F.max_pool2d(x, 2))


class Siamese(nn.Module):
    """One encoder for two inputs, compared by their distance."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, first: Tensor, second: Tensor) -> Any:
        return (self.encoder(first) - self.encoder(second)).abs().sum(1)


class TwoNames(nn.Module):
    """One layer under two names, and one weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.again = self.first
        self.third = nn.Linear(6, 6, bias=False)
        self.third.weight = self.first.weight

    def forward(self, x: Tensor) -> Any:
        return self.third(F.relu(self.again(F.relu(self.first(x)))))


class Symmetric(nn.Module):
    """A user's own parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).transpose(-1, -2)


def between(layer: nn.Module) -> nn.Module:
    """Return ``layer``, which keeps six channels, between two convolutions."""
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), layer, nn.ReLU(), nn.Conv2d(6, 4, 1))


def weight_norm_by_hooks() -> nn.Module:
    """The older `weight_norm`, which recomputes the weight in a forward hook."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return between(torch.nn.utils.weight_norm(nn.Conv2d(6, 6, 3, padding=1)))


def pair(n_samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return two inputs."""
    return random_values(6)(n_samples, seed), random_values(6)(n_samples, seed + 50)


THREE = {"conv": (3, 3)}
EXAMPLES = {
    "tied decoder": Example(TiedDecoder, random_integers(12, 5), {"matmul": (2, 2)}),
    "tied autoencoder": Example(TiedAutoencoder, random_values(8), {"gemm": (2, 2)}),
    "called twice": Example(CalledTwice, IMAGE, {"conv": (5, 5)}),
    "siamese": Example(Siamese, pair, {"gemm": (4, 4)}),
    "two names": Example(TwoNames, random_values(6), {"gemm": (3, 3)}),
    "weight norm": Example(lambda: between(parametrizations.weight_norm(nn.Conv2d(6, 6, 3, padding=1))), IMAGE, THREE),
    "weight norm by hooks": Example(weight_norm_by_hooks, IMAGE, THREE),
    "spectral norm": Example(
        lambda: between(parametrizations.spectral_norm(nn.Conv2d(6, 6, 3, padding=1))), IMAGE, THREE
    ),
    "spectral norm by hooks": Example(
        lambda: between(torch.nn.utils.spectral_norm(nn.Conv2d(6, 6, 3, padding=1))), IMAGE, THREE
    ),
    "orthogonal": Example(
        lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), parametrizations.orthogonal(nn.Linear(8, 8))),
        random_values(6),
        {"gemm": (2, 2)},
    ),
    "own parametrization": Example(
        lambda: nn.Sequential(
            nn.Linear(6, 6),
            nn.ReLU(),
            parametrize.register_parametrization(nn.Linear(6, 6), "weight", Symmetric()),
        ),
        random_values(6),
        {"gemm": (2, 2)},
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_shared_and_computed_weights_run_in_integers(name: str, tmp_path: Path) -> None:
    example = EXAMPLES[name]
    keys = sorted(example.build().state_dict())
    journey = check(example, tmp_path)
    assert sorted(journey.model.state_dict()) == keys
