"""Pruning: unstructured and N:M masks, and the state that keeps them on a model."""

from lightning_compress.pruning.magnitude import Scope, magnitude_mask, magnitude_masks
from lightning_compress.pruning.pattern import pattern_mask, pattern_masks, pattern_sparsity
from lightning_compress.pruning.state import PruningState, apply_masks_, clear_optimizer_state_
from lightning_compress.pruning.weights import check_pattern_fits, sparsity, sparsity_by_layer

__all__ = [
    "PruningState",
    "Scope",
    "apply_masks_",
    "check_pattern_fits",
    "clear_optimizer_state_",
    "magnitude_mask",
    "magnitude_masks",
    "pattern_mask",
    "pattern_masks",
    "pattern_sparsity",
    "sparsity",
    "sparsity_by_layer",
]
