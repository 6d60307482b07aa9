"""`KnowledgeDistillation(cache=...)` in real fits: the same training with fewer questions, and what is refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Subset, default_collate

from lightning_compress import (
    FeatureDistillation,
    IndexedDataset,
    LogitDistillation,
    OutputRegression,
    TeacherCache,
    collate_indexed,
    export_onnx,
)
from lightning_compress.callbacks.distillation import KnowledgeDistillation
from lightning_compress.errors import CompressionError
from tests.callbacks.test_distillation import (
    BATCH_SIZE,
    N_FEATURES,
    KeywordStudent,
    ManualStudent,
    Samples,
    Scaled,
    Student,
    Teacher,
    loader,
    seeded,
    trainer,
)
from tests.compatibility.runs import LIGHTNING_NOISE

pytestmark = [pytest.mark.filterwarnings(message) for message in LIGHTNING_NOISE]

LOSSES = [LogitDistillation(weight=0.5), FeatureDistillation(layers={"hidden": "net.1"}, weight=0.5)]


def indexed(views: int | None = None, **settings: Any) -> DataLoader[Any]:
    return DataLoader(IndexedDataset(Samples(), views), **{"batch_size": BATCH_SIZE, "shuffle": True, **settings})


class Counting(Teacher):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        return super().forward(x)


def run(folder: Path, cache: Any, student: pl.LightningModule, data: Any = None, **settings: Any) -> int:
    """Train, and return how often the teacher was asked."""
    Counting.calls = 0
    callback = KnowledgeDistillation(seeded(Counting, seed=1), losses=settings.pop("losses", LOSSES), cache=cache)
    torch.manual_seed(3)
    trainer(folder, callback, **{"max_epochs": 3, **settings}).fit(student, indexed() if data is None else data)
    return Counting.calls


@pytest.mark.parametrize("make_student", [Student, ManualStudent])
def test_the_teacher_is_asked_once_a_sample_and_the_training_is_the_same(
    make_student: type[Student], tmp_path: Path
) -> None:
    plain, cached, again = (seeded(make_student) for _ in range(3))
    assert run(tmp_path, None, plain) == 12
    assert run(tmp_path, tmp_path / "cache", cached) == 4
    assert run(tmp_path, tmp_path / "cache", again) == 0
    # Kept in half precision; but a run that fills the cache computes with what a later run reads, to the bit.
    torch.testing.assert_close(cached.state_dict(), plain.state_dict(), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(cached.state_dict(), again.state_dict(), rtol=0, atol=0)


def test_a_fill_that_was_stopped_goes_on(tmp_path: Path) -> None:
    assert run(tmp_path, tmp_path / "cache", seeded(Student), limit_train_batches=3, max_epochs=1) == 3
    assert run(tmp_path, tmp_path / "cache", seeded(Student), indexed(shuffle=False), max_epochs=1) <= 4
    assert run(tmp_path, tmp_path / "cache", seeded(Student), max_epochs=1) == 0


def test_keywords_subsets_and_collate_functions_of_your_own(tmp_path: Path) -> None:
    def mine(samples: list[Any]) -> Any:
        return default_collate(samples)

    data = DataLoader(
        Subset(IndexedDataset(Samples()), range(5, 21)), batch_size=8, collate_fn=partial(collate_indexed, collate=mine)
    )
    callback = KnowledgeDistillation(seeded(Scaled, seed=1), cache=tmp_path / "cache")
    trainer(tmp_path, callback, max_epochs=2).fit(seeded(KeywordStudent), data)
    assert callback._kept.answers is not None
    assert callback._kept.answers.n_done == 16
    assert callback._kept.answers.n_entries == 32


def test_views_have_entries_of_their_own(tmp_path: Path) -> None:
    callback = KnowledgeDistillation(seeded(Teacher, seed=1), cache=tmp_path / "cache")
    trainer(tmp_path, callback, max_epochs=8).fit(seeded(Student), indexed(views=2))
    assert callback._kept.answers is not None
    assert callback._kept.answers.n_entries == 64
    assert 48 < callback._kept.answers.n_done <= 64


def test_a_file_teaches_and_is_kept_too(tmp_path: Path) -> None:
    export_onnx(seeded(Teacher, seed=1).eval(), torch.randn(2, N_FEATURES), tmp_path / "teacher.onnx")
    callback = KnowledgeDistillation(tmp_path / "teacher.onnx", cache=TeacherCache(tmp_path / "cache", top_k=1))
    trainer(tmp_path, callback).fit(seeded(Student), indexed())
    assert callback._kept.answers is not None
    assert callback._kept.answers.n_done == 32


def test_batches_with_numbers_reach_the_step_without_them_where_there_is_no_cache(tmp_path: Path) -> None:
    plain, numbered = seeded(Student), seeded(Student)
    assert run(tmp_path, None, plain, loader()) == run(tmp_path, None, numbered, indexed(shuffle=False)) == 12
    torch.testing.assert_close(plain.state_dict(), numbered.state_dict(), rtol=0, atol=0)


class Hooked(Student):
    """Looks at every batch in the hooks that Lightning has for it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, type]] = []

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.seen.append(("before", type(batch)))
        return batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.seen.append(("after", type(batch)))
        return batch

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(("start", type(batch)))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(("validation", type(batch)))


