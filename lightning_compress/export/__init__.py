"""Exporting a trained model: lowered to integers, written, proved, audited."""

from lightning_compress.export.onnx import ExportResult, export_onnx

__all__ = ["ExportResult", "export_onnx"]
