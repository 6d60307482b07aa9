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


def between(*layers: nn.Module) -> nn.Module:
    """Return ``layers``, which keep six channels, each behind a ReLU, between two convolutions."""
    return nn.Sequential(nn.Conv2d(3, 6, 3), *[nn.Sequential(nn.ReLU(), layer) for layer in layers], nn.Conv2d(6, 4, 1))


def by_hooks() -> nn.Module:
    """The older functions, which compute the weight anew in a hook before each forward."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return between(
            torch.nn.utils.weight_norm(nn.Conv2d(6, 6, 3, padding=1)), torch.nn.utils.spectral_norm(nn.Conv2d(6, 6, 1))
        )


def parametrized() -> nn.Module:
    """torch's parametrizations, and one of the user's own."""
    symmetric = nn.Linear(4, 4)
    parametrize.register_parametrization(symmetric, "weight", Symmetric())
    return nn.Sequential(
        between(
            parametrizations.weight_norm(nn.Conv2d(6, 6, 3, padding=1)),
            parametrizations.spectral_norm(nn.Conv2d(6, 6, 3, padding=1)),
        ),
        nn.Flatten(2),
        parametrizations.orthogonal(nn.Linear(36, 4)),
        nn.ReLU(),
        symmetric,
    )


def pair(n_samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return two inputs."""
    return random_values(6)(n_samples, seed), random_values(6)(n_samples, seed + 50)


EXAMPLES = {
    "tied decoder": Example(TiedDecoder, random_integers(12, 5), {"matmul": (2, 2)}),
    "tied autoencoder": Example(TiedAutoencoder, random_values(8), {"gemm": (2, 2)}),
    "called twice": Example(CalledTwice, IMAGE, {"conv": (5, 5)}),
    "siamese": Example(Siamese, pair, {"gemm": (4, 4)}),
    "two names": Example(TwoNames, random_values(6), {"gemm": (3, 3)}),
    "weight and spectral norm by hooks": Example(by_hooks, IMAGE, {"conv": (4, 4)}),
    "parametrized": Example(parametrized, IMAGE, {"conv": (4, 4), "matmul": (2, 2)}),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_shared_and_computed_weights_run_in_integers(name: str, tmp_path: Path) -> None:
    example = EXAMPLES[name]
    keys = sorted(example.build().state_dict())
    journey = check(example, tmp_path)
    assert sorted(journey.model.state_dict()) == keys
