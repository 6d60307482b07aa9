"""Every distillation loss against a slow reference, its gradient too, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_compress.distillation import (
    Annealing,
    AttentionTransfer,
    ContrastiveDistillation,
    CorrelationDistillation,
    DecoupledDistillation,
    DistillationLoss,
    FeatureDistillation,
    LogitDistillation,
    OutputRegression,
    PseudoLabels,
    RelationalDistillation,
    SimilarityPreserving,
    decoupled_losses,
    hinton_loss,
)


def total(values: Iterable[Tensor]) -> Tensor:
    """Return the sum, without the 0 that `sum` begins with."""
    first, *rest = values
    return sum(rest, first)


def softmax(scores: Tensor, temperature: float = 1.0) -> list[Tensor]:
    powers = [(score / temperature).exp() for score in scores]
    together = total(powers)
    return [power / together for power in powers]


def samples(tensor: Tensor) -> list[Tensor]:
    """Return the scores of every sample and position."""
    return list(tensor.flatten(2).movedim(1, 2).flatten(0, 1)) if tensor.dim() > 2 else list(tensor)


def mean(values: list[Tensor]) -> Tensor:
    return sum(values[1:], values[0]) / len(values)


def slow_multilabel(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    found = []
    for s, t in zip(samples(student), samples(teacher), strict=True):
        answers = [(1 / (1 + (-a).exp()), 1 / (1 + (-b).exp())) for a, b in zip(s / 2, t / 2, strict=True)]
        found.append(total(p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log() for q, p in answers))
    return 4 * mean(found)


def slow_standardized(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    found = []
    for s, t in zip(samples(student), samples(teacher), strict=True):
        s, t = ((x - mean(list(x))) / mean([(y - mean(list(x))) ** 2 for y in x]).sqrt() for x in (s, t))
        found.append(total(p * (p / q).log() for p, q in zip(softmax(t, 2.0), softmax(s, 2.0), strict=True)))
    return 4 * mean(found)


def slow_decoupled(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    found = []
    for s, t, label in zip(samples(student), samples(teacher), labels.flatten().tolist(), strict=True):
        q, p = softmax(s, 2.0), softmax(t, 2.0)
        others = [c for c in range(len(p)) if c != label]
        target = p[label] * (p[label] / q[label]).log() + (1 - p[label]) * ((1 - p[label]) / (1 - q[label])).log()
        rest = total(p[c] / (1 - p[label]) * ((p[c] / (1 - p[label])) / (q[c] / (1 - q[label]))).log() for c in others)
        found.append(1.5 * target + 8.0 * rest)
    return 4 * mean(found)


def slow_pearson(a: list[Tensor], b: list[Tensor]) -> Tensor:
    x, y = mean(a), mean(b)
    products = total((i - x) * (j - y) for i, j in zip(a, b, strict=True))
    return products / (total((i - x) ** 2 for i in a) * total((j - y) ** 2 for j in b)).sqrt()


def slow_correlation(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    q, p = [softmax(s, 2.0) for s in samples(student)], [softmax(t, 2.0) for t in samples(teacher)]
    rows = mean([1 - slow_pearson(a, b) for a, b in zip(q, p, strict=True)])
    columns = mean([1 - slow_pearson(list(a), list(b)) for a, b in zip(zip(*q), zip(*p), strict=True)])  # noqa: B905
    return 4 * (2.0 * rows + 3.0 * columns)


def slow_mse(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return mean([(a - b) ** 2 for a, b in zip(student.flatten(), teacher.flatten(), strict=True)])


def slow_cosine(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    pairs = zip(samples(student), samples(teacher), strict=True)
    return mean([1 - total(s * t) / (total(s**2) * total(t**2)).sqrt() for s, t in pairs])


def slow_pseudo_labels(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    found = []
    for s, t in zip(samples(student), samples(teacher), strict=True):
        p = softmax(t)
        if max(p) >= 0.5:
            found.append(-softmax(s)[int(t.argmax())].log())
    assert 0 < len(found) < len(samples(student))
    return mean(found)


def slow_attention(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    def maps(feature: Tensor) -> list[Tensor]:
        found = []
        for sample in feature:
            sums = [total(sample[c, y, x] ** 2 for c in range(len(sample))) for y in range(2) for x in range(2)]
            length = total(value**2 for value in sums) ** 0.5
            found += [value / length for value in sums]
        return found

    return mean([(a - b) ** 2 for a, b in zip(maps(student), maps(teacher), strict=True)])


def slow_similarity(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    def rows(feature: Tensor) -> list[Tensor]:
        flat, found = feature.flatten(1), []
        for a in flat:
            row = [total(a * b) for b in flat]
            length = total(value**2 for value in row) ** 0.5
            found += [value / length for value in row]
        return found

    n_pairs = len(student) ** 2
    return total((a - b) ** 2 for a, b in zip(rows(student), rows(teacher), strict=True)) / n_pairs


def huber(difference: Tensor) -> Tensor:
    size = difference.abs()
    return difference**2 / 2 if float(size.detach()) < 1 else size - 0.5


def slow_relations(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    n = len(student)

    def pairs(feature: Tensor) -> list[Tensor]:
        flat = feature.flatten(1)
        found = [total((flat[i] - flat[j]) ** 2) ** 0.5 for i, j in product(range(n), repeat=2) if i != j]
        return [distance / mean(found) for distance in found]

    def triples(feature: Tensor) -> list[Tensor]:
        flat, found = feature.flatten(1), []
        for j, i, k in product(range(n), repeat=3):
            if i == j or k == j:
                continue
            a, b = flat[i] - flat[j], flat[k] - flat[j]
            found.append(total(a * b) / (total(a**2) * total(b**2)) ** 0.5)
        return found

    # Entries of a sample with itself are zeros on both sides, and count in the mean.
    distance = total(huber(a - b) for a, b in zip(pairs(student), pairs(teacher), strict=True)) / n**2
    angle = total(huber(a - b) for a, b in zip(triples(student), triples(teacher), strict=True)) / n**3
    return 25.0 * distance + 50.0 * angle


def slow_contrast(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    s, t = ([row / total(row**2) ** 0.5 for row in rows.flatten(1)] for rows in (student, teacher))
    scores = torch.stack([torch.stack([total(a * b) / 0.5 for b in t]) for a in s])
    rows = [-softmax(scores[i])[i].log() for i in range(len(s))]
    columns = [-softmax(scores[:, i])[i].log() for i in range(len(s))]
    return (mean(rows) + mean(columns)) / 2


ANY: Any = "other"
LAYERS = {"a": "b"}
REFERENCES: list[tuple[DistillationLoss, Callable[[Tensor, Tensor, Tensor], Tensor], tuple[int, ...]]] = [
    (LogitDistillation(temperature=2.0, multilabel=True), slow_multilabel, (3, 4)),
    (LogitDistillation(temperature=2.0, multilabel=True), slow_multilabel, (2, 3, 2, 2)),
    (LogitDistillation(temperature=2.0, standardize=True), slow_standardized, (3, 4)),
    (LogitDistillation(temperature=2.0, standardize=True), slow_standardized, (2, 3, 2, 2)),
    (DecoupledDistillation(temperature=2.0, target=1.5), slow_decoupled, (3, 4)),
    (DecoupledDistillation(temperature=2.0, target=1.5), slow_decoupled, (2, 3, 2, 2)),
    (CorrelationDistillation(temperature=2.0, between_classes=2.0, between_samples=3.0), slow_correlation, (3, 4)),
    (CorrelationDistillation(temperature=2.0, between_classes=2.0, between_samples=3.0), slow_correlation, (2, 3, 2)),
    (OutputRegression(), slow_mse, (3, 4)),
    (OutputRegression(metric="cosine"), slow_cosine, (2, 3, 2, 2)),
    (FeatureDistillation(layers=LAYERS), slow_mse, (2, 3, 2, 2)),
    (FeatureDistillation(layers=LAYERS, metric="cosine"), slow_cosine, (3, 4)),
    (PseudoLabels(threshold=0.5), slow_pseudo_labels, (8, 3)),
    (AttentionTransfer(layers=LAYERS), slow_attention, (3, 4, 2, 2)),
    (SimilarityPreserving(), slow_similarity, (3, 4)),
    (RelationalDistillation(distance=25.0, angle=50.0), slow_relations, (4, 3)),
    (ContrastiveDistillation(temperature=0.5), slow_contrast, (3, 4)),
]


@pytest.mark.parametrize(
    ("loss", "reference", "shape"),
    REFERENCES,
    ids=[f"{reference.__name__}{shape}" for _, reference, shape in REFERENCES],
)
def test_loss_and_gradient_equal_the_slow_reference(loss: DistillationLoss, reference: Any, shape: Any) -> None:
    torch.manual_seed(0)
    student = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(shape, dtype=torch.float64)
    labels = torch.randint(0, shape[1], (shape[0], *shape[2:]))
    found, expected = loss(student, teacher, labels), reference(student, teacher, labels)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, student)[0], torch.autograd.grad(expected, student)[0])


@pytest.mark.parametrize("loss", [loss for loss, *_ in REFERENCES], ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(loss: DistillationLoss, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 5, 2, 2).to(dtype), torch.randn(4, 5, 2, 2).to(dtype)
    labels = torch.randint(0, 5, (4, 2, 2))
    found = loss(student, teacher, labels)
    assert found.dtype == torch.float32
    assert found.item() == loss(student.float(), teacher.float(), labels).item()


def test_both_parts_of_the_decoupled_loss_make_hintons() -> None:
    torch.manual_seed(0)
    student, teacher, labels = torch.randn(1, 5), torch.randn(1, 5), torch.tensor([3])
    target, others = decoupled_losses(student, teacher, labels, temperature=2.0)
    share = 1 - (teacher / 2.0).softmax(1)[0, 3]
    torch.testing.assert_close(target + share * others, hinton_loss(student, teacher, temperature=2.0))


@pytest.mark.parametrize(
    ("loss", "shape"),
    [(SimilarityPreserving(), (4, 3)), (RelationalDistillation(), (4, 3)), (CorrelationDistillation(), (4, 3))],
    ids=lambda value: type(value).__name__,
)
def test_a_student_that_is_its_teacher_has_no_loss_and_a_finite_gradient(
    loss: DistillationLoss, shape: tuple[int, ...]
) -> None:
    teacher = torch.randn(shape)
    teacher[1] = teacher[0]  # two samples that are one
    student = teacher.clone().requires_grad_()
    found = loss(student, teacher)
    assert found.item() == pytest.approx(0.0, abs=1e-5)
    assert torch.isfinite(torch.autograd.grad(found, student)[0]).all()


def test_confident_logits_do_not_overflow() -> None:
    student, teacher = torch.tensor([[1e4, -1e4, 0.0]]), torch.tensor([[-1e4, 1e4, 0.0]])
    for loss in (LogitDistillation(), LogitDistillation(multilabel=True), DecoupledDistillation()):
        assert math.isfinite(loss(student, teacher, torch.tensor([0])).item())


def test_pseudo_labels_of_an_unsure_teacher_teach_nothing() -> None:
    assert PseudoLabels(threshold=0.9)(torch.randn(3, 4), torch.zeros(3, 4)).item() == 0.0


@pytest.mark.parametrize(
    ("student", "teacher", "adaptor"),
    [
        ((8, 16, 4, 4), (8, 32, 2, 2), "Conv2d(16, 32, kernel_size=(1, 1), stride=(1, 1), bias=False)"),
        ((8, 16, 9), (8, 32, 9), "Conv1d(16, 32, kernel_size=(1,), stride=(1,), bias=False)"),
        ((8, 9, 16), (8, 9, 32), "Linear(in_features=16, out_features=32, bias=False)"),
        ((8, 7, 7, 16), (8, 7, 7, 32), "Linear(in_features=16, out_features=32, bias=False)"),
        ((8, 16), (8, 32), "Linear(in_features=16, out_features=32, bias=False)"),
        ((8, 16, 4, 4), (8, 16, 4, 4), "Identity()"),
    ],
)
def test_hints_go_through_a_linear_map_where_channels_differ(student: Any, teacher: Any, adaptor: str) -> None:
    hint = FeatureDistillation(layers=["layer"])
    mine, theirs = hint.adaptors(student, teacher)
    assert (str(mine), str(theirs)) == (adaptor, "Identity()")
    assert hint(mine(torch.randn(student)), theirs(torch.randn(teacher))).dim() == 0


def test_contrasts_are_pooled_and_mapped_on_both_sides() -> None:
    loss = ContrastiveDistillation(features=5)
    mine, theirs = loss.adaptors((3, 8, 2, 2), (3, 6))
    assert (mine(torch.randn(3, 8, 2, 2)).shape, theirs(torch.randn(3, 6)).shape) == ((3, 5), (3, 5))


def test_what_changes_over_the_run_is_known_at_a_step() -> None:
    loss = LogitDistillation(temperature=Annealing(8.0, 2.0, end=100), weight=Annealing(0.0, 0.5, start=0.5))
    assert loss.at(50, 200) == LogitDistillation(temperature=5.0, weight=0.0)
    assert loss.at(200, 200) == LogitDistillation(temperature=2.0, weight=0.5)
    with pytest.raises(TypeError, match=r"known only at a step: use `loss.at\(step, total_steps\)`"):
        loss(torch.zeros(1, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"`start=0\.5` is a share of the run, but this run has no known end"):
        loss.at(50, None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LogitDistillation(weight=-1.0), "`weight` must be a finite number of at least 0, got -1.0"),
        (lambda: LogitDistillation(temperature=Annealing(1.0, 0.0)), "`temperature` must be a positive finite number"),
        (lambda: LogitDistillation(multilabel=True, standardize=True), "which `multilabel` keeps apart"),
        (lambda: DecoupledDistillation(others=math.inf), "`others` must be a finite number of at least 0, got inf"),
        (lambda: CorrelationDistillation(between_samples=-1), "`between_samples` must be a finite number"),
        (partial(OutputRegression, metric=ANY), "`metric` must be one of mse, cosine, got 'other'"),
        (lambda: PseudoLabels(threshold=1.0), r"`threshold` is a probability in \[0, 1\), got 1.0"),
        (lambda: FeatureDistillation(), '`FeatureDistillation` needs `layers`, such as {"layer3": "layer4"}'),
        (
            partial(FeatureDistillation, layers=["a"], adaptor=ANY),
            "`adaptor` must be one of auto, always, never",
        ),
        (lambda: AttentionTransfer(), "`AttentionTransfer` needs `layers`"),
        (lambda: RelationalDistillation(angle=-1), "`angle` must be a finite number of at least 0"),
        (lambda: ContrastiveDistillation(features=0), "`features` must be a finite number of at least 1, got 0"),
        (lambda: Annealing(0.0, math.nan), "`final` must be a finite number, got nan"),
        (lambda: Annealing(0.0, 1.0, start=0.8, end=0.2), "`start` must not come after `end`"),
        (partial(Annealing, 0.0, 1.0, shape=ANY), "`shape` must be one of linear, cosine, got 'other'"),
    ],
)
def test_arguments_out_of_range_are_refused_at_once(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_one_string_of_layers_is_refused() -> None:
    with pytest.raises(
        TypeError, match="`layers` must be a list of names or a mapping, got the single string 'layer3'"
    ):
        FeatureDistillation(layers="layer3")


@pytest.mark.parametrize(
    ("loss", "student", "teacher", "labels", "message"),
    [
        (DecoupledDistillation(), (2, 3), (2, 3), None, "`DecoupledDistillation` needs the labels"),
        (DecoupledDistillation(), (2, 3), (2, 3), torch.tensor([0, 3]), "must be classes from 0 to 2, got 0 to 3"),
        (DecoupledDistillation(), (2, 3), (2, 3), torch.zeros(2), r"shape \(2,\), got torch.float32 of shape \(2,\)"),
        (OutputRegression(), (2, 3), (2, 4), None, r"outputs must have the same shape, got \(2, 3\) and \(2, 4\)"),
        (SimilarityPreserving(), (1, 3), (1, 3), None, "Similarities relate the samples of a batch"),
        (AttentionTransfer(layers=["a"]), (2, 3), (2, 3), None, "Attention maps need features of the shape"),
        (FeatureDistillation(layers=["a"]), (2, 3, 4), (2, 3), None, "cannot be compared: both need a batch"),
    ],
)
def test_outputs_that_cannot_be_compared_are_refused(
    loss: DistillationLoss, student: Any, teacher: Any, labels: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        loss(torch.randn(student), torch.randn(teacher), labels)


def test_channels_of_sequences_are_last_where_that_is_said() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 5, 4), torch.randn(3, 5, 4)
    hint = FeatureDistillation(layers=["a"], metric="cosine", channels="last", adaptor="always")
    assert str(hint.adaptors(student.shape, teacher.shape)[0]) == "Linear(in_features=4, out_features=4, bias=False)"
    expected = slow_cosine(student.flatten(0, 1), teacher.flatten(0, 1), torch.zeros(0))
    torch.testing.assert_close(hint(student, teacher), expected)
    first = FeatureDistillation(layers=["a"], metric="cosine", channels="first")
    torch.testing.assert_close(first(student, teacher), slow_cosine(student, teacher, torch.zeros(0)))
    with pytest.raises(ValueError, match=r'have their channels last, .* Say so for the cosine: `channels="last"`'):
        FeatureDistillation(layers=["a"], metric="cosine").adaptors((3, 5, 4), (3, 5, 8))
    with pytest.raises(ValueError, match="`channels` must be one of auto, first, last, got 'other'"):
        FeatureDistillation(layers=["a"], channels=ANY)
