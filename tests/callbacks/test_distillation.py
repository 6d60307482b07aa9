import copy
import functools
import os
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ModelSummary, WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.tuner.tuning import Tuner
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_compress.callbacks.distillation import KnowledgeDistillation
from lightning_compress.distillation import hinton_loss
from lightning_compress.errors import CompressionError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    # Lightning's own tree code under the newest torch.
    pytest.mark.filterwarnings(r"ignore:.*`isinstance\(treespec, LeafSpec\)` is deprecated.*"),
]

N_FEATURES, N_CLASSES, BATCH_SIZE = 6, 4, 8


class Samples(Dataset[dict[str, Tensor]]):
    """Samples with an input, a second input and a label, always the same."""

    def __init__(self, n_samples: int = 4 * BATCH_SIZE) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(n_samples, N_FEATURES, generator=generator)
        self.scale = torch.rand(n_samples, 1, generator=generator) + 0.5
        self.label = torch.randint(N_CLASSES, (n_samples,), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "scale": self.scale[index], "label": self.label[index]}


def loader(n_samples: int = 4 * BATCH_SIZE, shuffle: bool = False) -> DataLoader[dict[str, Tensor]]:
    return DataLoader(Samples(n_samples), batch_size=BATCH_SIZE, shuffle=shuffle)


