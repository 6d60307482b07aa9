"""Knowledge distillation: a trained teacher's outputs and features as a second target of the student."""

from lightning_compress.distillation.adaptors import Adaptors
from lightning_compress.distillation.annealing import Annealing
from lightning_compress.distillation.attention_transfer import AttentionTransfer, attention_map
from lightning_compress.distillation.cache import CachedAnswers, TeacherCache, checksums
from lightning_compress.distillation.contrastive import ContrastiveDistillation, contrastive_loss
from lightning_compress.distillation.correlation import CorrelationDistillation, correlation
from lightning_compress.distillation.decoupled import DecoupledDistillation, decoupled_losses
from lightning_compress.distillation.ensemble import Network, OwnTeacher, Teacher, TeacherEnsemble, as_teachers
from lightning_compress.distillation.features import FeatureDistillation
from lightning_compress.distillation.indexed import IndexedDataset, collate_indexed, without_numbers
from lightning_compress.distillation.logits import LogitDistillation, hinton_loss, multilabel_loss, standardized
from lightning_compress.distillation.loss import DistillationLoss, FeatureLoss, number
from lightning_compress.distillation.pseudo_labels import PseudoLabels
from lightning_compress.distillation.regression import OutputRegression, distance
from lightning_compress.distillation.relations import (
    RelationalDistillation,
    SimilarityPreserving,
    angles,
    distances,
    similarities,
)
from lightning_compress.distillation.selector import OutputSelector, check_selector, select_labels, select_logits
from lightning_compress.distillation.taps import (
    FeatureEar,
    Features,
    FeatureTap,
    output_shapes,
    paired_names,
    split_name,
)
from lightning_compress.distillation.teacher import Answer, FrozenTeacher, identity_of_function, load_weights

__all__ = [
    "Adaptors",
    "Annealing",
    "Answer",
    "AttentionTransfer",
    "CachedAnswers",
    "ContrastiveDistillation",
    "CorrelationDistillation",
    "DecoupledDistillation",
    "DistillationLoss",
    "FeatureDistillation",
    "FeatureEar",
    "FeatureLoss",
    "FeatureTap",
    "Features",
    "FrozenTeacher",
    "IndexedDataset",
    "LogitDistillation",
    "Network",
    "OutputRegression",
    "OutputSelector",
    "OwnTeacher",
    "PseudoLabels",
    "RelationalDistillation",
    "SimilarityPreserving",
    "Teacher",
    "TeacherCache",
    "TeacherEnsemble",
    "angles",
    "as_teachers",
    "attention_map",
    "check_selector",
    "checksums",
    "collate_indexed",
    "contrastive_loss",
    "correlation",
    "decoupled_losses",
    "distance",
    "distances",
    "hinton_loss",
    "identity_of_function",
    "load_weights",
    "multilabel_loss",
    "number",
    "output_shapes",
    "paired_names",
    "select_labels",
    "select_logits",
    "similarities",
    "split_name",
    "standardized",
    "without_numbers",
]
