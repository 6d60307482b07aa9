import math
import re

import pytest
import torch
from torch import Tensor

from lightning_compress.distillation import LogitDistillation, hinton_loss


def slow_hinton_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Sum over samples, positions and classes, one probability at a time."""
    students, teachers = student.flatten(2).movedim(1, 2), teacher.flatten(2).movedim(1, 2)
    n_samples, n_positions, n_classes = students.shape
    total = torch.zeros((), dtype=student.dtype)
    for n in range(n_samples):
        for position in range(n_positions):
            p = (teachers[n, position] / temperature).exp()
            q = (students[n, position] / temperature).exp()
            p, q = p / p.sum(), q / q.sum()
            for c in range(n_classes):
                total = total + p[c] * (p[c] / q[c]).log()
    return temperature**2 * total / (n_samples * n_positions)


def test_the_loss_is_the_divergence_of_two_distributions() -> None:
    # The student is undecided, the teacher says 1/4 and 3/4: KL = 1/4 ln(1/2) + 3/4 ln(3/2).
    loss = hinton_loss(torch.zeros(1, 2), torch.tensor([[1.0, 3.0]]).log(), temperature=1.0)
    assert loss.item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))


def test_a_student_that_agrees_up_to_a_constant_has_no_loss() -> None:
    teacher = torch.tensor([[1.0, 2.0, 3.0]])
    assert hinton_loss(teacher + 5.0, teacher, temperature=2.0).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("shape", [(3, 4, 1), (2, 3, 2, 2), (2, 3, 2, 1, 2)])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_loss_and_gradient_equal_the_slow_reference(shape: tuple[int, ...], temperature: float) -> None:
    torch.manual_seed(0)
    student = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(shape, dtype=torch.float64)
    loss, expected = (loss(student, teacher, temperature) for loss in (hinton_loss, slow_hinton_loss))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], torch.autograd.grad(expected, student)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_computed_in_float32(dtype: torch.dtype) -> None:
    student, teacher = torch.randn(4, 10).to(dtype), torch.randn(4, 10).to(dtype)
    loss = hinton_loss(student, teacher, temperature=4.0)
    assert loss.dtype == torch.float32
    assert loss.item() == hinton_loss(student.float(), teacher.float(), temperature=4.0).item()


def test_autocast_does_not_lower_the_precision_of_the_loss() -> None:
    student, teacher = torch.randn(4, 10), torch.randn(4, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = hinton_loss(student, teacher, temperature=4.0)
    assert loss.dtype == torch.float32
    assert loss.item() == hinton_loss(student, teacher, temperature=4.0).item()


def test_large_half_precision_logits_do_not_overflow() -> None:
    student = torch.tensor([[60000.0, -60000.0]], dtype=torch.float16)
    # The student's log-probability of the second class is -120000 at T = 1; the teacher gives it 1/2.
    loss = hinton_loss(student, torch.zeros(1, 2, dtype=torch.float16), temperature=1.0)
    assert loss.item() == pytest.approx(math.log(0.5) + 0.5 * 119968.0, rel=1e-3)


def test_the_choice_is_called_without_its_weight() -> None:
    student, teacher = torch.randn(4, 10), torch.randn(4, 10)
    loss = LogitDistillation(temperature=3.0, weight=0.25)
    assert loss(student, teacher).item() == hinton_loss(student, teacher, temperature=3.0).item()


def test_shapes_that_differ_are_named() -> None:
    message = (
        "The student's and the teacher's logits must have the same shape, got (2, 3) and (2, 4): "
        "give both networks the same classes, or select other outputs."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        hinton_loss(torch.zeros(2, 3), torch.zeros(2, 4), temperature=1.0)


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_logits_without_two_classes_are_refused(shape: tuple[int, ...]) -> None:
    message = f"Logits must have the shape (N, C) or (N, C, *spatial) with at least two classes C, got {shape}."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        hinton_loss(torch.zeros(shape), torch.zeros(shape), temperature=1.0)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_out_of_range_is_refused(temperature: float) -> None:
    message = f"`temperature` must be a positive finite number, got {temperature}."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        LogitDistillation(temperature=temperature, weight=1.0)


@pytest.mark.parametrize("weight", [-0.1, math.inf, math.nan])
def test_a_weight_out_of_range_is_refused(weight: float) -> None:
    message = f"`weight` must be a finite number of at least 0, got {weight}."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        LogitDistillation(temperature=1.0, weight=weight)
