"""Forwards of torch's and torchvision's own attention and transformer modules in plain operations, for tracing.

The originals branch on values and shapes and take fused shortcuts that hide their matrix products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from lightning_compress.graph.windows import is_window_attention, window_attention


@dataclass(frozen=True)
class Equivalent:
    """A forward that gives what a module's own forward gives.

    Attributes:
        forward: The forward, with the module as its first argument and the same parameters after it.
        is_exact: Whether it gives the same bits in train mode, and draws the same random numbers.
        fits: Tells whether it stands in for a call with these tensors.
    """

    forward: Callable[..., Any]
    is_exact: bool
    fits: Callable[[Sequence[Any]], bool]


def equivalent_of(module: nn.Module) -> Equivalent | None:
    """Return the forward to trace instead of the one that ``module`` inherits from torch or torchvision, or None.

    Args:
        module: Any module; one with a forward of its own has no equivalent.

    Example:
        >>> attention = nn.MultiheadAttention(8, 2, batch_first=True)
        >>> x = torch.rand(1, 3, 8)
        >>> found, weights = equivalent_of(attention).forward(attention, x, x, x)
        >>> torch.allclose(found, attention(x, x, x)[0], atol=1e-6), weights.shape
        (True, torch.Size([1, 3, 3]))
    """
    forward = type(module).forward
    if isinstance(module, nn.MultiheadAttention) and forward is nn.MultiheadAttention.forward:
        return (
            None
            if module.bias_k is not None or module.add_zero_attn
            else Equivalent(multihead_attention, False, _is_batched)
        )
    if isinstance(module, nn.TransformerEncoderLayer) and forward is nn.TransformerEncoderLayer.forward:
        return Equivalent(_encoder_layer, True, _is_batched)
    if isinstance(module, nn.TransformerEncoder) and forward is nn.TransformerEncoder.forward:
        return Equivalent(_encoder, True, _is_batched)
    if is_window_attention(module):
        return Equivalent(window_attention, True, _is_image)
    return None


def _is_batched(values: Sequence[Any]) -> bool:
    return isinstance(values[0], Tensor) and values[0].dim() == 3


def _is_image(values: Sequence[Any]) -> bool:
    return isinstance(values[0], Tensor) and values[0].dim() == 4


def multihead_attention(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Any, Any]:
    """Return what a `torch.nn.MultiheadAttention` returns (Vaswani et al. 2017, arXiv:1706.03762, section 3.2.2).

    A causal hint adds nothing: whoever gives it must give the mask too.
    """
    values = (query, key, value)
    if not module.batch_first:
        values = tuple(value.transpose(0, 1) for value in values)
    if module.in_proj_weight is not None:
        weights = module.in_proj_weight.chunk(3)
    else:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    biases = (None, None, None) if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    # n = batch, h = heads, l = target positions, s = source positions, d = channels of a head
    q, k, v = (
        F.linear(values[i], weights[i], biases[i]).unflatten(-1, (module.num_heads, module.head_dim)).transpose(1, 2)  # type: ignore[no-untyped-call]
        for i in range(3)
    )
    scores = torch.matmul(q * (1.0 / math.sqrt(module.head_dim)), k.transpose(-2, -1))  # nhls
    if attn_mask is not None:
        scores = scores + over_heads(attn_mask, module.num_heads, scores)
    if key_padding_mask is not None:
        scores = scores + over_queries(key_padding_mask, scores)
    probabilities = F.dropout(F.softmax(scores, dim=-1), module.dropout, module.training)
    result = module.out_proj(torch.matmul(probabilities, v).transpose(1, 2).flatten(-2))
    if not module.batch_first:
        result = result.transpose(0, 1)
    if not need_weights:
        return result, None
    return result, probabilities.mean(dim=1) if average_attn_weights else probabilities


@fx.wrap
def over_heads(mask: Tensor, n_heads: int, scores: Tensor) -> Tensor:
    """Return an attention mask of shape (l, s) or (n * h, l, s) as an addend for scores of shape (n, h, l, s).

    Example:
        >>> over_heads(torch.tensor([[False, True]]), 2, torch.zeros(1, 2, 1, 2)).tolist()
        [[[[0.0, -inf]]]]
    """
    addend = _addend(mask, scores)
    return addend.view(-1, n_heads, *addend.shape[1:]) if mask.dim() == 3 else addend.unsqueeze(0).unsqueeze(0)


@fx.wrap
def over_queries(mask: Tensor, scores: Tensor) -> Tensor:
    """Return a key padding mask of shape (n, s) as an addend for scores of shape (n, h, l, s).

    Example:
        >>> over_queries(torch.tensor([[False, True]]), torch.zeros(1, 1, 1, 2)).tolist()
        [[[[0.0, -inf]]]]
    """
    return _addend(mask, scores).unsqueeze(1).unsqueeze(1)


def _addend(mask: Tensor, scores: Tensor) -> Tensor:
    if mask.dtype is not torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=scores.dtype).masked_fill(mask, -math.inf)


def _encoder_layer(
    module: Any, src: Any, src_mask: Any = None, src_key_padding_mask: Any = None, is_causal: bool = False
) -> Any:
    """Self-attention and feed-forward block, norms first or last, as the slow path of torch has them."""
    masks = (src_mask, src_key_padding_mask, is_causal)
    if module.norm_first:
        src = src + _self_attention(module, module.norm1(src), *masks)
        return src + _feed_forward(module, module.norm2(src))
    src = module.norm1(src + _self_attention(module, src, *masks))
    return module.norm2(src + _feed_forward(module, src))


def _self_attention(module: Any, x: Any, mask: Any, padding: Any, is_causal: bool) -> Any:
    settings = {"attn_mask": mask, "key_padding_mask": padding, "need_weights": False, "is_causal": is_causal}
    return module.dropout1(module.self_attn(x, x, x, **settings)[0])


def _feed_forward(module: Any, x: Any) -> Any:
    return module.dropout2(module.linear2(module.dropout(module.activation(module.linear1(x)))))


def _encoder(
    module: Any, src: Any, mask: Any = None, src_key_padding_mask: Any = None, is_causal: bool | None = None
) -> Any:
    """The layers in turn; which masks are causal is left to the layers, for which it changes nothing."""
    settings = {"src_mask": mask, "src_key_padding_mask": src_key_padding_mask, "is_causal": False}
    for layer in module.layers:
        src = layer(src, **settings)
    return src if module.norm is None else module.norm(src)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    on: Callable[[str, Tensor], Tensor] = lambda name, value: value,
) -> Tensor:
    """Compute `torch.nn.functional.scaled_dot_product_attention` in plain operations.

    Args:
        query: Shape (..., l, d).
        key: Shape (..., s, d).
        value: Shape (..., s, e).
        attn_mask: Addend of the scores, or a boolean mask that is true where a key takes part; shape (..., l, s).
        dropout_p: Share of the probabilities that is zeroed.
        is_causal: Whether a query sees only the keys up to its own position.
        scale: Factor of the scores; by default ``1 / sqrt(d)``.
        enable_gqa: Whether several heads of the query share one of key and value.
        on: Takes each of the four operands of the two matrix products, ``query``, ``key``, ``probabilities`` and
            ``value``, and returns what is multiplied.

    Returns:
        Shape (..., l, e).

    Example:
        >>> q, k, v = torch.rand(3, 1, 2, 4, 8)
        >>> expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        >>> torch.allclose(attention(q, k, v, is_causal=True), expected, atol=1e-6)
        True
    """
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = torch.matmul(on("query", query * factor), on("key", key.transpose(-2, -1)))
    if is_causal:
        ones = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(ones.triu(1), -math.inf)
    if attn_mask is not None:
        scores = scores + (_addend(~attn_mask, scores) if attn_mask.dtype is torch.bool else attn_mask)
    probabilities = F.softmax(scores, dim=-1)
    if dropout_p > 0.0:
        probabilities = F.dropout(probabilities, dropout_p)
    return torch.matmul(on("probabilities", probabilities), on("value", value))
