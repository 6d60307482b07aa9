"""Attention however it is written: by matmul, einsum and bmm, by torch's functions and by torch's modules."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.export.arguments import CallArguments
from tests.any_model.inputs import random_values
from tests.any_model.journey import Example, check

TOKENS = random_values(5, 8)


class Attention(nn.Module):
    """Self-attention with two heads of four, its products written in one of several ways."""

    def __init__(self, products: str) -> None:
        super().__init__()
        self.mix, self.project = nn.Linear(8, 24), nn.Linear(8, 8)
        self.products = products

    def forward(self, x: Tensor) -> Any:
        batch, length, width = x.shape
        query, key, value = self.mix(x).reshape(batch, length, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        if self.products == "matmul":
            weights = (query @ key.transpose(-2, -1) / math.sqrt(4)).softmax(-1)
            mixed = weights @ value
        elif self.products == "bmm":
            flat = [item.reshape(batch * 2, length, 4) for item in (query, key, value)]
            weights = F.softmax(torch.bmm(flat[0] * 0.5, flat[1].transpose(1, 2)), dim=-1)
            mixed = torch.bmm(weights, flat[2]).view(batch, 2, length, 4)
        elif self.products == "einsum":
            weights = torch.einsum("bhid,bhjd->bhij", query, key).mul(0.5).softmax(-1)
            mixed = torch.einsum("bhij,bhjd->bhid", weights, value)
        elif self.products == "causal":
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            mixed = F.scaled_dot_product_attention(query, key, value)
        return self.project(mixed.transpose(1, 2).reshape(batch, length, width))


class PositionBias(nn.Module):
    """A learned bias for every pair of positions is added to the scores (Swin, LeViT)."""

    index: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.project = nn.Linear(8, 24), nn.Linear(8, 8)
        self.table = nn.Parameter(torch.randn(9, 2) * 0.1)
        self.register_buffer("index", torch.arange(5)[:, None] - torch.arange(5)[None, :] + 4, persistent=False)

    def forward(self, x: Tensor) -> Any:
        batch, length, width = x.shape
        query, key, value = self.mix(x).reshape(batch, length, 3, 2, 4).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index.view(-1)].view(5, 5, 2).permute(2, 0, 1)
        scores = (query * 0.5) @ key.transpose(-2, -1) + bias.unsqueeze(0)
        return self.project((scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, length, width))


class Rotary(nn.Module):
    """Queries and keys turned by angles that lie in buffers (Su et al. 2021)."""

    cosine: Tensor
    sine: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        angles = torch.outer(torch.arange(5.0), 10.0 ** -torch.arange(4.0)).repeat(1, 2)
        self.register_buffer("cosine", angles.cos())
        self.register_buffer("sine", angles.sin())

    def turned(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * self.cosine + torch.cat((-second, first), dim=-1) * self.sine

    def forward(self, x: Tensor) -> Any:
        query, key = self.turned(self.query(x)), self.turned(self.key(x))
        return F.scaled_dot_product_attention(query, key, self.value(x), scale=0.3)


class CrossAttention(nn.Module):
    """torch's module over two sequences, twice, with a mask of padded positions, and with its weights at last."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor, memory: Tensor, is_padding: Tensor) -> Any:
        x, _ = self.attention(self.first(x), memory, memory, key_padding_mask=is_padding, need_weights=False)
        x, weights = self.attention(x, memory, memory, key_padding_mask=is_padding)
        return self.last(x), weights


def two_sequences(n_samples: int, seed: int) -> CallArguments:
    """Return a sequence, another one to look at, and what of that is padding."""
    is_padding = torch.zeros(n_samples, 6, dtype=torch.bool)
    is_padding[:, 4:] = True
    return CallArguments((TOKENS(n_samples, seed), random_values(6, 8)(n_samples, seed + 50), is_padding), {})


class EncoderDecoder(nn.Module):
    """torch's own encoder and decoder layers, the decoder under a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
        self.decoder = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.register_buffer("mask", torch.triu(torch.full((5, 5), -torch.inf), 1))

    def forward(self, x: Tensor) -> Any:
        return self.decoder(x, self.encoder(x), tgt_mask=self.mask)


def encoder() -> nn.Module:
    """torch's own encoder of two layers between two linear layers."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, activation="gelu", batch_first=True)
    stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(8, 8), stack, nn.Linear(8, 4))


# Where both calls of one attention project the same memory, the file does so once.
EXAMPLES = {
    "matmul, bmm and einsum": Example(
        lambda: nn.Sequential(Attention("matmul"), Attention("bmm"), Attention("einsum")), TOKENS, {"matmul": (12, 12)}
    ),
    "scaled_dot_product_attention": Example(
        lambda: nn.Sequential(Attention("plain"), Attention("causal")), TOKENS, {"matmul": (8, 8)}
    ),
    "position bias": Example(PositionBias, TOKENS, {"matmul": (4, 4)}),
    "rotary": Example(Rotary, TOKENS, {"matmul": (5, 5)}),
    "MultiheadAttention": Example(CrossAttention, two_sequences, {"matmul": (12, 12)}),
    "TransformerEncoder": Example(encoder, TOKENS, {"matmul": (18, 18)}),
    "TransformerDecoderLayer": Example(EncoderDecoder, TOKENS, {"matmul": (22, 22)}),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_attention_runs_in_integers(name: str, tmp_path: Path) -> None:
    check(EXAMPLES[name], tmp_path)
