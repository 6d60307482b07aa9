"""Knowledge distillation: a trained teacher's outputs as a second target of the student."""

from lightning_compress.distillation.logits import LogitDistillation, hinton_loss
from lightning_compress.distillation.selector import OutputSelector, check_selector, select_logits
from lightning_compress.distillation.teacher import FrozenTeacher, load_weights

__all__ = [
    "FrozenTeacher",
    "LogitDistillation",
    "OutputSelector",
    "check_selector",
    "hinton_loss",
    "load_weights",
    "select_logits",
]
