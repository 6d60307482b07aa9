"""What may teach: modules, callables, ONNX files, several of them, and the student itself."""

from __future__ import annotations

import copy
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.distillation import OwnTeacher, Teacher, TeacherEnsemble, as_teachers, identity_of_function
from lightning_compress.distillation.onnx_teacher import OnnxNetwork
from lightning_compress.errors import CompressionError
from lightning_compress.export import export_onnx

OTHER: Any = "int8"


def identity(output: Tensor) -> Tensor:
    return output


def answer(ensemble: TeacherEnsemble, *args: Any, **kwargs: Any) -> Tensor:
    found = ensemble.answer(args, kwargs, identity).output
    assert found is not None
    return found


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def test_an_onnx_file_answers_as_the_network_it_was_made_of(tmp_path: Path) -> None:
    original, x = network(), torch.randn(5, 4)
    export_onnx(original, torch.randn(2, 4), tmp_path / "teacher.onnx")
    ensemble = TeacherEnsemble(as_teachers(tmp_path / "teacher.onnx", None))
    torch.testing.assert_close(answer(ensemble, x), original(x).detach())
    again = copy.deepcopy(OnnxNetwork(tmp_path / "teacher.onnx"))
    torch.testing.assert_close(again(x.to(torch.float64)), original(x).detach())
    with pytest.raises(CompressionError, match=r"has the inputs `input`, and the student was called with 2 tensors"):
        answer(ensemble, x, x)


def test_keywords_of_the_student_are_inputs_of_the_file_by_name(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Tensor]:
            return {"first": x - scale, "second": x * scale}

    inputs = {"x": torch.randn(2, 3), "scale": torch.rand(2, 3)}
    export_onnx(Scaled(), inputs, tmp_path / "teacher.onnx")
    found = OnnxNetwork(tmp_path / "teacher.onnx")(scale=inputs["scale"], x=inputs["x"])
    torch.testing.assert_close(found, {"first": inputs["x"] - inputs["scale"], "second": inputs["x"] * inputs["scale"]})


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CompressionError, match=r"There is no teacher at .*missing\.onnx: the file does not exist"):
        Teacher(tmp_path / "missing.onnx").made()
    (tmp_path / "broken.onnx").write_bytes(b"nothing")
    with pytest.raises(CompressionError, match=r"ONNX Runtime cannot read the teacher .*broken\.onnx"):
        Teacher(tmp_path / "broken.onnx").made()


def test_any_callable_teaches_with_inputs_of_its_own() -> None:
    teacher = Teacher(lambda x, *, scale: x * scale, transform=lambda x: x.mean(1, keepdim=True))
    x = torch.tensor([[1.0, 3.0]])
    assert answer(TeacherEnsemble([teacher]), x, scale=5.0).tolist() == [[10.0]]
    two = Teacher(lambda x, y: x + y, transform=lambda x: (x[:, :1], x[:, 1:]))
    assert answer(TeacherEnsemble([two]), x).tolist() == [[4.0]]


def test_a_precision_of_its_own_leaves_the_weights_as_they_are() -> None:
    plain, x = network(), torch.randn(5, 4)
    before = copy.deepcopy(plain.state_dict())
    ensemble = TeacherEnsemble([Teacher(plain, precision="bf16")])
    ensemble.freeze()
    ensemble.move_to(torch.device("cpu"), torch.float32)
    with torch.autocast("cpu", dtype=torch.float16):
        found = answer(ensemble, x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, copy.deepcopy(plain).bfloat16()(x.bfloat16()))
    torch.testing.assert_close(plain.state_dict(), before, rtol=0, atol=0)


def test_the_logits_of_several_teachers_are_averaged_and_their_features_named_apart() -> None:
    first, second, x = network(), network(), torch.randn(5, 4)
    ensemble = TeacherEnsemble([Teacher(first, weight=3.0), Teacher(second)])
    assert {"0.1", "1.2"} <= set(ensemble.names([]))
    ensemble.tap(["0.1", "1.2"])
    found = ensemble.answer([x], {}, identity)
    torch.testing.assert_close(found.output, (0.75 * first(x) + 0.25 * second(x)).detach())
    assert found.features.keys() == {"0.1", "1.2"}
    torch.testing.assert_close(found.features["1.2"], [second(x).detach()])
    assert ensemble.answer([x], {}, None).output is None
    with pytest.raises(CompressionError, match=r"must have one shape to be averaged, got \(5, 3\), \(5, 4\)"):
        TeacherEnsemble([Teacher(first), Teacher(nn.Identity())]).answer([x], {}, identity)


