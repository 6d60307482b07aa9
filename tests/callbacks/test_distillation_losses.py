"""`KnowledgeDistillation` with lists of losses in real fits: features, adaptors, labels, annealing, refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import LearningRateFinder, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from lightning_compress import OnnxExport, QuantizationAwareTraining
from lightning_compress.callbacks.distillation import KnowledgeDistillation
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
    RelationalDistillation,
    SimilarityPreserving,
    decoupled_losses,
)
from lightning_compress.errors import CompressionError
from tests.callbacks.test_distillation import (
    N_CLASSES,
    N_FEATURES,
    ManualStudent,
    RandomState,
    Student,
    Teacher,
    loader,
    seeded,
    trainer,
)
from tests.compatibility.runs import LIGHTNING_NOISE

pytestmark = [pytest.mark.filterwarnings(message) for message in LIGHTNING_NOISE]

HINT = FeatureDistillation(layers={"hidden": "net.1"}, weight=0.5)


def fit(student: pl.LightningModule, path: Path, *losses: DistillationLoss, **settings: Any) -> KnowledgeDistillation:
    options = {key: settings.pop(key) for key in ("labels", "task_loss", "module") if key in settings}
    callback = KnowledgeDistillation(seeded(Teacher, seed=1), losses=losses, **options)
    trainer(path, callback, **settings).fit(student, loader())
    return callback


def adaptor_weights(callback: KnowledgeDistillation) -> dict[str, Tensor]:
    saved = callback._learned.save()["adaptors"]
    return {f"{name}/{key}": value for name, pair in saved.items() for key, value in pair["weights"].items()}


def slow_hint(student: Student, teacher: nn.Module, adaptor: Tensor, accumulate: int = 1) -> tuple[Student, Tensor]:
    """One epoch of SGD with learning rate 1 in plain PyTorch: cross-entropy and half the hint's mean squared error."""
    student, teacher = copy.deepcopy(student), copy.deepcopy(teacher).eval()
    assert isinstance(teacher, Teacher)
    adaptor = adaptor.clone().requires_grad_()
    parameters = [*student.parameters(), adaptor]
    for index, batch in enumerate(loader()):
        with torch.no_grad():
            feature = teacher.net[1](teacher.net[0](batch["x"]))
        hint = (student.hidden(batch["x"]) @ adaptor.T - feature).square().mean()
        loss = F.cross_entropy(student(batch["x"]), batch["label"]) + 0.5 * hint
        torch.autograd.backward(loss / accumulate)
        if (index + 1) % accumulate == 0:
            with torch.no_grad():
                for parameter in parameters:
                    assert parameter.grad is not None
                    parameter.sub_(parameter.grad)
                    parameter.grad = None
    return student, adaptor.detach()


def first_adaptor(path: Path) -> Tensor:
    """Return the hint's adaptor as it begins: that of a run whose learning rate is 0."""

    class Still(Student):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    (weight,) = adaptor_weights(fit(seeded(Still), path, HINT)).values()
    return weight


@pytest.mark.parametrize(("make_student", "accumulate"), [(Student, 1), (Student, 2), (ManualStudent, 1)])
def test_hints_and_their_adaptors_are_trained_as_in_the_slow_reference(
    make_student: type[Student], accumulate: int, tmp_path: Path
) -> None:
    # The teacher's ReLU is in place in no network here; the batch norm's output is what is compared.
    student = seeded(make_student)
    expected, adaptor = slow_hint(student, seeded(Teacher, seed=1), first_adaptor(tmp_path), accumulate)
    callback = fit(student, tmp_path, HINT, **({"accumulate_grad_batches": accumulate} if accumulate > 1 else {}))
    torch.testing.assert_close(student.state_dict(), expected.state_dict())
    torch.testing.assert_close(adaptor_weights(callback), {"feature_distillation: hidden to net.1/0.weight": adaptor})


class InPlaceTeacher(Teacher):
    def __init__(self) -> None:
        super().__init__()
        self.net[2] = nn.ReLU(inplace=True)


class InPlaceStudent(Student):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x).relu_())  # type: ignore[no-any-return]


