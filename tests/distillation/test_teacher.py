import copy
import re
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.distillation import FrozenTeacher, load_weights
from lightning_compress.errors import CompressionError


def identity(output: Tensor) -> Tensor:
    return output


def answer_of(teacher: FrozenTeacher, *args: Tensor, select: Any = identity, **kwargs: Any) -> Tensor:
    found = teacher.answer(args, kwargs, select).output
    assert found is not None
    return found


def test_a_frozen_teacher_is_in_eval_mode_and_needs_no_gradient() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.Dropout())
    FrozenTeacher(network).freeze()
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_release_gives_back_every_mode_and_flag_as_it_was() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3).eval(), nn.Linear(3, 2).requires_grad_(False))
    teacher = FrozenTeacher(network)
    teacher.freeze()
    teacher.freeze()  # must not remember the frozen state as the one to give back
    teacher.release()
    assert [module.training for module in network] == [True, False, True]
    assert [parameter.requires_grad for parameter in network.parameters()] == [True, True, True, True, False, False]


def test_the_answer_is_an_ordinary_tensor_without_gradient() -> None:
    teacher = FrozenTeacher(nn.Linear(2, 3))
    answer = answer_of(teacher, torch.ones(4, 2, requires_grad=True))
    assert not answer.is_inference()
    assert not answer.requires_grad


def test_the_answer_can_be_saved_for_backward() -> None:
    answer = answer_of(FrozenTeacher(nn.Linear(2, 3)), torch.ones(4, 2))
    weight = torch.ones(4, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad((weight * answer).sum(), weight)
    torch.testing.assert_close(gradient, answer)


def test_positional_and_keyword_inputs_reach_the_network() -> None:
    class Affine(nn.Module):
        def forward(self, x: Tensor, *, scale: float, offset: float = 0.0) -> dict[str, Tensor]:
            return {"y": x * scale + offset}

    answer = answer_of(FrozenTeacher(Affine()), torch.ones(2), select=itemgetter("y"), scale=3.0, offset=1.0)
    assert answer.tolist() == [4.0, 4.0]


def test_a_deep_copy_is_the_same_teacher() -> None:
    teacher = FrozenTeacher(nn.Linear(2, 3))
    assert copy.deepcopy({"teacher": teacher})["teacher"] is teacher


def test_another_precision_leaves_the_users_weights_exact() -> None:
    network = nn.Linear(2, 3)
    before = network.weight.detach().clone()
    teacher = FrozenTeacher(network)
    teacher.freeze()
    teacher.move_to(torch.device("cpu"), torch.bfloat16)
    assert answer_of(teacher, torch.ones(1, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16
    teacher.release()
    assert torch.equal(network.weight, before)


def test_a_move_follows_the_student_from_one_precision_to_the_next() -> None:
    teacher = FrozenTeacher(nn.Linear(2, 3))
    dtypes = [torch.float64, torch.float32, torch.bfloat16]
    answered = []
    for dtype in dtypes:
        teacher.move_to(torch.device("cpu"), dtype)
        answered.append(answer_of(teacher, torch.ones(1, 2, dtype=dtype)).dtype)
    assert answered == dtypes


@pytest.mark.parametrize("teacher", ["resnet.pt", None, nn.Linear])
def test_a_teacher_that_is_no_module_is_refused(teacher: Any) -> None:
    message = f"`teacher` must be an nn.Module, got {type(teacher).__name__}."
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        FrozenTeacher(teacher)


def test_a_parameter_shared_with_the_student_is_named() -> None:
    student = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    message = (
        "The teacher's parameter `weight` is also the student's `1.weight`: "
        "give `copy.deepcopy(teacher)`, and do not hold the teacher in the LightningModule."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        FrozenTeacher(student[1]).check_apart_from(student)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_answer_that_is_not_finite_is_refused(value: float) -> None:
    message = (
        "The teacher `Linear` returned NaN or infinite values: "
        "check its weights, and that its inputs are normalised as the student's are."
    )
    network = nn.Linear(2, 3)
    nn.init.constant_(network.bias, value)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        answer_of(FrozenTeacher(network), torch.ones(1, 2))


@pytest.mark.parametrize("wrap", ["none", "module", "checkpoint"])
def test_a_teacher_is_loaded_from_its_own_file_or_from_what_held_it(wrap: str, tmp_path: Path) -> None:
    trained = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    holder = nn.ModuleDict({"other": nn.Linear(2, 3), "network": trained})
    saved = {
        "none": trained.state_dict(),
        "module": holder.state_dict(),
        "checkpoint": {"state_dict": holder.state_dict(), "epoch": 3},
    }
    torch.save(saved[wrap], tmp_path / "teacher.ckpt")
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    load_weights(network, tmp_path / "teacher.ckpt")
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in network.state_dict().items())


def test_a_file_without_the_teachers_weights_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": nn.Linear(2, 3).state_dict()}, tmp_path / "other.ckpt")
    with pytest.raises(CompressionError) as caught:
        load_weights(nn.Sequential(nn.Linear(2, 3)), tmp_path / "other.ckpt")
    assert str(caught.value) == (
        f"{tmp_path / 'other.ckpt'} does not hold the weights of the teacher, a `Sequential`: it has no `0.weight`. "
        "It begins with `weight`, `bias`."
    )


def test_the_network_of_the_right_shape_is_taken(tmp_path: Path) -> None:
    saved = nn.ModuleDict({"small": nn.Linear(2, 3), "big": nn.Linear(4, 5)})
    torch.save(saved.state_dict(), tmp_path / "two.pt")
    network = nn.Linear(4, 5)
    load_weights(network, tmp_path / "two.pt")
    assert torch.equal(network.weight, saved["big"].get_parameter("weight"))
    with pytest.raises(CompressionError) as caught:
        load_weights(nn.Linear(7, 7), tmp_path / "two.pt")
    assert str(caught.value) == (
        f"{tmp_path / 'two.pt'} does not hold the weights of the teacher, a `Linear`: its `small.weight` has the shape "
        "(3, 2) instead of (7, 7)."
    )


def test_two_networks_that_fit_are_told_apart_by_the_user(tmp_path: Path) -> None:
    torch.save(nn.ModuleDict({"net": nn.Linear(2, 3), "ema": nn.Linear(2, 3)}).state_dict(), tmp_path / "two.pt")
    with pytest.raises(CompressionError) as caught:
        load_weights(nn.Linear(2, 3), tmp_path / "two.pt")
    assert str(caught.value) == (
        f"{tmp_path / 'two.pt'} holds 2 networks that fit the teacher, a `Linear`: `net`, `ema`. Load the one you mean "
        "yourself, and give the network alone."
    )


def test_a_pickled_module_is_not_read(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 3), tmp_path / "module.pt")
    with pytest.raises(CompressionError, match="holds more than tensors and plain types, which are all that is read"):
        load_weights(nn.Linear(2, 3), tmp_path / "module.pt")
