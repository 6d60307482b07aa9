"""The forward of torchvision's window attention in plain operations, for tracing and for fewer heads.

torchvision's own takes the width of a head from that of its input, so that it cannot run with some heads removed.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F


def is_window_attention(module: nn.Module) -> bool:
    """Tell whether ``module`` is torchvision's window attention, of either version, with torchvision's own forward.

    torchvision is not imported for that: a module of its classes exists only where somebody has.

    Example:
        >>> is_window_attention(nn.Linear(1, 1))
        False
    """
    swin = sys.modules.get("torchvision.models.swin_transformer")
    if swin is None or not isinstance(module, swin.ShiftedWindowAttention):
        return False
    return type(module).forward in (swin.ShiftedWindowAttention.forward, swin.ShiftedWindowAttentionV2.forward)


def window_attention(module: Any, x: Any) -> Any:
    """Return what torchvision's window attention returns, whatever the number of its heads.

    Swin Transformer (Liu et al. 2021, arXiv:2103.14030, section 3.2) and, where the module has a ``logit_scale``, the
    cosine attention of its second version (Liu et al. 2022, arXiv:2111.09883, equation 2).

    Args:
        module: A `torchvision.models.swin_transformer.ShiftedWindowAttention`, or of the second version.
        x: Batch, height, width and channels.

    Returns:
        Tensor of the shape of ``x``.
    """
    bias = module.get_relative_position_bias()
    height, width = x.shape[1], x.shape[2]
    rows, columns = module.window_size
    below, right = -height % rows, -width % columns
    if below or right:
        x = F.pad(x, (0, 0, 0, right, 0, below))
    n_down, n_across = (height + below) // rows, (width + right) // columns
    # One window over all rows, or columns, is not moved along them.
    down, across = module.shift_size[0] * (n_down > 1), module.shift_size[1] * (n_across > 1)
    if down or across:
        x = torch.roll(x, (-down, -across), (1, 2))
    # n = batch, y, x = windows, r, c = rows and columns of a window, w = all windows, t = positions of one, h = heads,
    # d = channels of a head
    windows = x.reshape(-1, n_down, rows, n_across, columns, x.shape[3]).transpose(2, 3)  # nyxrc
    windows = windows.reshape(-1, rows * columns, x.shape[3])  # wt
    head_dim = module.qkv.out_features // (3 * module.num_heads)
    heads = _projected(module, windows).reshape(-1, rows * columns, 3, module.num_heads, head_dim)
    query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)  # whtd each
    if getattr(module, "logit_scale", None) is None:
        scores = torch.matmul(query * head_dim**-0.5, key.transpose(-2, -1))
    else:
        cosines = torch.matmul(F.normalize(query, dim=-1), F.normalize(key, dim=-1).transpose(-2, -1))
        scores = cosines * torch.clamp(module.logit_scale, max=math.log(100.0)).exp()
    scores = scores + bias
    if down or across:
        scores = apart(scores, n_down, n_across, rows, columns, down, across)
    probabilities = F.dropout(F.softmax(scores, dim=-1), module.attention_dropout, module.training)
    result = module.proj(torch.matmul(probabilities, value).transpose(1, 2).flatten(2))
    result = F.dropout(result, module.dropout, module.training)
    result = result.reshape(-1, n_down, n_across, rows, columns, result.shape[-1]).transpose(2, 3)
    result = result.reshape(-1, n_down * rows, n_across * columns, result.shape[-1])
    if down or across:
        result = torch.roll(result, (down, across), (1, 2))
    return result[:, :height, :width].contiguous() if below or right else result


def _projected(module: Any, windows: Any) -> Any:
    """Return query, key and value side by side; in the second version the key has no bias, whatever is stored."""
    bias = module.qkv.bias
    if getattr(module, "logit_scale", None) is None or bias is None:
        return module.qkv(windows)
    third = bias.chunk(3)
    return F.linear(windows, module.qkv.weight, torch.cat((third[0], torch.zeros_like(third[1]), third[2])))


@fx.wrap
def apart(scores: Tensor, n_down: int, n_across: int, rows: int, columns: int, down: int, across: int) -> Tensor:
    """Keep the scores of positions low that only the rolling of the image has brought into one window.

    Args:
        scores: Shape (windows, heads, positions, positions); the windows of an image lie row by row.
        n_down: Windows of an image from top to bottom.
        n_across: Windows of an image from left to right.
        rows: Rows of a window.
        columns: Columns of a window.
        down: Rows by which the image was rolled.
        across: Columns by which it was rolled.

    Returns:
        The scores, 100 less where two positions do not belong together.

    Example:
        >>> apart(torch.zeros(2, 1, 2, 2), 1, 2, 1, 2, 0, 1).tolist()
        [[[[0.0, 0.0], [0.0, 0.0]]], [[[0.0, -100.0], [-100.0, 0.0]]]]
    """

    def regions(n_windows: int, size: int, shift: int) -> Tensor:
        position = torch.arange(n_windows * size, device=scores.device)
        if not shift:
            return torch.zeros_like(position)
        return (position >= (n_windows - 1) * size).long() + (position >= n_windows * size - shift)

    region = 3 * regions(n_down, rows, down).unsqueeze(1) + regions(n_across, columns, across)
    region = region.view(n_down, rows, n_across, columns).transpose(1, 2).reshape(-1, rows * columns)
    addend = torch.where(region.unsqueeze(1) == region.unsqueeze(2), 0.0, -100.0).to(scores.dtype)
    # y, x = windows of an image, h = heads, t = positions
    by_image = scores.reshape(-1, n_down * n_across, *scores.shape[1:])
    return (by_image + addend.unsqueeze(1)).reshape(scores.shape)
