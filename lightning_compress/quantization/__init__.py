"""Quantization-aware training of any module: rewritten forwards, ranges, batch-norm folding, lowering."""

from lightning_compress.quantization.state import Quantization, calibrate, prepare, quantization_of, strip

__all__ = ["Quantization", "calibrate", "prepare", "quantization_of", "strip"]
