"""Networks of Hugging Face's transformers, made small and random: dict outputs, attention masks, tied heads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from tests.any_model.inputs import random_integers, random_values
from tests.any_model.journey import Example, check

SMALL: dict[str, Any] = {
    "num_labels": 3,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "initializer_range": 0.2,
}


def tokens(n_samples: int, seed: int) -> dict[str, Any]:
    """Return tokens, of which the last of some samples are padding."""
    lengths = random_integers(4, 1)(n_samples, seed) + 4
    return {
        "input_ids": random_integers(30, 7)(n_samples, seed),
        "attention_mask": (torch.arange(7).expand(n_samples, 7) < lengths).long(),
    }


def bert(**settings: Any) -> Callable[[], nn.Module]:
    """Return a maker of a classifier of two BERT layers."""

    def build() -> nn.Module:
        config = transformers.BertConfig(vocab_size=30, max_position_embeddings=16, **SMALL, **settings)
        model: nn.Module = transformers.BertForSequenceClassification(config)
        return model

    return build


def vit() -> nn.Module:
    """A vision transformer of two layers."""
    config = transformers.ViTConfig(image_size=8, patch_size=4, **SMALL)
    model: nn.Module = transformers.ViTForImageClassification(config)
    return model


def distilbert() -> nn.Module:
    """A masked language model, its last layer tied to its embedding."""
    config = transformers.DistilBertConfig(
        vocab_size=30, max_position_embeddings=16, dim=16, hidden_dim=32, n_layers=1, n_heads=2
    )
    model: nn.Module = transformers.DistilBertForMaskedLM(config)
    return model


# Each layer has four projections, two feed-forward layers and two products of attention. The products are in float
# where the forward around them branches on sizes, so that it has no graph; the layers run in integers all the same.
EXAMPLES = {
    "BERT": Example(bert(), tokens, {"matmul": (16, 16), "gemm": (2, 2)}),
    "BERT with attention written out": Example(
        bert(attn_implementation="eager"), tokens, {"matmul": (16, 16), "gemm": (2, 2)}
    ),
    "ViT": Example(
        vit,
        lambda n_samples, seed: {"pixel_values": random_values(3, 8, 8)(n_samples, seed)},
        {"conv": (1, 1), "matmul": (16, 16), "gemm": (1, 1)},
    ),
    "DistilBERT": Example(distilbert, tokens, {"matmul": (10, 10)}),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_encoders_run_in_integers(name: str, tmp_path: Path) -> None:
    journey = check(EXAMPLES[name], tmp_path)
    assert journey.result.output_names == ("logits",)
