"""Training-time compression for PyTorch Lightning: callbacks for quantization, pruning, distillation and export."""

from lightning_compress.callbacks.archive import Archive
from lightning_compress.callbacks.channel_pruning import ChannelPruning
from lightning_compress.callbacks.clustering import WeightClustering
from lightning_compress.callbacks.compacting import Compacted, compact, compact_like
from lightning_compress.callbacks.distillation import KnowledgeDistillation
from lightning_compress.callbacks.factorize import Factorize
from lightning_compress.callbacks.filter_sharing import FilterSharing
from lightning_compress.callbacks.loading import load_compressed_state
from lightning_compress.callbacks.onnx_export import OnnxExport
from lightning_compress.callbacks.pruning import MagnitudePruning
from lightning_compress.callbacks.quantization import QuantizationAwareTraining
from lightning_compress.callbacks.sensitivity import sensitivity
from lightning_compress.callbacks.shrinking import Shrunk, rebuild, shrink
from lightning_compress.callbacks.stripping import strip
from lightning_compress.distillation import (
    Annealing,
    AttentionTransfer,
    ContrastiveDistillation,
    CorrelationDistillation,
    DecoupledDistillation,
    FeatureDistillation,
    IndexedDataset,
    LogitDistillation,
    OutputRegression,
    PseudoLabels,
    RelationalDistillation,
    SimilarityPreserving,
    Teacher,
    TeacherCache,
    collate_indexed,
)
from lightning_compress.export import ExportResult, export_onnx
from lightning_compress.quantization.dct import DCT
from lightning_compress.quantization.placement_report import placement_report
from lightning_compress.report import RunReport
from lightning_compress.report.sensitivity import SensitivityReport
from lightning_compress.storage import ArchiveSize, load_compressed, save_compressed

__all__ = [
    "DCT",
    "Annealing",
    "Archive",
    "ArchiveSize",
    "AttentionTransfer",
    "ChannelPruning",
    "Compacted",
    "ContrastiveDistillation",
    "CorrelationDistillation",
    "DecoupledDistillation",
    "ExportResult",
    "Factorize",
    "FeatureDistillation",
    "FilterSharing",
    "IndexedDataset",
    "KnowledgeDistillation",
    "LogitDistillation",
    "MagnitudePruning",
    "OnnxExport",
    "OutputRegression",
    "PseudoLabels",
    "QuantizationAwareTraining",
    "RelationalDistillation",
    "RunReport",
    "SensitivityReport",
    "Shrunk",
    "SimilarityPreserving",
    "Teacher",
    "TeacherCache",
    "WeightClustering",
    "collate_indexed",
    "compact",
    "compact_like",
    "export_onnx",
    "load_compressed",
    "load_compressed_state",
    "placement_report",
    "rebuild",
    "save_compressed",
    "sensitivity",
    "shrink",
    "strip",
]
