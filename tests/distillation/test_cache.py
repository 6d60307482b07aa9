"""The cache of a teacher's answers: what is kept comes back, and what is stale, torn or another's is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_compress.distillation import Answer, CachedAnswers, IndexedDataset, TeacherCache, checksums
from lightning_compress.errors import CompressionError

INDEX, SUMS = torch.tensor([3, 0, 2]), torch.tensor([30, 10, 20])


def opened(folder: Path, top_k: int | None = None, n_entries: int = 5, **identity: Any) -> CachedAnswers:
    return CachedAnswers(folder, n_entries, {"teacher": "a", **identity}, top_k)


def answer() -> Answer:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 8, generator=generator)
    return Answer(
        logits, {"layer": [torch.randn(3, 2, 2, generator=generator), torch.randn(3, 4, generator=generator)]}
    )


def answer_rows(n: int) -> Answer:
    whole = answer()
    assert whole.output is not None
    return Answer(whole.output[:n], {name: [value[:n] for value in values] for name, values in whole.features.items()})


def test_what_was_kept_comes_back_in_any_order_and_by_another_process(tmp_path: Path) -> None:
    opened(tmp_path).put(INDEX, SUMS, answer())
    found = opened(tmp_path).get(torch.tensor([2, 3]), torch.tensor([20, 30]))
    assert found is not None
    rows = torch.tensor([2, 0])
    torch.testing.assert_close(found.output, answer().output.half().float()[rows])  # type: ignore[union-attr]
    for kept, whole in zip(found.features["layer"], answer().features["layer"], strict=True):
        torch.testing.assert_close(kept, whole.half().float()[rows])
    assert opened(tmp_path).get(torch.tensor([2, 4]), torch.tensor([20, 40])) is None
    assert opened(tmp_path).n_done == 3


def test_the_largest_logits_and_the_rest_give_the_same_probabilities(tmp_path: Path) -> None:
    cache = opened(tmp_path, top_k=3)
    cache.put(INDEX, SUMS, Answer(answer().output, {}))
    found = cache.get(INDEX, SUMS)
    assert found is not None
    assert found.output is not None
    kept, whole = found.output.softmax(1), answer().output.softmax(1)  # type: ignore[union-attr]
    torch.testing.assert_close(kept.sum(1), torch.ones(3))
    classes = whole.topk(3).indices
    torch.testing.assert_close(kept.gather(1, classes), whole.gather(1, classes), rtol=5e-3, atol=1e-4)
    assert torch.equal(kept.argmax(1), whole.argmax(1))
    assert sum(path.stat().st_size for path in tmp_path.glob("*-[0-9].bin")) == 5 * (4 * 2 + 3 * 4)


@pytest.mark.parametrize("name", ["*-done.bin", "*-inputs.bin", "*-2.bin"])
def test_a_truncated_or_missing_file_is_refused(name: str, tmp_path: Path) -> None:
    opened(tmp_path).put(INDEX, SUMS, answer())
    (path,) = tmp_path.glob(name)
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(CompressionError, match=f"is damaged: {path.name} has {len(content) - 1} bytes instead of"):
        opened(tmp_path)
    path.unlink()
    with pytest.raises(CompressionError, match=f"is damaged: {path.name} has 0 bytes instead of"):
        opened(tmp_path)


def test_two_runs_that_begin_one_cache_share_it(tmp_path: Path) -> None:
    first, second = opened(tmp_path), opened(tmp_path)  # both see that there is none yet
    first.put(INDEX, SUMS, answer())
    second.put(torch.tensor([1, 4]), torch.tensor([11, 44]), answer_rows(2))
    for cache in (first, second, opened(tmp_path)):
        assert cache.n_done == 5
        assert cache.get(torch.tensor([1, 3]), torch.tensor([11, 30])) is not None
    assert len(list(tmp_path.glob("*-done.bin"))) == 1
    assert not list(tmp_path.glob("*.part"))


def test_without_hard_links_there_is_a_cache_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise OSError("not here")

    monkeypatch.setattr("os.link", refuse)
    opened(tmp_path).put(INDEX, SUMS, answer())
    assert opened(tmp_path).n_done == 3
    assert not list(tmp_path.glob("*.part"))


def test_a_fill_that_was_interrupted_before_its_end_is_no_cache_or_goes_on(tmp_path: Path) -> None:
    opened(tmp_path).put(INDEX, SUMS, answer())
    (tmp_path / "cache.json").rename(tmp_path / "cache.json.part")
    again = opened(tmp_path)
    assert again.get(INDEX, SUMS) is None
    again.put(INDEX, SUMS, answer())
    assert json.loads((tmp_path / "cache.json").read_text())["shapes"] == {"": [8], "layer#0": [2, 2], "layer#1": [4]}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher": "b"}, "was made for something else: teacher 'a' instead of 'b'"),
        ({"n_entries": 6}, "was made for something else: entries 5 instead of 6"),
        ({"top_k": 2}, "was made for something else: top_k None instead of 2"),
        ({"views": 4}, "was made for something else: views None instead of 4"),
    ],
)
def test_the_cache_of_something_else_is_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    opened(tmp_path).put(INDEX, SUMS, answer())
    with pytest.raises(CompressionError, match=message):
        opened(tmp_path, **settings)


def test_a_description_that_is_none_is_refused(tmp_path: Path) -> None:
    for text in ("", "[]", "{}", '{"shapes": '):
        (tmp_path / "cache.json").write_text(text)
        with pytest.raises(CompressionError, match="is no description of a teacher's cache"):
            opened(tmp_path)


def test_a_sample_that_is_not_what_it_was_is_refused(tmp_path: Path) -> None:
    cache = opened(tmp_path)
    cache.put(INDEX, SUMS, answer())
    message = "Sample 0 reaches the network as something else than when the cache"
    with pytest.raises(CompressionError, match=message):
        cache.get(torch.tensor([3, 0]), torch.tensor([30, 11]))
    with pytest.raises(CompressionError, match=message):
        cache.put(torch.tensor([1, 0, 4]), torch.tensor([1, 11, 4]), answer())
    with pytest.raises(CompressionError, match="holds sample 5, and the cache has 5 entries"):
        cache.get(torch.tensor([5]), torch.tensor([1]))


def test_answers_that_are_not_one_row_a_sample_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CompressionError, match=r"output has the shape \(2, 8\), which is not one row for each of 3"):
        opened(tmp_path).put(INDEX, SUMS, Answer(torch.ones(2, 8), {}))
    with pytest.raises(CompressionError, match=r"`top_k=4` of logits of the shape \(1, 8\) saves nothing"):
        opened(tmp_path, top_k=4).put(INDEX, SUMS, Answer(torch.ones(3, 8), {}))
    cache = opened(tmp_path)
    cache.put(INDEX, SUMS, answer())
    with pytest.raises(CompressionError, match="differ in shape between batches"):
        cache.put(INDEX, SUMS, Answer(torch.ones(3, 7), {}))
    with pytest.raises(ValueError, match="`top_k` must be at least 1, got 0"):
        TeacherCache(tmp_path, top_k=0)


def test_values_that_half_precision_cannot_keep_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CompressionError, match=r"output holds values up to 1e\+05, more than half precision can keep"):
        opened(tmp_path).put(INDEX, SUMS, Answer(torch.full((3, 2), 1e5), {}))


def test_checksums_tell_signs_and_samples_may_hold_nan() -> None:
    x = torch.randn(64, 7, dtype=torch.float64)
    assert not bool((checksums([x], 64) == checksums([-x], 64)).any())
    IndexedDataset([torch.tensor([torch.nan, 1.0])]).check_repeats()


DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES)
def test_checksums_tell_order_place_and_value(dtype: torch.dtype) -> None:
    image = (torch.arange(12).reshape(3, 4) % 5).to(dtype)
    other = image.clone()
    other[2, 3] = not other[2, 3] if dtype is torch.bool else other[2, 3] + 1
    batch = torch.stack([image, image, image.flip(1), image.flip(0), other])
    first, same, *others = checksums([batch], 5).tolist()
    assert first == same
    assert first not in others
    assert len(set(others)) == len(others)
    scales = torch.tensor([1.0, 2.0, 1.0, 1.0, 1.0])
    assert checksums([batch, scales, torch.tensor(3.0)], 5)[0] != checksums([batch, scales], 5)[1]


class Flipping(Dataset[tuple[Tensor, int]]):
    """Draws from all three sources of random numbers."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        noise = torch.rand(2) + random.random() + float(np.random.rand())
        return noise + index, index


