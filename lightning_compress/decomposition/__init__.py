"""Layers as the sum or the product of smaller ones: shared filters and low rank."""

from lightning_compress.decomposition.compaction import CompactRecord, compact_
from lightning_compress.decomposition.factor_state import FactorState
from lightning_compress.decomposition.sharing_state import SharingState

__all__ = ["CompactRecord", "FactorState", "SharingState", "compact_"]
