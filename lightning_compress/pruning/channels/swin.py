"""Window attention with fewer heads: imported only where torchvision's Swin transformers are."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

from lightning_compress.graph import window_attention


class NarrowedWindowAttention(ShiftedWindowAttention):  # type: ignore[misc]
    """torchvision's window attention with fewer heads than its width would hold."""

    has_fewer_heads = True

    def forward(self, x: Tensor) -> Tensor:
        """Compute what the whole module computes when the other heads are masked."""
        found: Tensor = window_attention(self, x)
        return found


class NarrowedWindowAttentionV2(ShiftedWindowAttentionV2):  # type: ignore[misc]
    """The same for the second version, with cosine attention."""

    has_fewer_heads = True

    def forward(self, x: Tensor) -> Tensor:
        """Compute what the whole module computes when the other heads are masked."""
        found: Tensor = window_attention(self, x)
        return found


def narrowed_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that a window attention module gets when it loses heads.

    Example:
        >>> narrowed_class(ShiftedWindowAttentionV2(4, [2, 2], [0, 0], 2)).__name__
        'NarrowedWindowAttentionV2'
    """
    return NarrowedWindowAttentionV2 if isinstance(module, ShiftedWindowAttentionV2) else NarrowedWindowAttention
