"""Teachers of every kind in real fits: files, several, and the student itself, over a resume too."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from lightning_compress import FeatureDistillation, LogitDistillation, QuantizationAwareTraining, Teacher, export_onnx
from lightning_compress.callbacks.distillation import KnowledgeDistillation
from lightning_compress.errors import CompressionError
from tests.callbacks.test_distillation import (
    N_FEATURES,
    Dropping,
    ManualStudent,
    RandomState,
    Student,
    TwoNetworksStudent,
    loader,
    seeded,
    slow_reference,
    trainer,
)
from tests.callbacks.test_distillation import Teacher as TeacherNetwork
from tests.compatibility.runs import LIGHTNING_NOISE

pytestmark = [pytest.mark.filterwarnings(message) for message in LIGHTNING_NOISE]


def test_a_file_teaches_as_the_network_it_was_made_of(tmp_path: Path) -> None:
    student, teacher = seeded(Student), seeded(TeacherNetwork, seed=1).eval()
    export_onnx(teacher, torch.randn(2, N_FEATURES), tmp_path / "teacher.onnx")
    expected = slow_reference(student, teacher, None, accumulate=1)
    callback = KnowledgeDistillation(tmp_path / "teacher.onnx", temperature=2.0, weight=0.5)
    trainer(tmp_path, callback).fit(student, loader())
    torch.testing.assert_close(student.state_dict(), expected.state_dict())


def test_teachers_with_a_name_of_their_own_are_tapped(tmp_path: Path) -> None:
    teachers = [seeded(TeacherNetwork, seed=seed) for seed in (1, 2)]
    losses = [LogitDistillation(), FeatureDistillation(layers={"hidden": "1.net.1"})]
    student = seeded(Student)
    trainer(tmp_path, KnowledgeDistillation(teachers, losses=losses)).fit(student, loader())
    assert not any(parameter.grad is not None for teacher in teachers for parameter in teacher.parameters())
    unknown = KnowledgeDistillation(teachers, losses=[FeatureDistillation(layers={"hidden": "net.1"})])
    with pytest.raises(ValueError, match=r"names the teacher's module `net\.1`, which it does not have"):
        trainer(tmp_path, unknown).fit(student, loader())


class Reads(pl.Callback):
    def __init__(self) -> None:
        self.terms: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.terms.append(float(trainer.callback_metrics["compress/distillation_loss"]))


@pytest.mark.parametrize("make_student", [Student, ManualStudent])
def test_the_student_as_it_was_is_a_copy_made_by_hand(make_student: type[Student], tmp_path: Path) -> None:
    student, reads = seeded(make_student), Reads()
    expected = slow_reference(student, copy.deepcopy(student), None, accumulate=1)
    trainer(tmp_path, KnowledgeDistillation("self", temperature=2.0, weight=0.5), reads).fit(student, loader())
    torch.testing.assert_close(student.state_dict(), expected.state_dict())
    assert reads.terms[0] == pytest.approx(0.0, abs=1e-6)
    assert reads.terms[-1] > 1e-3


def test_the_float_student_teaches_the_quantized_one(tmp_path: Path) -> None:
    student, reads = seeded(Student), Reads()
    losses = [LogitDistillation(weight=1.0), FeatureDistillation(layers=["hidden"], weight=1.0)]
    quantization = QuantizationAwareTraining(weight_bits=4, activation_bits=4, start=0.0)
    callback = KnowledgeDistillation("self", losses=losses, task_loss=False)
    trainer(tmp_path, quantization, callback, reads, max_epochs=2).fit(student, loader())
    (teacher,) = callback._teacher.own
    assert "forward" not in vars(teacher.network)
    assert reads.terms[-1] > 0  # rounded, it is not what it was


def test_names_of_the_students_own_modules_may_begin_with_the_networks(tmp_path: Path) -> None:
    class Wrapped(TwoNetworksStudent):
        def __init__(self) -> None:
            super().__init__()
            self.net = Student()

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
            return torch.nn.functional.cross_entropy(self.net(batch["x"]), batch["label"])

    for layers in (["hidden"], ["net.hidden"], {"net.hidden": "hidden"}):
        losses = [FeatureDistillation(layers=layers)]
        callback = KnowledgeDistillation("self", losses=losses, module="net")
        trainer(tmp_path, callback).fit(seeded(Wrapped), loader())


@pytest.mark.parametrize("own", ["self", "ema"])
def test_a_resumed_run_has_the_teacher_that_the_uninterrupted_one_has(own: str, tmp_path: Path) -> None:
    def run(max_epochs: int, ckpt_path: Path | None = None) -> tuple[pl.Trainer, Student, KnowledgeDistillation]:
        student, callback = seeded(Dropping), KnowledgeDistillation(Teacher(own, decay=0.9), weight=0.5)
        torch.manual_seed(2)
        fit = trainer(tmp_path, callback, RandomState(), max_epochs=max_epochs)
        fit.fit(student, loader(), ckpt_path=ckpt_path)
        return fit, student, callback

    _, whole, teachers = run(4)
    first, _, _ = run(2)
    first.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed, again = run(4, tmp_path / "half.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    weights = [callback._teacher.own[0].network.state_dict() for callback in (teachers, again)]
    torch.testing.assert_close(*weights, rtol=0, atol=0)
    keys = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"].keys()
    assert set(keys) == set(whole.state_dict())


def test_a_new_run_begins_with_the_student_as_it_is_then(tmp_path: Path) -> None:
    student, reads = seeded(Student), Reads()
    callback = KnowledgeDistillation("self", weight=0.5)
    for _ in range(2):
        trainer(tmp_path, callback, reads).fit(student, loader())
    assert [round(term, 5) for term in reads.terms[::4]] == [0.0, 0.0]


def test_the_average_comes_after_the_student(tmp_path: Path) -> None:
    student = seeded(Student)
    before = copy.deepcopy(student.hidden.weight)
    callback = KnowledgeDistillation(Teacher("ema", decay=0.5), weight=0.5)
    trainer(tmp_path, callback).fit(student, loader())
    average = callback._teacher.own[0].network.get_parameter("hidden.weight")
    assert not torch.equal(average, before)
    assert (average - student.hidden.weight).norm() < (before - student.hidden.weight).norm()


def test_a_checkpoint_of_other_teachers_is_refused(tmp_path: Path) -> None:
    first = trainer(tmp_path, KnowledgeDistillation("self"))
    first.fit(seeded(Student), loader())
    first.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(CompressionError, match="written with 1 teachers that are the student itself, this run has 2"):
        trainer(tmp_path, KnowledgeDistillation(["self", "ema"]), max_epochs=2).fit(
            seeded(Student), loader(), ckpt_path=tmp_path / "one.ckpt"
        )


def test_a_trainer_that_goes_on_keeps_the_student_as_it_was(tmp_path: Path) -> None:
    class Inside(Student):
        def __init__(self) -> None:
            super().__init__()
            self.net = Student()

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
            return torch.nn.functional.cross_entropy(self.net(batch["x"]), batch["label"])

    callback = KnowledgeDistillation("self", losses=[FeatureDistillation(layers=["net.hidden"])], module="net")
    student = seeded(Inside)
    run = trainer(tmp_path, callback)
    run.fit(student, loader())
    weights = copy.deepcopy(callback._teacher.own[0].network.state_dict())
    run.fit_loop.max_epochs = 2
    run.fit(student, loader())
    torch.testing.assert_close(callback._teacher.own[0].network.state_dict(), weights, rtol=0, atol=0)


@pytest.mark.parametrize("losses", [[LogitDistillation()], [FeatureDistillation(layers={"hidden": "net.1"})]])
def test_a_compiled_teacher_teaches_as_it_would_uncompiled(losses: list[Any], tmp_path: Path) -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    plain, compiled = seeded(Student), seeded(Student)
    for student, teacher in (
        (plain, seeded(TeacherNetwork, seed=1)),
        (compiled, torch.compile(seeded(TeacherNetwork, seed=1), backend=backend)),
    ):
        trainer(tmp_path, KnowledgeDistillation(teacher, losses=losses), max_epochs=2).fit(student, loader())
    torch.testing.assert_close(compiled.state_dict(), plain.state_dict())
    assert bool(graphs) == isinstance(losses[0], LogitDistillation)