def test_views_are_the_same_whenever_they_are_drawn_and_leave_random_numbers_alone() -> None:
    dataset = IndexedDataset(Flipping(), views=3)
    assert dataset.n_entries == 18
    seen: dict[int, Tensor] = {}
    torch.manual_seed(0)
    random.seed(0)
    for _ in range(30):
        (image, label), entry = dataset[4]
        assert entry // 3 == label == 4
        assert torch.equal(seen.setdefault(entry, image), image)
    assert len(seen) == 3
    assert len({tuple(image.tolist()) for image in seen.values()}) == 3
    after = random.random()
    random.seed(0)
    assert random.random() == after
    batch = next(iter(DataLoader(dataset, batch_size=6)))
    assert (batch.index // 3).tolist() == list(range(6))


def test_random_augmentation_that_nobody_has_declared_is_refused() -> None:
    with pytest.raises(ValueError, match="Sample 0 of the training data differs between two reads"):
        IndexedDataset(Flipping()).check_repeats()
    IndexedDataset(Flipping(), views=2).check_repeats()
    IndexedDataset([torch.ones(1), {"a": [np.ones(2)]}, "c"]).check_repeats()


def test_what_is_no_data_set_is_refused() -> None:
    with pytest.raises(TypeError, match="`dataset` must have a length and items, got generator"):
        IndexedDataset(i for i in range(3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`views` must be at least 1, got 0"):
        IndexedDataset([1], views=0)


def test_inputs_whose_samples_do_not_come_first_are_refused() -> None:
    message = r"No input of the network has a row for each of the 4 samples, .* the shapes are \(7, 4, 3\)"
    with pytest.raises(CompressionError, match=message):
        checksums([torch.randn(7, 4, 3)], 4)