class Student(pl.LightningModule):
    """Layers on self, called by `self(x)`."""

    takes_scale: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(N_FEATURES, 5)
        self.head = nn.Linear(5, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.hidden(x).tanh())
        return logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        return F.cross_entropy(self(batch["x"]), batch["label"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Scaled(nn.Module):
    """Keyword inputs and a dict output."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.hidden = nn.Linear(N_FEATURES, width)
        self.head = nn.Linear(width, N_CLASSES)

    def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Tensor]:
        hidden = self.hidden(x * scale).tanh()
        return {"features": hidden, "logits": self.head(hidden)}


class KeywordStudent(Student):
    """No forward, a network with keyword inputs, and a step without `batch_idx`."""

    takes_scale = True

    def __init__(self) -> None:
        pl.LightningModule.__init__(self)
        self.net = Scaled()

    def training_step(self, batch: dict[str, Tensor]) -> Any:  # type: ignore[override]
        logits = self.net(batch["x"], scale=batch["scale"])["logits"]
        return {"loss": F.cross_entropy(logits, batch["label"]), "n_samples": len(logits)}


class TwoNetworksStudent(Student):
    """Two networks, a forward that returns a tuple."""

    def __init__(self) -> None:
        pl.LightningModule.__init__(self)
        self.encoder = nn.Sequential(nn.Linear(N_FEATURES, 5), nn.Tanh())
        self.decoder = nn.Linear(5, N_CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        hidden = self.encoder(x)
        return hidden, self.decoder(hidden)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        return F.cross_entropy(self(batch["x"])[1], batch["label"])


class ManualStudent(Student):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch["x"]), batch["label"]))
        optimizer.step()


class Teacher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(N_FEATURES, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(16, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.net(x)) * 3.0
        return logits


class TeacherModule(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.teacher = Teacher()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.teacher(x)
        return logits


class TupleTeacher(Teacher):
    def forward(self, x: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        return None, super().forward(x)


def seeded(make: Callable[[], Any], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return make()


def trainer(path: Path, *callbacks: Callback, **options: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "default_root_dir": path,
        "log_every_n_steps": 1,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**defaults, **options})


def slow_term(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    p, q = ((logits / temperature).softmax(dim=1) for logits in (teacher_logits, student_logits))
    return temperature**2 * (p * (p / q).log()).sum() / len(p)


STUDENTS = [
    (Student, Teacher, None),
    (KeywordStudent, Scaled, None),
    (TwoNetworksStudent, TupleTeacher, 1),
    (ManualStudent, Teacher, None),
]


def slow_reference(student: Student, teacher: nn.Module, output: int | None, accumulate: int) -> Student:
    """Train a copy with plain PyTorch: one epoch of SGD with learning rate 1, T = 2 and weight 0.5."""
    student, teacher = copy.deepcopy(student), copy.deepcopy(teacher).eval()
    network: nn.Module = student.net if isinstance(student, KeywordStudent) else student
    for i, batch in enumerate(loader()):
        kwargs = {"scale": batch["scale"]} if student.takes_scale else {}
        with torch.no_grad():
            teachers = teacher(batch["x"], **kwargs)
        students = network(batch["x"], **kwargs)
        key = "logits" if student.takes_scale else output
        students, teachers = (students, teachers) if key is None else (students[key], teachers[key])
        loss = F.cross_entropy(students, batch["label"]) + 0.5 * slow_term(students, teachers, temperature=2.0)
        torch.autograd.backward(loss / accumulate)
        if (i + 1) % accumulate == 0:
            with torch.no_grad():
                for parameter in student.parameters():
                    assert parameter.grad is not None
                    parameter.sub_(parameter.grad)
                    parameter.grad = None
    return student


@pytest.mark.parametrize(("make_student", "make_teacher", "output"), STUDENTS)
def test_training_equals_the_slow_reference(
    make_student: type[Student], make_teacher: type[nn.Module], output: int | None, tmp_path: Path
) -> None:
    student, teacher = seeded(make_student), seeded(make_teacher, seed=1)
    expected = slow_reference(student, teacher, output, accumulate=1)
    callback = KnowledgeDistillation(teacher, temperature=2.0, weight=0.5, output=output)
    trainer(tmp_path, callback).fit(student, loader())
    torch.testing.assert_close(student.state_dict(), expected.state_dict())


@pytest.mark.parametrize(("make_student", "make_teacher", "output"), STUDENTS[:3])
def test_accumulated_gradients_equal_the_slow_reference(
    make_student: type[Student], make_teacher: type[nn.Module], output: int | None, tmp_path: Path
) -> None:
    student, teacher = seeded(make_student), seeded(make_teacher, seed=1)
    expected = slow_reference(student, teacher, output, accumulate=2)
    callback = KnowledgeDistillation(teacher, temperature=2.0, weight=0.5, output=output)
    trainer(tmp_path, callback, accumulate_grad_batches=2).fit(student, loader())
    torch.testing.assert_close(student.state_dict(), expected.state_dict())


def test_weight_zero_leaves_the_training_as_it_was(tmp_path: Path) -> None:
    plain, distilled = seeded(Student), seeded(Student)
    trainer(tmp_path).fit(plain, loader())
    trainer(tmp_path, KnowledgeDistillation(seeded(Teacher), weight=0.0)).fit(distilled, loader())
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), distilled.parameters(), strict=True))


def test_the_student_comes_nearer_to_the_teacher(tmp_path: Path) -> None:
    student, teacher, x = seeded(Student), seeded(Teacher, seed=1), Samples(16 * BATCH_SIZE).x
    frozen = copy.deepcopy(teacher).eval()
    before = hinton_loss(student(x), frozen(x), temperature=1.0).item()
    trainer(tmp_path, KnowledgeDistillation(teacher, weight=20.0), max_epochs=4, gradient_clip_val=0.2).fit(
        student, loader(16 * BATCH_SIZE)
    )
    assert hinton_loss(student(x), frozen(x), temperature=1.0).item() < 0.5 * before


@pytest.mark.parametrize("make_teacher", [Teacher, TeacherModule])
def test_the_teacher_does_not_learn_and_is_given_back_as_it_came(make_teacher: type[nn.Module], tmp_path: Path) -> None:
    teacher = seeded(make_teacher)
    before = copy.deepcopy(teacher.state_dict())
    trainer(tmp_path, KnowledgeDistillation(teacher)).fit(seeded(Student), loader())
    torch.testing.assert_close(teacher.state_dict(), before, rtol=0.0, atol=0.0)  # batch-norm statistics too
    assert all(module.training for module in teacher.modules())
    assert all(parameter.requires_grad for parameter in teacher.parameters())


class Inspect(Callback):
    """Looks at everything that holds parameters, in the middle of a fit."""

    def __init__(self) -> None:
        self.keys: set[str] = set()
        self.parameters: set[int] = set()
        self.optimized: set[int] = set()
        self.modules: set[int] = set()
        self.n_summed_up = 0
        self.pickled = b""
        self.copied_step: Any = None
        self.copy: Any = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.keys = set(pl_module.state_dict())
        self.parameters = {id(parameter) for parameter in pl_module.parameters()}
        self.modules = {id(module) for module in pl_module.modules()}
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self.optimized = {id(parameter) for group in groups for parameter in group["params"]}
        self.n_summed_up = ModelSummary(max_depth=-1)._summary(trainer, pl_module).total_parameters
        self.pickled = pickle.dumps(pl_module)
        self.copy = copy.deepcopy(pl_module)


def test_the_teacher_is_in_no_module_tree(tmp_path: Path) -> None:
    student, teacher, inspect = seeded(Student), seeded(Teacher), Inspect()
    keys, n_parameters = set(student.state_dict()), sum(p.numel() for p in student.parameters())
    trainer(tmp_path, KnowledgeDistillation(teacher), inspect).fit(student, loader())
    teachers = {id(parameter) for parameter in teacher.parameters()}
    assert inspect.keys == keys
    assert inspect.parameters.isdisjoint(teachers)
    assert inspect.optimized.isdisjoint(teachers)
    assert inspect.modules.isdisjoint({id(module) for module in teacher.modules()})
    assert inspect.n_summed_up == n_parameters


def test_the_checkpoint_file_is_the_users(tmp_path: Path) -> None:
    student, teacher = seeded(Student), seeded(Teacher)
    fit = trainer(tmp_path, KnowledgeDistillation(teacher), ModelCheckpoint(tmp_path))
    fit.fit(student, loader())
    path = tmp_path / "end.ckpt"
    fit.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    assert set(checkpoint["state_dict"]) == set(student.state_dict())
    assert not [name for name in checkpoint["callbacks"] if "Distillation" in name]
    torch.testing.assert_close(Student.load_from_checkpoint(path).state_dict(), student.state_dict())


def test_a_copy_and_a_pickle_made_during_the_fit_are_plain_students(tmp_path: Path) -> None:
    inspect, teacher = Inspect(), seeded(Teacher)
    teacher.ballast = nn.Linear(1000, 1000)
    trainer(tmp_path, KnowledgeDistillation(teacher), inspect).fit(seeded(Student), loader())
    assert len(inspect.pickled) < 100_000  # the ballast alone has 4,000,000 bytes
    batch = next(iter(loader()))
    for student in (inspect.copy, pickle.loads(inspect.pickled)):
        assert student.training_step.__self__ is student
        torch.testing.assert_close(
            student.training_step(batch, 0), F.cross_entropy(student(batch["x"]), batch["label"])
        )


def test_averaged_weights_do_not_hold_the_teacher(tmp_path: Path) -> None:
    averaging = WeightAveraging()
    teacher = seeded(Teacher)
    trainer(tmp_path, KnowledgeDistillation(teacher), averaging).fit(seeded(Student), loader())
    assert averaging._average_model is not None
    averaged = {id(parameter) for parameter in averaging._average_model.parameters()}
    assert len(averaged) == 4
    assert averaged.isdisjoint({id(parameter) for parameter in teacher.parameters()})


@pytest.fixture
def one_process_group() -> Iterator[None]:
    """Take away what a fit under DDP leaves in this process."""
    environment = dict(os.environ)
    yield
    torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(environment)


@pytest.mark.usefixtures("one_process_group")
def test_under_ddp_the_step_sent_through_forward_is_distilled(tmp_path: Path) -> None:
    student, teacher = seeded(Student), seeded(Teacher, seed=1)
    expected = slow_reference(student, teacher, None, accumulate=1)
    callback = KnowledgeDistillation(teacher, temperature=2.0, weight=0.5)
    strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=False)
    trainer(tmp_path, callback, strategy=strategy, devices=1, use_distributed_sampler=False).fit(student, loader())
    torch.testing.assert_close(student.state_dict(), expected.state_dict())


class Dropping(Student):
    """Draws random numbers, so that a teacher that draws any would change the run."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        return F.cross_entropy(self(F.dropout(batch["x"], 0.2)), batch["label"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class RandomState(Callback):
    """Keeps torch's random state in the checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        return {"random_state": torch.get_rng_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        torch.set_rng_state(state_dict["random_state"])


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    def run(max_epochs: int, ckpt_path: Path | None = None) -> tuple[pl.Trainer, Student]:
        student = seeded(Dropping)
        distillation = KnowledgeDistillation(seeded(Teacher, seed=1))
        torch.manual_seed(2)
        fit = trainer(tmp_path, distillation, RandomState(), max_epochs=max_epochs)
        fit.fit(student, loader(), ckpt_path=ckpt_path)
        return fit, student

    _, whole = run(max_epochs=4)
    first, _ = run(max_epochs=2)
    first.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed = run(max_epochs=4, ckpt_path=tmp_path / "half.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def assert_bare(student: pl.LightningModule) -> None:
    assert "training_step" not in student.__dict__
    assert "manual_backward" not in student.__dict__
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in student.modules())


@pytest.mark.parametrize("make_student", [Student, ManualStudent])
def test_no_wrapper_and_no_hook_is_left_after_the_fit(make_student: type[Student], tmp_path: Path) -> None:
    student = seeded(make_student)
    callback = KnowledgeDistillation(seeded(Teacher))
    trainer(tmp_path, callback).fit(student, loader())
    assert_bare(student)
    trainer(tmp_path, callback).fit(student, loader())  # and the callback serves again
    assert_bare(student)


class Fails(Callback):
    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("stop here")


def test_no_wrapper_and_no_hook_is_left_after_an_exception(tmp_path: Path) -> None:
    student, teacher = seeded(Student), seeded(Teacher)
    with pytest.raises(RuntimeError, match=r"^stop here$"):
        trainer(tmp_path, KnowledgeDistillation(teacher), Fails()).fit(student, loader())
    assert_bare(student)
    assert teacher.training
    assert all(parameter.requires_grad for parameter in teacher.parameters())


def test_setup_twice_adds_the_term_once(tmp_path: Path) -> None:
    class SetupAgain(Callback):
        def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
            callback.setup(trainer, pl_module, stage)

    student, teacher = seeded(Student), seeded(Teacher, seed=1)
    expected = slow_reference(student, teacher, None, accumulate=1)
    callback = KnowledgeDistillation(teacher, temperature=2.0, weight=0.5)
    trainer(tmp_path, callback, SetupAgain()).fit(student, loader())
    torch.testing.assert_close(student.state_dict(), expected.state_dict())
    assert_bare(student)


def test_two_teachers_add_two_terms(tmp_path: Path) -> None:
    student, teacher = seeded(Student), seeded(Teacher, seed=1)
    expected = slow_reference(student, teacher, None, accumulate=1)
    halves = [KnowledgeDistillation(copy.deepcopy(teacher), temperature=2.0, weight=0.25) for _ in range(2)]
    trainer(tmp_path, *halves).fit(student, loader())
    torch.testing.assert_close(student.state_dict(), expected.state_dict())
    assert_bare(student)


def logs_its_name(step: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(step)
    def wrapper(self: pl.LightningModule, *args: Any, **kwargs: Any) -> Any:
        return step(self, *args, **kwargs)

    return wrapper


class DecoratedStudent(KeywordStudent):
    training_step = logs_its_name(KeywordStudent.training_step)


def test_a_decorated_step_without_batch_idx_is_called_without_it(tmp_path: Path) -> None:
    student, teacher = seeded(DecoratedStudent), seeded(Scaled, seed=1)
    expected = slow_reference(student, teacher, None, accumulate=1)
    trainer(tmp_path, KnowledgeDistillation(teacher, temperature=2.0, weight=0.5)).fit(student, loader())
    torch.testing.assert_close(student.state_dict(), expected.state_dict())


def test_a_compiled_module_is_distilled_and_stays_compiled(tmp_path: Path) -> None:
    student, teacher = seeded(Student), seeded(Teacher, seed=1)
    expected = slow_reference(student, teacher, None, accumulate=1)
    compiled: Any = torch.compile(student, backend="eager")
    callback = KnowledgeDistillation(teacher, temperature=2.0, weight=0.5)
    trainer(tmp_path, callback).fit(compiled, loader())
    torch.testing.assert_close(student.state_dict(), expected.state_dict())
    compiler = student._compiler_ctx
    assert compiler is not None
    assert student.__dict__["training_step"].__wrapped__ == compiler["original_training_step"]


def test_a_step_set_on_the_instance_is_distilled_and_stays(tmp_path: Path) -> None:
    student, teacher = seeded(Student), seeded(Teacher, seed=1)
    expected = slow_reference(student, teacher, None, accumulate=1)

    def own_step(batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(student(batch["x"]), batch["label"])

    student.training_step = own_step
    trainer(tmp_path, KnowledgeDistillation(teacher, temperature=2.0, weight=0.5)).fit(student, loader())
    torch.testing.assert_close(student.state_dict(), expected.state_dict())
    assert student.__dict__["training_step"] is own_step


def test_a_wrapper_that_others_put_around_ours_stays_and_works(tmp_path: Path) -> None:
    class Around(Callback):
        def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
            inner = pl_module.training_step

            def around(batch: Any, batch_idx: int) -> Any:
                return inner(batch, batch_idx)

            pl_module.training_step = around  # type: ignore[method-assign]

    student, teacher = seeded(Student), seeded(Teacher)
    trainer(tmp_path, KnowledgeDistillation(teacher), Around()).fit(student, loader())
    batch = next(iter(loader()))
    torch.testing.assert_close(student.training_step(batch, 0), F.cross_entropy(student(batch["x"]), batch["label"]))


class LazyStudent(Student):
    """Layers are born in `configure_model`."""

    def __init__(self) -> None:
        pl.LightningModule.__init__(self)

    def configure_model(self) -> None:
        torch.manual_seed(0)
        self.hidden = nn.Linear(N_FEATURES, 5)
        self.head = nn.Linear(5, N_CLASSES)


def test_layers_born_in_configure_model_are_distilled(tmp_path: Path) -> None:
    student, teacher = LazyStudent(), seeded(Teacher, seed=1)
    expected = slow_reference(seeded(Student), teacher, None, accumulate=1)
    trainer(tmp_path, KnowledgeDistillation(teacher, temperature=2.0, weight=0.5)).fit(student, loader())
    torch.testing.assert_close(student.state_dict(), expected.state_dict())


class SkippingStudent(Student):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        self(batch["x"])


def test_a_skipped_batch_stays_skipped(tmp_path: Path) -> None:
    student = seeded(SkippingStudent)
    before = copy.deepcopy(student.state_dict())
    fit = trainer(tmp_path, KnowledgeDistillation(seeded(Teacher)))
    with pytest.warns(UserWarning, match="`training_step` returned `None`"):
        fit.fit(student, loader())
    torch.testing.assert_close(student.state_dict(), before, rtol=0.0, atol=0.0)


class TwoCallStudent(Student):
    """Trains on two views of the batch, and looks at a third without gradient."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        with torch.no_grad():
            self(9.0 * batch["x"])
        losses = [F.cross_entropy(self(view), batch["label"]) for view in (batch["x"], -batch["x"])]
        return torch.stack(losses).mean()


def test_two_calls_in_a_step_count_with_their_mean(tmp_path: Path) -> None:
    student, teacher, batch = seeded(TwoCallStudent), seeded(Teacher, seed=1), next(iter(loader()))
    reference, frozen = copy.deepcopy(student), copy.deepcopy(teacher).eval()
    losses = [
        F.cross_entropy(reference(x), batch["label"]) + 0.5 * slow_term(reference(x), frozen(x).detach(), 2.0)
        for x in (batch["x"], -batch["x"])
    ]
    gradients = torch.autograd.grad((losses[0] + losses[1]) / 2, list(reference.parameters()))
    expected = [parameter - gradient for parameter, gradient in zip(reference.parameters(), gradients, strict=True)]
    callback = KnowledgeDistillation(teacher, temperature=2.0, weight=0.5)
    trainer(tmp_path, callback, max_steps=1).fit(student, loader())
    torch.testing.assert_close(list(student.parameters()), expected, check_stride=False)


def test_the_learning_rate_finder_searches_with_the_term(tmp_path: Path) -> None:
    class Tuned(Student):
        def __init__(self) -> None:
            super().__init__()
            self.lr = 0.1

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    def searched_losses(weight: float) -> list[float]:
        fit = trainer(tmp_path, KnowledgeDistillation(seeded(Teacher), weight=weight), enable_checkpointing=True)
        student = seeded(Tuned)
        finder = Tuner(fit).lr_find(student, loader(), num_training=4, min_lr=1e-4, max_lr=1e-2)
        assert finder is not None
        assert_bare(student)
        return list(finder.results["loss"])

    assert all(a > b for a, b in zip(searched_losses(weight=5.0), searched_losses(weight=0.0), strict=True))


class TwoBackwardsStudent(ManualStudent):
    """A backward before the first forward, and a second one after it."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(0.0 * self.hidden.weight.sum())
        loss = F.cross_entropy(self(batch["x"]), batch["label"]) / 2
        self.manual_backward(loss, retain_graph=True)
        self.manual_backward(loss)
        optimizer.step()


def test_under_manual_optimization_every_forward_counts_once(tmp_path: Path) -> None:
    student, teacher = seeded(TwoBackwardsStudent), seeded(Teacher, seed=1)
    expected = slow_reference(student, teacher, None, accumulate=1)
    trainer(tmp_path, KnowledgeDistillation(teacher, temperature=2.0, weight=0.5)).fit(student, loader())
    torch.testing.assert_close(student.state_dict(), expected.state_dict())


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_every_precision_trains(precision: Any, tmp_path: Path) -> None:
    class Precise(Student):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
            return F.cross_entropy(self(batch["x"]), batch["label"])

    student, teacher = seeded(Precise), seeded(Teacher, seed=1)
    before, exact = copy.deepcopy(student.state_dict()), copy.deepcopy(teacher.state_dict())
    trainer(tmp_path, KnowledgeDistillation(teacher), precision=precision).fit(student, loader())
    assert all(torch.isfinite(value).all() for value in student.state_dict().values())
    assert not any(torch.equal(before[name], value.float()) for name, value in student.state_dict().items())
    torch.testing.assert_close(teacher.state_dict(), exact, rtol=0.0, atol=0.0)


def test_the_term_that_was_added_is_logged(tmp_path: Path) -> None:
    student, teacher, batch = seeded(Student), seeded(Teacher, seed=1), next(iter(loader()))
    expected = 0.5 * slow_term(student(batch["x"]), copy.deepcopy(teacher).eval()(batch["x"]), temperature=2.0)
    logger = CSVLogger(tmp_path, name="run", version=0)
    callback = KnowledgeDistillation(teacher, temperature=2.0, weight=0.5)
    trainer(tmp_path, callback, logger=logger, max_steps=1).fit(student, loader())
    names, values = (tmp_path / "run" / "version_0" / "metrics.csv").read_text().splitlines()
    logged = dict(zip(names.split(","), values.split(","), strict=True))
    assert float(logged["compress/distillation_loss"]) == pytest.approx(expected.item(), rel=1e-5)


def test_other_entries_of_the_step_are_kept(tmp_path: Path) -> None:
    class Entries(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.append(outputs["n_samples"])

    seen: list[int] = []
    trainer(tmp_path, KnowledgeDistillation(seeded(Scaled)), Entries()).fit(seeded(KeywordStudent), loader())
    assert seen == [BATCH_SIZE] * 4


def refuses(student: pl.LightningModule, callback: KnowledgeDistillation, error: type[Exception], path: Path) -> str:
    with pytest.raises(error) as caught:
        trainer(path, callback).fit(student, loader())
    assert_bare(student)
    return str(caught.value)


@pytest.mark.parametrize(
    ("returned", "came"),
    [
        ({"accuracy": 1.0}, "a dict with the keys 'accuracy'"),
        ({}, "a dict with the keys none"),
        ({"loss": None}, "a NoneType under the key 'loss'"),
        (0.5, "a float"),
    ],
)
def test_a_step_without_a_loss_is_refused(returned: Any, came: str, tmp_path: Path) -> None:
    class Lossless(Student):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
            self(batch["x"])
            return returned

    assert refuses(seeded(Lossless), KnowledgeDistillation(Teacher()), CompressionError, tmp_path) == (
        f"`training_step` returned {came}, but knowledge distillation adds to a loss: "
        f"return a tensor, a dict with a tensor under the key 'loss', or None to skip the batch."
    )


def test_a_network_that_is_never_called_is_refused(tmp_path: Path) -> None:
    class Parts(Student):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
            return F.cross_entropy(self.forward(batch["x"]), batch["label"])

    assert refuses(seeded(Parts), KnowledgeDistillation(Teacher()), CompressionError, tmp_path) == (
        "The step called `hidden`, `head` of `Parts`, not exactly one of which is the whole network: "
        'call `self(...)`, or name the network with `module="hidden"`.'
    )


def test_a_manual_step_whose_network_is_never_called_is_refused(tmp_path: Path) -> None:
    class ManualParts(ManualStudent):
        def __call__(self, x: Tensor) -> Any:
            return self.forward(x)

    assert refuses(seeded(ManualParts), KnowledgeDistillation(Teacher()), CompressionError, tmp_path) == (
        "The step called `hidden`, `head` of `ManualParts`, not exactly one of which is the whole network: "
        'call `self(...)`, or name the network with `module="hidden"`.'
    )


def test_a_manual_step_without_manual_backward_is_refused(tmp_path: Path) -> None:
    class RawBackward(ManualStudent):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
            optimizer: Any = self.optimizers()
            torch.autograd.backward(F.cross_entropy(self(batch["x"]), batch["label"]))
            optimizer.step()

    assert refuses(seeded(RawBackward), KnowledgeDistillation(Teacher()), CompressionError, tmp_path) == (
        "`training_step` of `RawBackward` took an optimizer step without `self.manual_backward(loss)`, where the "
        "distillation term is added: call it instead of `loss.backward()`."
    )


def test_a_network_called_only_without_gradient_is_refused(tmp_path: Path) -> None:
    class NoGradient(Student):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
            with torch.no_grad():
                self(batch["x"])
            return self.head.weight.sum()

    assert refuses(seeded(NoGradient), KnowledgeDistillation(Teacher()), CompressionError, tmp_path) == (
        "No output of the network's forward in `training_step` of `NoGradient` needs a gradient, so there is nothing "
        "to distil into: call the network outside of `torch.no_grad()`."
    )


def test_a_wrong_module_name_is_refused_before_training(tmp_path: Path) -> None:
    callback = KnowledgeDistillation(Teacher(), module="haed")
    assert refuses(seeded(Student), callback, ValueError, tmp_path) == (
        "`module='haed'` is not a submodule of `Student`, whose nearest names are `head`."
    )


def test_logits_of_different_shapes_are_refused(tmp_path: Path) -> None:
    teacher = nn.Linear(N_FEATURES, N_CLASSES + 1)
    assert refuses(seeded(Student), KnowledgeDistillation(teacher), ValueError, tmp_path) == (
        "The student's and the teacher's logits must have the same shape, got (8, 4) and (8, 5): "
        "give both networks the same classes, or select other outputs."
    )


def test_a_teacher_that_is_part_of_the_student_is_refused(tmp_path: Path) -> None:
    student = seeded(Student)
    student.teacher = Teacher()
    assert refuses(student, KnowledgeDistillation(student.teacher), ValueError, tmp_path) == (
        "The teacher's parameter `net.0.weight` is also the student's `teacher.net.0.weight`: "
        "give `copy.deepcopy(teacher)`, and do not hold the teacher in the LightningModule."
    )


def test_a_teacher_that_returns_nan_is_refused(tmp_path: Path) -> None:
    teacher = nn.Linear(N_FEATURES, N_CLASSES)
    nn.init.constant_(teacher.bias, float("nan"))
    assert refuses(seeded(Student), KnowledgeDistillation(teacher), ValueError, tmp_path) == (
        "The teacher `Linear` returned NaN or infinite values: "
        "check its weights, and that its inputs are normalised as the student's are."
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"teacher": 18},
            TypeError,
            '`teacher` must be an nn.Module, a callable, the path of an ONNX file, "self" or "ema", got int.',
        ),
        ({"temperature": 0.0}, ValueError, "`temperature` must be a positive finite number, got 0.0."),
        ({"weight": -1.0}, ValueError, "`weight` must be a finite number of at least 0, got -1.0."),
        (
            {"output": 1.5},
            TypeError,
            "`output` must be a key (str), a position (int), a callable or None, got float.",
        ),
    ],
)
def test_wrong_arguments_are_refused_at_once(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"teacher": Teacher(), **arguments}
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        KnowledgeDistillation(**arguments)
