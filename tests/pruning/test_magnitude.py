"""Which weights the magnitude masks keep."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_compress.pruning import Scope, magnitude_mask, magnitude_masks
from lightning_compress.pruning.magnitude import CHUNK, lamp_scores


def dropped_one_by_one(weights: dict[str, Tensor], n_dropped: int) -> dict[str, list[float]]:
    """Slow reference: sort all entries by magnitude, then by position, and drop the first of them."""
    entries = [
        (abs(value), position, name, index)
        for position, (name, weight) in enumerate(weights.items())
        for index, value in enumerate(weight.flatten().tolist())
    ]
    kept = {name: [1.0] * weight.numel() for name, weight in weights.items()}
    for _, _, name, index in sorted(entries, key=lambda entry: (entry[0], entry[1], entry[3]))[:n_dropped]:
        kept[name][index] = 0.0
    return kept


@pytest.mark.parametrize(("sparsity", "kept"), [(0.0, [1, 1, 1, 1]), (0.5, [0, 1, 0, 1]), (1.0, [0, 0, 0, 0])])
def test_the_largest_entries_are_kept(sparsity: float, kept: list[int]) -> None:
    assert magnitude_mask(torch.tensor([0.1, -2.0, 0.5, 1.0]), sparsity).int().tolist() == kept


def test_of_equal_entries_the_first_are_dropped() -> None:
    mask = magnitude_mask(torch.tensor([[1.0, -1.0, 1.0], [5.0, 1.0, -1.0]]), 3 / 6)
    assert mask.int().tolist() == [[0, 0, 0], [1, 1, 1]]


def test_a_weight_of_zeros_is_pruned_to_the_exact_count() -> None:
    assert magnitude_mask(torch.zeros(7), 3 / 7).int().tolist() == [0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("sparsity", [0.0, 0.123, 0.5, 0.8, 0.999, 1.0])
def test_a_global_mask_equals_dropping_one_by_one(sparsity: float) -> None:
    torch.manual_seed(0)
    # Rounded to tenths there are many ties, inside a layer and between layers; 77 entries in all.
    weights = {"a": torch.randn(5, 7).mul(10).round() / 10, "b": torch.randn(2, 3, 7).mul(10).round() / 10}
    masks = magnitude_masks(weights, sparsity)
    expected = dropped_one_by_one(weights, round(sparsity * 77))
    assert {name: mask.float().flatten().tolist() for name, mask in masks.items()} == expected
    assert [masks["a"].shape, masks["b"].shape] == [(5, 7), (2, 3, 7)]


@pytest.mark.parametrize("zeros", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.8, 0.9, 1.0])
def test_weights_that_are_mostly_zeros_are_dropped_one_by_one_too(sparsity: float, zeros: float) -> None:
    torch.manual_seed(0)
    weights = {"a": torch.randn(30), "b": torch.randn(50)}
    for weight in weights.values():
        weight[torch.rand_like(weight) < zeros] = 0.0
    masks = magnitude_masks(weights, sparsity)
    expected = dropped_one_by_one(weights, round(sparsity * 80))
    assert {name: mask.float().tolist() for name, mask in masks.items()} == expected


def test_one_threshold_for_all_layers_may_empty_a_small_one() -> None:
    masks = magnitude_masks({"small": torch.full((4,), 0.1), "large": torch.full((4,), 9.0)}, 0.5)
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"small": 0, "large": 4}


def test_layer_scope_is_exact_in_each_layer_where_that_is_possible() -> None:
    masks = magnitude_masks({"small": torch.full((4,), 0.1), "large": torch.full((8,), 9.0)}, 0.25, scope="layer")
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"small": 3, "large": 6}


@pytest.mark.parametrize("sparsity", [0.1, 0.37, 0.5, 0.8])
def test_layer_scope_is_exact_in_total_and_within_one_entry_in_each_layer(sparsity: float) -> None:
    torch.manual_seed(0)
    weights = {str(size): torch.randn(size) for size in (3, 5, 7, 9, 11, 13)}
    dropped = {
        size: int(size) - int(mask.sum()) for size, mask in magnitude_masks(weights, sparsity, scope="layer").items()
    }
    assert sum(dropped.values()) == round(sparsity * 48)
    assert all(abs(count - sparsity * int(size)) < 1 for size, count in dropped.items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_float_types_are_ranked_too(dtype: torch.dtype) -> None:
    assert magnitude_mask(torch.tensor([0.1, -2.0, 0.5, 1.0], dtype=dtype), 0.5).int().tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(value: float, scope: Scope) -> None:
    with pytest.raises(ValueError, match="NaN") as caught:
        magnitude_masks({"a": torch.ones(2), "b": torch.tensor([1.0, value])}, 0.5, scope)
    assert str(caught.value) == (
        "The weight of layer `b` holds NaN or infinity, so its entries cannot be ranked. "
        "The training has diverged: lower the learning rate or clip the gradients."
    )


def slow_lamp_scores(weight: torch.Tensor) -> torch.Tensor:
    scores = torch.zeros_like(weight, dtype=torch.float64)
    for index, value in enumerate(weight.tolist()):
        scores[index] = value**2 / sum(other**2 for other in weight.tolist() if abs(other) >= abs(value))
    return scores


def test_lamp_scores_are_those_of_the_definition() -> None:
    weight = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(lamp_scores(weight), slow_lamp_scores(weight))


def test_lamp_prunes_exactly_and_empties_no_layer() -> None:
    weights = {"small": 1e-3 * torch.randn(40), "large": torch.randn(8, 5), "dead": torch.zeros(4)}
    masks = magnitude_masks(weights, 0.9, "lamp")
    assert sum(int(mask.sum()) for mask in masks.values()) == 84 - round(0.9 * 84)
    assert masks["small"].any()
    assert masks["large"].any()
    assert magnitude_masks(weights, 0.9, "global")["small"].any().item() is False


def dropped_by_a_stable_sort(scores: dict[str, Tensor], n_dropped: int) -> dict[str, Tensor]:
    """Reference for many entries: the first of all in the order of magnitude, then of position."""
    flat = torch.cat([values.double().abs().flatten() for values in scores.values()])
    kept = torch.ones(flat.numel(), dtype=torch.bool)
    kept[flat.argsort(stable=True)[:n_dropped]] = False
    parts = torch.split(kept, [values.numel() for values in scores.values()])
    return {name: part.view(values.shape) for (name, values), part in zip(scores.items(), parts, strict=True)}


MANY: dict[str, Callable[[Tensor], Tensor]] = {
    "all different": lambda values: values,
    "many ties": lambda values: (10 * values).round() / 10,
    "mostly zeros": lambda values: values * (values.abs() > 1.2),
    "in order, which a sample misses": lambda values: values.sort().values,
    "bfloat16": lambda values: values.bfloat16(),
}


@pytest.mark.parametrize("scope", ["global", "lamp"])
@pytest.mark.parametrize("sparsity", [0.001, 0.5, 0.8, 0.999])
@pytest.mark.parametrize("change", MANY.values(), ids=MANY)
def test_many_entries_are_dropped_as_by_a_sort(
    change: Callable[[Tensor], Tensor], sparsity: float, scope: Scope
) -> None:
    torch.manual_seed(0)
    weights = {
        "a": change(torch.randn(90_000)).view(300, 300),
        "b": change(3 * torch.randn(2 * CHUNK)),
        "c": change(torch.randn(9)),
    }
    scores = {"global": weights, "lamp": {name: lamp_scores(weight) for name, weight in weights.items()}}[scope]
    expected = dropped_by_a_stable_sort(scores, round(sparsity * (90_009 + 2 * CHUNK)))
    masks = magnitude_masks(weights, sparsity, scope)
    assert all(torch.equal(masks[name], mask) for name, mask in expected.items())