def test_the_average_follows_the_student_by_hand() -> None:
    student = nn.Linear(1, 1, bias=False)
    teacher = OwnTeacher(decay=0.2)
    nn.init.constant_(student.weight, 1.0)
    teacher.begin(copy.deepcopy(student))
    expected = 1.0
    for step, value in enumerate([2.0, 4.0, -1.0], start=1):
        nn.init.constant_(student.weight, value)
        teacher.follow(student)
        decay = min(0.2, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    assert teacher.network.get_parameter("weight").item() == pytest.approx(expected)
    still = OwnTeacher(decay=None)
    still.begin(copy.deepcopy(student))
    nn.init.constant_(student.weight, 7.0)
    still.follow(student)
    assert still.network.get_parameter("weight").item() == -1.0


def test_buffers_are_taken_over_and_the_average_goes_on_after_a_load() -> None:
    student = nn.BatchNorm1d(2)
    teacher, again = OwnTeacher(decay=0.5), OwnTeacher(decay=0.5)
    teacher.begin(copy.deepcopy(student))
    student(torch.randn(8, 2))
    teacher.follow(student)
    again.load(teacher.save())
    assert not again.has_begun
    again.begin(copy.deepcopy(student))
    torch.testing.assert_close(again.network.state_dict(), teacher.network.state_dict(), rtol=0, atol=0)
    assert torch.equal(again.network.get_buffer("running_mean"), student.get_buffer("running_mean"))
    nn.init.constant_(student.weight, 3.0)
    for one in (teacher, again):
        one.follow(student)
    assert torch.equal(again.network.get_parameter("weight"), teacher.network.get_parameter("weight"))


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (
            lambda: Teacher("teacher.ckpt"),
            TypeError,
            r"must be an ONNX file, got 'teacher\.ckpt'. A checkpoint holds weights",
        ),
        (lambda: as_teachers(3.0, None), TypeError, r"`teacher` must be an nn\.Module, a callable, .* got float"),
        (lambda: Teacher("self", checkpoint="a.ckpt"), ValueError, "`checkpoint` holds the weights of an nn.Module"),
        (lambda: Teacher(network(), weight=0.0), ValueError, "`weight` must be a positive finite number, got 0.0"),
        (lambda: Teacher("ema", decay=1.0), ValueError, r"`decay` must be in \[0, 1\), got 1.0"),
        (
            partial(Teacher, network(), precision=OTHER),
            ValueError,
            "`precision` must be one of bf16, fp16, fp32",
        ),
        (lambda: as_teachers([network(), network()], "a.ckpt"), ValueError, "`teacher_checkpoint` is of one teacher"),
        (lambda: as_teachers(Teacher(network()), "a.ckpt"), ValueError, "Give the checkpoint to the `Teacher`"),
        (lambda: TeacherEnsemble([]), ValueError, "There must be at least one teacher, got none"),
    ],
)
def test_what_cannot_teach_is_refused(make: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make()


def test_tied_weights_are_averaged_once_and_half_precision_in_float32() -> None:
    first, second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    second.weight = first.weight
    teacher, student = OwnTeacher(decay=0.5), nn.Sequential(first, second).bfloat16()
    nn.init.constant_(first.weight, 1.0)
    teacher.begin(copy.deepcopy(student))
    nn.init.constant_(first.weight, 2.0)
    teacher.follow(student)
    decay = (1 + 1) / (10 + 1)
    expected = torch.full((2, 2), decay * 1.0 + (1 - decay) * 2.0)
    for name in ("0.weight", "1.weight"):
        torch.testing.assert_close(teacher.network.state_dict()[name], expected)


def test_features_keep_the_number_of_their_teacher_where_others_are_not_asked() -> None:
    first, second, x = network(), network(), torch.randn(5, 4)
    ensemble = TeacherEnsemble([Teacher(first), Teacher(second)])
    ensemble.tap(["1.1"])
    found = ensemble.answer([x], {}, None)
    torch.testing.assert_close(found.features, {"1.1": [second[:2](x).detach()]})


def test_functions_are_told_apart_by_what_they_do() -> None:
    def resized(size: int) -> Any:
        return lambda x: x[:, :size]

    functions: list[Any] = [torch.sin, torch.cos, itemgetter(0), itemgetter(1)]
    functions += [partial(torch.mul, 2), partial(torch.mul, 3)]
    functions += [resized(2), resized(3), lambda x: x.sin(), lambda x: x.cos(), lambda x: [y + 1 for y in x]]
    identities = [identity_of_function(function) for function in functions]
    assert len(set(identities)) == len(functions)
    assert identity_of_function(resized(2)) == identity_of_function(resized(2))
    assert not any("0x" in identity for identity in identities)


def test_an_average_that_answers_in_another_precision_answers_with_its_newest_weights() -> None:
    student, x = nn.Linear(4, 3), torch.randn(5, 4)
    teacher = OwnTeacher(decay=0.0)
    teacher.begin(copy.deepcopy(student))
    teacher.move_to(torch.device("cpu"), torch.bfloat16)
    nn.init.constant_(student.weight, 2.0)
    teacher.follow(student)
    found = teacher.answer([x.bfloat16()], {}, identity).output
    assert found is not None
    assert torch.equal(found, copy.deepcopy(student).bfloat16()(x.bfloat16()))


def test_buffers_of_another_precision_stay_as_they_are() -> None:
    network = nn.BatchNorm1d(2)
    network.register_buffer("exact", torch.tensor([1 / 3], dtype=torch.float64))
    teacher = TeacherEnsemble([Teacher(network)])
    teacher.freeze()
    teacher.move_to(torch.device("cpu"), torch.float32)
    answer(teacher, torch.ones(1, 2))
    teacher.release()
    assert network.state_dict()["exact"].dtype == torch.float64
    assert float(network.state_dict()["exact"]) == 1 / 3