def test_what_is_overwritten_after_a_tap_is_compared_as_it_was(tmp_path: Path) -> None:
    class Plain(Student):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.hidden(x).relu())  # type: ignore[no-any-return]

    results = []
    for student, teacher in ((seeded(Plain), Teacher), (seeded(InPlaceStudent), InPlaceTeacher)):
        callback = KnowledgeDistillation(seeded(teacher, seed=1), losses=[HINT])
        trainer(tmp_path, callback).fit(student, loader())
        results.append(student.state_dict())
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_adaptors_are_in_no_state_dict_and_no_file_and_travel_under_our_own_key(tmp_path: Path) -> None:
    student = seeded(Student)
    keys = set(student.state_dict())
    callback = KnowledgeDistillation(seeded(Teacher, seed=1), losses=[HINT, LogitDistillation()])
    export = OnnxExport(tmp_path / "model.onnx", latency=False)
    run = trainer(tmp_path, callback, WeightAveraging(), export)
    run.fit(student, loader())
    run.save_checkpoint(tmp_path / "end.ckpt")
    assert set(student.state_dict()) == keys
    checkpoint = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert list(checkpoint["lightning_compress"]["distillation"]["adaptors"]) == [
        "feature_distillation: hidden to net.1"
    ]
    assert not any("adaptor" in name for name in checkpoint["state_dict"])
    loaded = Student.load_from_checkpoint(tmp_path / "end.ckpt")
    torch.testing.assert_close(loaded.state_dict(), student.state_dict())


class Cycled(Student):
    """Adam and a schedule that counts its optimizer's groups."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        return F.cross_entropy(self(F.dropout(batch["x"], 0.2)), batch["label"])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=16)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def test_a_run_that_is_stopped_and_resumed_has_the_same_adaptors_to_the_bit(tmp_path: Path) -> None:
    losses = [HINT, ContrastiveDistillation(features=3, weight=0.1)]

    def run(max_epochs: int, ckpt_path: Path | None = None) -> tuple[pl.Trainer, Student, dict[str, Tensor]]:
        student, callback = seeded(Cycled), KnowledgeDistillation(seeded(Teacher, seed=1), losses=losses)
        torch.manual_seed(2)
        fitted = trainer(tmp_path, callback, RandomState(), max_epochs=max_epochs)
        fitted.fit(student, loader(), ckpt_path=ckpt_path)
        return fitted, student, adaptor_weights(callback)

    _, whole, adaptors = run(4)
    first, _, _ = run(2)
    first.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed, again = run(4, tmp_path / "half.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert adaptors.keys() == again.keys()
    assert all(torch.equal(adaptors[name], again[name]) for name in adaptors)


class WritesAdaptors(pl.Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        (callback,) = (item for item in trainer.callbacks if isinstance(item, KnowledgeDistillation))  # type: ignore[attr-defined]
        torch.save(adaptor_weights(callback), self.folder / f"{trainer.global_rank}.pt")


def test_two_processes_learn_the_same_adaptors(tmp_path: Path) -> None:
    strategy = DDPStrategy(process_group_backend="gloo", start_method="spawn")
    callback = KnowledgeDistillation(seeded(Teacher, seed=1), losses=[HINT])
    trainer(tmp_path, callback, WritesAdaptors(tmp_path), strategy=strategy, devices=2).fit(seeded(Student), loader())
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert len(first) == 1
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_taps_hear_a_network_that_is_being_quantized(tmp_path: Path) -> None:
    student = seeded(Student)
    callback = KnowledgeDistillation(seeded(Teacher, seed=1), losses=[HINT])
    quantization = QuantizationAwareTraining(start=0.25, freeze=0.75)
    losses: list[float] = []

    class Reads(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            losses.append(float(trainer.callback_metrics["compress/distillation_loss"]))

    trainer(tmp_path, quantization, callback, Reads(), max_epochs=3).fit(student, loader())
    assert losses[-1] < losses[0]
    assert all(loss > 0 for loss in losses)


class Blocks(nn.Module):
    """Three blocks that return tuples, one of them called twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(N_FEATURES, width)
        self.blocks = nn.ModuleList([nn.GRU(width, width, batch_first=True) for _ in range(3)])
        self.act = nn.Tanh()
        self.head = nn.Linear(width, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x)).unsqueeze(1)
        for block in self.blocks:
            x, _ = block(x)
        return self.head(self.act(x.squeeze(1)))  # type: ignore[no-any-return]


class BlockStudent(Student):
    def __init__(self, width: int = 4) -> None:
        pl.LightningModule.__init__(self)
        self.network = Blocks(width)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        return F.cross_entropy(self.network(batch["x"]), batch["label"])


@pytest.mark.parametrize("prefix", ["", "network."])
def test_patterns_entries_and_modules_called_twice_are_paired(prefix: str, tmp_path: Path) -> None:
    seen: dict[str, list[tuple[int, ...]]] = {}

    class Spy(SimilarityPreserving):
        def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
            seen.setdefault("student", []).append(tuple(student.shape))
            seen.setdefault("teacher", []).append(tuple(teacher.shape))
            return super().__call__(student, teacher)

    layers = {f"{prefix}blocks.*[0]": "blocks.*[0]", f"{prefix}act": "act"}
    callback = KnowledgeDistillation(seeded(lambda: Blocks(7)), losses=[Spy(layers=layers)])
    trainer(tmp_path, callback, limit_train_batches=1).fit(seeded(BlockStudent), loader())
    assert seen["student"] == [(8, 1, 4)] * 3 + [(8, 4)] * 2
    assert seen["teacher"] == [(8, 1, 7)] * 3 + [(8, 7)] * 2


