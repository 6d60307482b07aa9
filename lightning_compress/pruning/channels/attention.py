"""Attention heads: where they lie in the parameters of attention modules, and attention with fewer of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_compress.graph import is_window_attention, multihead_attention


@dataclass(frozen=True)
class HeadPart:
    """The rows or columns of one parameter that belong to the heads.

    Args:
        parameter: Name of the parameter in the attention module.
        dim: Dimension along which the heads lie.
        index: Their positions along it, shape (heads, positions of a head).
        role: Whether these weights make the heads' queries, keys and values, read the heads' results, or only have a
            part in the scores, such as position biases.
    """

    parameter: str
    dim: int
    index: Tensor
    role: Literal["makes", "reads", "scores"] = "makes"

    def of(self, module: nn.Module) -> Tensor:
        """Return the parameter."""
        return module.get_parameter(self.parameter)


def head_parts(module: nn.Module) -> tuple[HeadPart, ...]:
    """Return where the heads of an attention module lie; nothing where its heads cannot be told apart.

    Known are `torch.nn.MultiheadAttention` with one projection of query, key and value, and the window attention of
    torchvision's Swin transformers.

    Example:
        >>> [(part.parameter, part.dim, part.index.tolist()) for part in head_parts(nn.MultiheadAttention(2, 2))]
        [('in_proj_weight', 0, [[0, 2, 4], [1, 3, 5]]), ('in_proj_bias', 0, [[0, 2, 4], [1, 3, 5]]), \
('out_proj.weight', 1, [[0], [1]])]
    """
    if isinstance(module, nn.MultiheadAttention):
        if module.in_proj_weight is None or module.bias_k is not None or module.add_zero_attn or module.num_heads < 2:
            return ()
        makes, reads = _rows(module.num_heads, module.head_dim)
        parts = [HeadPart("in_proj_weight", 0, makes)]
        if module.in_proj_bias is not None:
            parts.append(HeadPart("in_proj_bias", 0, makes))
        return (*parts, HeadPart("out_proj.weight", 1, reads, "reads"))
    return _window_parts(module) if _is_window_attention(module) else ()


def _is_window_attention(module: nn.Module) -> bool:
    return is_window_attention(module) or getattr(type(module), "has_fewer_heads", False)


def _window_parts(module: Any) -> tuple[HeadPart, ...]:
    if module.num_heads < 2:
        return ()
    makes, reads = _rows(module.num_heads, module.qkv.out_features // (3 * module.num_heads))
    one_each = torch.arange(module.num_heads).unsqueeze(1)
    parts = [HeadPart("qkv.weight", 0, makes)]
    if module.qkv.bias is not None:
        parts.append(HeadPart("qkv.bias", 0, makes))
    parts.append(HeadPart("proj.weight", 1, reads, "reads"))
    if getattr(module, "logit_scale", None) is None:
        return (*parts, HeadPart("relative_position_bias_table", 1, one_each, "scores"))
    return (*parts, HeadPart("logit_scale", 0, one_each, "scores"), HeadPart("cpb_mlp.2.weight", 0, one_each, "scores"))


def made_rows(module: nn.Module, kept: Sequence[int]) -> dict[str, list[int]]:
    """Return the rows that stay in every joint projection of an attention module that is a layer of its own.

    Args:
        module: An attention module whose heads `head_parts` knows.
        kept: The heads that stay.

    Returns:
        Rows by the layer's name in the module; nothing where the projections are bare parameters.

    Example:
        >>> made_rows(nn.MultiheadAttention(2, 2), [0])
        {}
    """
    return {
        part.parameter.removesuffix(".weight"): sorted(part.index[list(kept)].flatten().tolist())
        for part in head_parts(module)
        if part.dim == 0 and part.parameter.endswith(".weight")
    }


def attention_macs(module: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int]:
    """Return the multiply-accumulates of one sample in an attention module, and in what projects its result.

    Args:
        module: An attention module whose heads `head_parts` knows.
        args: Positional inputs of its forward.
        kwargs: Keyword inputs.

    Example:
        >>> query, key = torch.ones(1, 3, 4), torch.ones(1, 5, 4)
        >>> attention_macs(nn.MultiheadAttention(4, 2, batch_first=True), [query, key], {})
        (328, 48)
    """
    if isinstance(module, nn.MultiheadAttention):
        query, key = (kwargs[name] if name in kwargs else args[index] for index, name in enumerate(("query", "key")))
        here, there = (tensor.shape[1 if module.batch_first else 0] for tensor in (query, key))
        n_windows = 1
    else:
        image = kwargs["x"] if "x" in kwargs else args[0]
        n_windows = 1
        for size, window in zip(image.shape[1:3], module.window_size, strict=True):
            n_windows *= -(-size // window)
        here = there = module.window_size[0] * module.window_size[1]
    reading = next(part for part in head_parts(module) if part.role == "reads")
    width, inner = reading.of(module).shape
    # Query, keys and values are projected, scores and their products with values are computed.
    heads = n_windows * ((here + 2 * there) * width * inner + 2 * here * there * inner)
    return heads, n_windows * here * inner * width


def narrow_heads_(module: Any, kept: Tensor) -> None:
    """Take all heads off an attention module but some, in place.

    Args:
        module: An attention module whose heads `head_parts` knows.
        kept: The heads that stay.

    Example:
        >>> attention = nn.MultiheadAttention(4, 2)
        >>> narrow_heads_(attention, torch.tensor([1]))
        >>> attention.num_heads, attention.in_proj_weight.shape, attention.out_proj.weight.shape
        (1, torch.Size([6, 4]), torch.Size([4, 2]))
    """
    for part in head_parts(module):
        old = part.of(module)
        # Positions stay in the order of the whole parameter: query, key and value come one after the other.
        positions = part.index[kept].flatten().sort().values.to(old.device)
        owner_name, _, name = part.parameter.rpartition(".")
        owner: Any = module.get_submodule(owner_name)
        setattr(owner, name, nn.Parameter(old.detach().index_select(part.dim, positions), old.requires_grad))
        if isinstance(owner, nn.Linear):
            setattr(owner, "in_features" if part.dim else "out_features", len(positions))
    module.num_heads = len(kept)
    if isinstance(module, nn.MultiheadAttention):
        module.__class__ = NarrowedAttention
        module._qkv_same_embed_dim = False  # the fused encoder layer must not take it for one of full width
    else:
        from lightning_compress.pruning.channels.swin import narrowed_class

        module.__class__ = narrowed_class(module)


class NarrowedAttention(nn.MultiheadAttention):
    """Multi-head attention with fewer heads than its width would hold, for batches."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute what the whole module computes when the other heads are masked; see `torch.nn.MultiheadAttention`."""
        found: tuple[Tensor, Tensor | None] = multihead_attention(
            self, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )
        return found


def _rows(n_heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Return the rows of each head in a joint projection of query, key and value, and in what reads the heads."""
    # 3 = query, key and value; h = heads, d = channels of a head
    rows = torch.arange(3 * n_heads * head_dim).view(3, n_heads, head_dim)
    return rows.transpose(0, 1).reshape(n_heads, -1), torch.arange(n_heads * head_dim).view(n_heads, head_dim)
