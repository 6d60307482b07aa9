"""Which weights the N:M masks keep."""

import pytest
import torch

from lightning_compress.pruning import pattern_mask, pattern_masks, pattern_sparsity


@pytest.mark.parametrize(("pattern", "sparsity"), [((2, 4), 0.5), ((1, 4), 0.75), ((4, 8), 0.5), ((3, 4), 0.25)])
def test_the_sparsity_of_a_pattern_is_its_share_of_dropped_weights(pattern: tuple[int, int], sparsity: float) -> None:
    assert pattern_sparsity(pattern) == sparsity


@pytest.mark.parametrize("pattern", [(4, 4), (0, 4), (5, 4), (-1, 4), (2.0, 4), (2,), (1, 2, 3)])
def test_what_is_no_pattern_is_refused(pattern: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="pattern") as caught:
        pattern_sparsity(pattern)
    assert str(caught.value) == (
        "`pattern` must be two ints (n, m) with 0 < n < m, such as (2, 4) to keep 2 of every 4 weights, "
        f"got {pattern!r}."
    )


def test_two_of_four_keeps_the_two_largest_of_each_group() -> None:
    weight = torch.tensor([[1.0, -4.0, 3.0, 2.0, 0.0, 0.1, -0.2, 0.3]])
    assert pattern_mask(weight, (2, 4)).int().tolist() == [[0, 1, 1, 0, 0, 0, 1, 1]]


def test_of_equal_entries_the_first_of_a_group_are_dropped() -> None:
    assert pattern_mask(torch.ones(1, 8), (1, 4)).int().tolist() == [[0, 0, 0, 1, 0, 0, 0, 1]]


@pytest.mark.parametrize("pattern", [(1, 2), (2, 4), (1, 4), (3, 8)])
@pytest.mark.parametrize("shape", [(3, 8), (3, 8, 2), (3, 8, 2, 3), (3, 8, 2, 1, 2)])
def test_every_group_along_the_inputs_keeps_exactly_n(pattern: tuple[int, int], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    mask = pattern_mask(torch.randn(shape), pattern)
    groups = mask.movedim(1, -1).reshape(-1, pattern[1])
    assert set(groups.sum(dim=1).tolist()) == {pattern[0]}


def test_the_kept_entries_of_a_convolution_are_the_largest_of_their_group() -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 8, 2, 3)
    groups = weight.movedim(1, -1).reshape(-1, 4)
    expected = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.abs().topk(2, dim=1).indices, True)
    assert torch.equal(pattern_mask(weight, (2, 4)).movedim(1, -1).reshape(-1, 4), expected)


def test_the_inputs_of_a_transposed_convolution_are_its_first_dimension() -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 3, 2, 2)
    mask = pattern_mask(weight, (2, 4), input_dim=0)
    assert torch.equal(mask, pattern_mask(weight.transpose(0, 1), (2, 4)).transpose(0, 1))
    assert mask.is_contiguous()


def test_a_dimension_that_is_no_multiple_of_m_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple") as caught:
        pattern_mask(torch.ones(2, 6), (2, 4))
    assert str(caught.value) == "Dimension 1 of the weight holds 6 entries, which is not a multiple of 4."


def test_on_the_way_the_smallest_that_the_pattern_drops_go_first() -> None:
    weight = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.5, 0.6, 0.7, 0.8]])
    # The pattern drops 2.0 and 1.0 of the first group and 0.5 and 0.6 of the second; 0.7 stays though it is small.
    kept = [pattern_masks({"a": weight}, (2, 4), n_dropped / 8)["a"].int().tolist()[0] for n_dropped in (1, 2, 3, 4)]
    assert kept == [
        [1, 1, 1, 1, 0, 1, 1, 1],
        [1, 1, 1, 1, 0, 0, 1, 1],
        [1, 1, 1, 0, 0, 0, 1, 1],
        [1, 1, 0, 0, 0, 0, 1, 1],
    ]


def test_at_its_full_sparsity_the_pattern_holds_exactly() -> None:
    torch.manual_seed(0)
    weights = {"conv": torch.randn(5, 12, 3, 3), "linear": torch.randn(7, 20), "transposed": torch.randn(4, 3, 2)}
    masks = pattern_masks(weights, (1, 4), 0.75, input_dims={"transposed": 0})
    assert torch.equal(masks["conv"], pattern_mask(weights["conv"], (1, 4)))
    assert torch.equal(masks["linear"], pattern_mask(weights["linear"], (1, 4)))
    assert torch.equal(masks["transposed"], pattern_mask(weights["transposed"], (1, 4), input_dim=0))