def test_hooks_of_the_module_see_its_own_batches(tmp_path: Path) -> None:
    student = seeded(Hooked)
    callback = KnowledgeDistillation(seeded(Counting, seed=1), cache=tmp_path / "cache")
    trainer(tmp_path, callback).fit(student, indexed(), val_dataloaders=indexed(shuffle=False))
    assert {kind for _, kind in student.seen} == {dict}
    assert {name for name, _ in student.seen} == {"before", "after", "start", "validation"}
    assert "on_before_batch_transfer" not in vars(student)


class HookedData(pl.LightningDataModule):
    def __init__(self, change: float) -> None:
        super().__init__()
        self.change = change
        self.seen: list[type] = []

    def train_dataloader(self) -> Any:
        return indexed(shuffle=False)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.seen.append(type(batch))
        return {**batch, "x": batch["x"] + self.change}


def test_hooks_of_the_data_see_their_own_batches_and_what_they_change_is_noticed(tmp_path: Path) -> None:
    data = HookedData(0.5)
    assert run(tmp_path, tmp_path / "cache", seeded(Student), data) == 4
    assert data.seen == [dict] * 12
    assert "on_before_batch_transfer" not in vars(data)
    with pytest.raises(CompressionError, match="reaches the network as something else than when the cache"):
        run(tmp_path, tmp_path / "cache", seeded(Student), HookedData(0.25))
    assert "on_before_batch_transfer" not in vars(data)


class TwoLoaders(Student):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        assert isinstance(batch["other"], dict)
        return super().training_step(batch["mine"], batch_idx)


def test_one_of_several_loaders_tells_its_numbers(tmp_path: Path) -> None:
    loaders = {"mine": indexed(), "other": loader()}
    assert run(tmp_path, tmp_path / "cache", seeded(TwoLoaders), loaders) == 4
    with pytest.raises(CompressionError, match="2 loaders of this batch draw from an `IndexedDataset`"):
        run(tmp_path, tmp_path / "cache", seeded(TwoLoaders), {"mine": indexed(), "other": indexed()})


