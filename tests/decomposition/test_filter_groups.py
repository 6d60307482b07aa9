"""Groups of filters and their means, on tables that can be checked in the head."""

from __future__ import annotations

import pytest
import torch

from lightning_compress.decomposition import filter_groups
from lightning_compress.decomposition.filter_groups import (
    Groups,
    consecutive_groups,
    draw_together_,
    similar_groups,
    spread,
    stacked,
)


@pytest.mark.parametrize(
    ("n_channels", "size", "groups"),
    [(4, 2, [[0, 1], [2, 3]]), (5, 2, [[0, 1], [2, 3], [4]]), (5, 4, [[0, 1, 2, 3], [4]])],
)
def test_neighbours_go_together(n_channels: int, size: int, groups: Groups) -> None:
    assert consecutive_groups(n_channels, size) == groups


@pytest.mark.parametrize(
    ("filters", "size", "groups"),
    [
        ([0.0, 5.0, 0.1, 5.3], 2, [[0, 2], [1, 3]]),
        ([0.0, 5.0, 0.1, 5.3, 9.0], 2, [[0, 2], [1, 3], [4]]),  # what is far from all is left over
        ([0.0, 9.0, 0.2, 8.0, 0.4, 7.0], 3, [[0, 2, 4], [1, 3, 5]]),
        ([1.0, 1.0, 1.0, 1.0], 2, [[0, 1], [2, 3]]),  # ties go by position
        ([0.0, 1.0, 2.0], 3, [[0, 1, 2]]),
    ],
)
def test_similar_filters_go_together(filters: list[float], size: int, groups: Groups) -> None:
    assert similar_groups(torch.tensor(filters)[:, None], size) == groups


def test_wide_layers_are_compared_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filter_groups, "MOST_COMPARED", 5)
    filters = torch.tensor([0.0, 5.0, 0.1, 5.3, 9.0, 1.0, 2.0, 1.1, 2.1, 9.0])[:, None]
    assert similar_groups(filters, 2) == [[0, 2], [1, 3], [5, 7], [6, 8], [4, 9]]


def test_the_filters_of_a_group_are_their_mean() -> None:
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]])
    draw_together_(weight, 0, stacked([[0, 1], [2]]))
    assert weight.tolist() == [[2.0, 3.0], [2.0, 3.0], [9.0, 9.0]]


def test_input_channels_are_drawn_half_of_the_way() -> None:
    weight = torch.tensor([[0.0, 4.0], [1.0, 1.0]])
    draw_together_(weight, 1, stacked([[0, 1]]), pull=0.5)
    assert weight.tolist() == [[1.0, 3.0], [1.0, 1.0]]
    assert spread(weight, 1, stacked([[0, 1]])) == pytest.approx(0.5**0.5)  # 1, 1, 0, 0


def test_tied_filters_stay_as_they_are_to_the_bit() -> None:
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).repeat(1, 3)  # 3 equal thirds round
    groups = stacked([[n, n + 5, n + 10] for n in range(5)])
    tied = weight.clone()
    draw_together_(tied, 1, groups)
    torch.testing.assert_close(tied, weight, rtol=0, atol=0)