def test_the_teacher_runs_once_however_many_losses_there_are(tmp_path: Path) -> None:
    calls: list[int] = []
    teacher = seeded(Teacher, seed=1)
    teacher.register_forward_hook(lambda *_: calls.append(1))
    losses = [
        LogitDistillation(weight=0.1),
        OutputRegression(weight=0.1),
        CorrelationDistillation(weight=0.1),
        HINT,
        RelationalDistillation(layers={"hidden": "net.1"}),
    ]
    trainer(tmp_path, KnowledgeDistillation(teacher, losses=losses)).fit(seeded(Student), loader())
    assert len(calls) == len(loader())


@pytest.mark.parametrize("labels", [None, "label", lambda batch: batch["label"]])
def test_labels_are_found_in_the_batch(labels: Any, tmp_path: Path) -> None:
    student, teacher = seeded(Student), seeded(Teacher, seed=1)
    batch = next(iter(loader()))
    target, others = decoupled_losses(
        student(batch["x"]).detach(),
        copy.deepcopy(teacher).eval()(batch["x"]).detach(),
        batch["label"],
        temperature=4.0,
    )
    losses: list[float] = []

    class Reads(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            losses.append(float(trainer.callback_metrics["compress/distillation_loss"]))

    callback = KnowledgeDistillation(teacher, losses=[DecoupledDistillation(weight=0.5)], labels=labels)
    trainer(tmp_path, callback, Reads(), limit_train_batches=1).fit(student, loader())
    assert losses == [pytest.approx(0.5 * float(target + 8.0 * others), rel=1e-5)]


def test_weights_change_over_the_run(tmp_path: Path) -> None:
    seen: list[tuple[float, float]] = []

    class Reads(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            metrics = trainer.callback_metrics
            ratio = metrics["compress/distillation_loss"] - 0.0 * metrics["compress/output_regression"]
            seen.append((float(ratio), float(metrics["compress/logit_distillation"])))

    losses = [LogitDistillation(weight=Annealing(0.0, 1.0, end=3)), OutputRegression(weight=0.0)]
    callback = KnowledgeDistillation(seeded(Teacher, seed=1), losses=losses)
    trainer(tmp_path, callback, Reads()).fit(seeded(Student), loader())
    assert [round(total / term, 4) for total, term in seen] == [0.0, 0.3333, 0.6667, 1.0]


class Silent(Student):
    """Calls the network and returns no loss of its own."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self(batch["x"])


def test_a_student_learns_without_labels(tmp_path: Path) -> None:
    class Mentioned(Student):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
            return 0.0 * self(batch["x"]).sum()

    silent, mentioned = seeded(Silent), seeded(Mentioned)
    fit(silent, tmp_path, LogitDistillation(weight=1.0), task_loss=False)
    fit(mentioned, tmp_path, LogitDistillation(weight=1.0))
    torch.testing.assert_close(silent.state_dict(), mentioned.state_dict())
    assert not torch.equal(silent.hidden.weight, seeded(Silent).hidden.weight)


def refused(make: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make()


def test_unknown_modules_are_refused_before_training(tmp_path: Path) -> None:
    student = seeded(Student)
    refused(
        lambda: fit(student, tmp_path, FeatureDistillation(layers={"hiden": "net.1"})),
        ValueError,
        "`FeatureDistillation` names the student's module `hiden`, which it does not have. The nearest names are: "
        "`hidden`",
    )
    refused(
        lambda: fit(student, tmp_path, FeatureDistillation(layers={"hidden": "net.9"})),
        ValueError,
        r"names the teacher's module `net\.9`, which it does not have. The nearest names are: `net",
    )
    refused(
        lambda: fit(student, tmp_path, FeatureDistillation(layers={"*": "net"})),
        ValueError,
        r"`FeatureDistillation` pairs '\*' with 'net': both need as many `\*`",
    )


def test_features_that_cannot_be_compared_are_refused_with_all_shapes(tmp_path: Path) -> None:
    refused(
        lambda: fit(seeded(Student), tmp_path, AttentionTransfer(layers={"hidden": "net.1"})),
        CompressionError,
        r"`AttentionTransfer` cannot compare the student's `hidden` with the teacher's `net\.1`: Attention maps need "
        r"features .* The student's modules return `hidden` \(8, 5\), `head` \(8, 4\). The teacher's return `net` "
        r"\(8, 16\)",
    )
    never = FeatureDistillation(layers={"hidden": "net.1"}, adaptor="never")
    refused(lambda: fit(seeded(Student), tmp_path, never), CompressionError, r"got \(8, 5\) and \(8, 16\)")


def test_modules_that_are_not_called_as_often_are_refused(tmp_path: Path) -> None:
    callback = KnowledgeDistillation(Blocks(4), losses=[SimilarityPreserving(layers={"first": "act"})])
    refused(
        lambda: trainer(tmp_path, callback).fit(seeded(BlockStudent), loader()),
        CompressionError,
        r"pairs the student's `network\.first`, which one forward calls 1 times, with the teacher's `act`, which it "
        "calls 2 times",
    )


def test_a_module_that_returns_several_tensors_must_say_which(tmp_path: Path) -> None:
    callback = KnowledgeDistillation(Blocks(4), losses=[SimilarityPreserving(layers=["blocks.0"])])
    refused(
        lambda: trainer(tmp_path, callback).fit(seeded(BlockStudent), loader()),
        TypeError,
        r'returns a tuple and not one tensor. Its tensors are: "network\.blocks\.0\[0\]", "network\.blocks\.0\[1\]"',
    )


def test_labels_that_are_not_there_are_refused(tmp_path: Path) -> None:
    refused(
        lambda: fit(seeded(Student), tmp_path, DecoupledDistillation(), labels="classes"),
        TypeError,
        "No tensor of labels was found by `labels='classes'` in the batch, which is a dict with the keys 'x', 'scale'",
    )


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"losses": []}, ValueError, "`losses` must be a list of at least one distillation loss"),
        ({"losses": HINT}, ValueError, "`losses` must be a list of at least one distillation loss"),
        ({"losses": [F.mse_loss]}, TypeError, "`losses` must hold distillation losses, got function"),
        ({"losses": [HINT], "weight": 0.5}, ValueError, "are those of the one loss that there is without `losses`"),
        ({"labels": 0.5}, TypeError, "`labels` must be a key"),
    ],
)
def test_wrong_arguments_are_refused_at_once(arguments: Any, kind: type[Exception], message: str) -> None:
    refused(lambda: KnowledgeDistillation(Teacher(), **arguments), kind, message)


def test_a_teacher_whose_features_are_not_finite_is_refused(tmp_path: Path) -> None:
    teacher = seeded(Teacher, seed=1)
    with torch.no_grad():
        teacher.net[1].bias[0] = torch.nan
    callback = KnowledgeDistillation(teacher, losses=[HINT])
    refused(
        lambda: trainer(tmp_path, callback).fit(seeded(Student), loader()),
        ValueError,
        r"The teacher `Teacher` returned NaN or infinite values in `net\.1`",
    )


def test_losses_are_computed_in_float32_under_autocast(tmp_path: Path) -> None:
    seen: list[bool] = []

    class Spy(RelationalDistillation):
        def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
            found = super().__call__(student, teacher)
            seen.append(torch.is_autocast_enabled("cpu"))
            return found

    losses = [Spy(layers={"hidden": "net.1"}), LogitDistillation()]
    callback = KnowledgeDistillation(seeded(Teacher, seed=1), losses=losses)
    trainer(tmp_path, callback, precision="bf16-mixed", limit_train_batches=1).fit(seeded(Student), loader())
    assert seen == [False]


def test_the_learning_rate_finder_leaves_adaptors_as_they_begin(tmp_path: Path) -> None:
    class Found(Student):
        def __init__(self) -> None:
            super().__init__()
            self.learning_rate = 0.1

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=self.learning_rate)

    callback = KnowledgeDistillation(seeded(Teacher, seed=1), losses=[HINT])
    finder = LearningRateFinder(num_training_steps=8, early_stop_threshold=None)
    trainer(tmp_path, callback, finder, enable_checkpointing=True).fit(seeded(Found), loader(80))
    assert len(adaptor_weights(callback)) == 1


class Looking(Student):
    """Also calls the network in inference mode, as for pseudo-labels."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        with torch.inference_mode():
            self(batch["x"])
        return super().training_step(batch, batch_idx)


def test_calls_in_inference_mode_do_not_count(tmp_path: Path) -> None:
    looking, plain = seeded(Looking), seeded(Student)
    fit(looking, tmp_path, HINT)
    fit(plain, tmp_path, HINT)
    torch.testing.assert_close(looking.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_a_later_fit_without_adaptors_carries_none(tmp_path: Path) -> None:
    student = seeded(Student)
    fit(student, tmp_path, HINT)
    callback = KnowledgeDistillation(seeded(Teacher, seed=1))
    second = trainer(tmp_path, callback)
    second.fit(student, loader())
    second.save_checkpoint(tmp_path / "second.ckpt")
    saved = torch.load(tmp_path / "second.ckpt", weights_only=True)["lightning_compress"]["distillation"]
    assert saved == {"adaptors": {}, "own_teachers": []}