@pytest.mark.parametrize("views", [None, 2])
def test_a_cache_that_is_filled_before_is_what_a_run_would_have_kept(views: int | None, tmp_path: Path) -> None:
    callback = KnowledgeDistillation(seeded(Counting, seed=1), losses=LOSSES, cache=tmp_path / "before")
    before = seeded(Student)
    Counting.calls = 0
    loader = indexed(views, batch_size=5)
    assert callback.fill_cache(before, loader, inputs=lambda batch: batch["x"]) == 32 * (views or 1)
    assert Counting.calls == -(-32 * (views or 1) // 5)
    assert callback.fill_cache(before, loader, inputs=lambda batch: batch["x"]) == 32 * (views or 1)
    assert Counting.calls == -(-32 * (views or 1) // 5)
    assert run(tmp_path, tmp_path / "before", before, indexed(views)) == 0
    during = seeded(Student)
    assert run(tmp_path, tmp_path / "during", during, indexed(views)) > 0
    torch.testing.assert_close(before.state_dict(), during.state_dict(), rtol=1e-3, atol=1e-3)  # other batch sizes


def test_a_cache_is_filled_with_what_keywords_say(tmp_path: Path) -> None:
    def keywords(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"x": batch["x"], "scale": batch["scale"]}

    callback = KnowledgeDistillation(seeded(Scaled, seed=1), cache=tmp_path / "cache")
    assert callback.fill_cache(seeded(KeywordStudent), indexed(), inputs=keywords) == 32
    trainer(tmp_path, callback).fit(seeded(KeywordStudent), indexed())
    with pytest.raises(ValueError, match="There is no cache to fill: give `cache` a folder"):
        KnowledgeDistillation(Teacher()).fill_cache(seeded(Student), indexed())
    with pytest.raises(CompressionError, match="which the training data do not tell"):
        callback.fill_cache(seeded(KeywordStudent), loader())


def test_a_loader_with_a_batch_sampler_is_filled_in_its_batches(tmp_path: Path) -> None:
    def collate(samples: list[Any]) -> Any:
        sizes.append(len(samples))
        return collate_indexed(samples)

    sizes: list[int] = []
    dataset = IndexedDataset(Samples())
    sampler = BatchSampler(RandomSampler(dataset), batch_size=7, drop_last=False)
    data: Any = DataLoader(dataset, batch_sampler=sampler, collate_fn=collate)
    callback = KnowledgeDistillation(seeded(Teacher, seed=1), cache=tmp_path / "cache")
    assert callback.fill_cache(seeded(Student), data, inputs=lambda batch: batch["x"]) == 32
    assert sizes == [7, 7, 7, 7, 4]
    single: Any = DataLoader(dataset, batch_size=None)
    with pytest.raises(CompressionError, match=r"The training loader gives single samples \(`batch_size=None`\)"):
        callback.fill_cache(seeded(Student), single)
    with pytest.raises(CompressionError, match=r"The training loader gives single samples \(`batch_size=None`\)"):
        run(tmp_path, tmp_path / "single", seeded(Student), single)


def test_validation_and_tests_after_the_fit_see_their_own_batches_too(tmp_path: Path) -> None:
    student = seeded(Hooked)
    end = trainer(tmp_path, KnowledgeDistillation(seeded(Counting, seed=1), cache=tmp_path / "cache"))
    end.fit(student, indexed(), val_dataloaders=indexed(shuffle=False))
    student.seen.clear()
    end.validate(student, indexed(shuffle=False), verbose=False)
    assert {kind for _, kind in student.seen} == {dict}
    assert "on_before_batch_transfer" not in vars(student)


def test_a_cache_for_half_precision_is_filled_in_half_precision(tmp_path: Path) -> None:
    callback = KnowledgeDistillation(seeded(Counting, seed=1), losses=LOSSES, cache=tmp_path / "cache")
    callback.fill_cache(seeded(Student).bfloat16(), indexed(), inputs=lambda batch: batch["x"])
    assert run(tmp_path, tmp_path / "cache", seeded(Student), precision="bf16-true") == 0
    with pytest.raises(CompressionError, match=r"precision 'torch\.bfloat16' instead of 'torch\.float32'"):
        run(tmp_path, tmp_path / "cache", seeded(Student))


def test_views_leave_the_random_numbers_of_devices_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    monkeypatch.setattr("torch.cuda.manual_seed_all", seeds.append)
    dataset = IndexedDataset(Samples(), views=2)
    _ = dataset[3]
    dataset.check_repeats()
    assert seeds == []


def test_two_processes_fill_one_cache(tmp_path: Path) -> None:
    strategy = DDPStrategy(process_group_backend="gloo", start_method="spawn")
    callback = KnowledgeDistillation(seeded(Teacher, seed=1), losses=LOSSES, cache=tmp_path / "cache")
    trainer(tmp_path, callback, strategy=strategy, devices=2).fit(seeded(Student), indexed())
    student = seeded(Student)
    callback = KnowledgeDistillation(seeded(Counting, seed=1), losses=LOSSES, cache=tmp_path / "cache")
    with pytest.raises(CompressionError, match="was made for something else: teachers"):
        trainer(tmp_path, callback).fit(student, indexed())  # another class
    callback = KnowledgeDistillation(seeded(Teacher, seed=1), losses=LOSSES, cache=tmp_path / "cache")
    trainer(tmp_path, callback).fit(student, indexed())
    assert callback._kept.answers is not None
    assert callback._kept.answers.n_done == 32


class Noisy(Student):
    """Augments in the training step."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        return super().training_step({**batch, "x": batch["x"] + torch.rand(()) * 0.1}, batch_idx)


def test_augmentation_in_the_step_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(CompressionError, match="reaches the network as something else than when the cache"):
        run(tmp_path, tmp_path / "cache", seeded(Noisy))


class RandomSamples(Samples):
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = super().__getitem__(index)
        return {**sample, "x": sample["x"] + torch.rand(())}


def test_augmentation_in_the_data_set_is_refused_before_the_first_batch(tmp_path: Path) -> None:
    data = DataLoader(IndexedDataset(RandomSamples()), batch_size=BATCH_SIZE)
    with pytest.raises(ValueError, match="differs between two reads, as by a random augmentation"):
        run(tmp_path, tmp_path / "cache", seeded(Student), data)
    assert not list((tmp_path).glob("cache/*"))


def test_data_without_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CompressionError, match=r"Wrap them: `DataLoader\(IndexedDataset\(dataset\), \.\.\.\)`"):
        run(tmp_path, tmp_path / "cache", seeded(Student), loader())


def test_another_teacher_is_refused(tmp_path: Path) -> None:
    run(tmp_path, tmp_path / "cache", seeded(Student))
    callback = KnowledgeDistillation(seeded(Counting, seed=2), losses=LOSSES, cache=tmp_path / "cache")
    with pytest.raises(CompressionError, match="was made for something else: teachers"):
        trainer(tmp_path, callback).fit(seeded(Student), indexed())


@pytest.mark.parametrize(
    ("teacher", "settings", "message"),
    [
        ("self", {}, '"self" and "ema" are another teacher in every run and step'),
        (lambda x: x, {}, "Nothing tells whether a callable gives the same answers"),
        (
            None,
            {"losses": [OutputRegression()], "cache": TeacherCache("c", top_k=2)},
            "compares all logits as they are",
        ),
    ],
)
def test_what_cannot_be_kept_is_refused_at_once(teacher: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KnowledgeDistillation(teacher or Teacher(), **{"cache": "never", **settings})
