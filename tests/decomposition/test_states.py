"""Ranks and groups held over many steps, saved and loaded."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.decomposition import FactorState, SharingState
from lightning_compress.decomposition.low_rank import as_matrix
from lightning_compress.errors import CompressionError


def random(seed: int) -> Tensor:
    return torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(seed))


def best_error(weight: Tensor, rank: int) -> float:
    return float(torch.linalg.svdvals(weight.flatten(1))[rank:].square().sum().sqrt())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_weight_that_walks_far_is_always_put_back_by_nearly_the_shortest_way(seed: int) -> None:
    state, weight = FactorState(), random(seed)
    state.schemes = {"conv": "channel"}
    state.truncate_({"conv": weight}, {"conv": 3})
    began = weight.clone()
    direction = random(seed + 10)
    for step in range(60):
        weight += 0.1 * direction + 0.02 * random(100 * seed + step)
        moved = weight.clone()
        state.retract_({"conv": weight})
        assert float((weight - moved).norm()) < 1.01 * best_error(moved, 3)
        assert state.is_obeyed({"conv": weight})
    assert float((weight - began).norm()) > float(began.norm())


def test_an_average_that_lags_is_put_onto_the_rank_and_the_basis_stays_that_of_the_weight() -> None:
    state, weight = FactorState(), random(0)
    state.schemes = {"conv": "channel"}
    state.truncate_({"conv": weight}, {"conv": 3})
    average = weight + 0.1 * random(1)
    basis = state.bases["conv"].clone()
    moved = average.clone()
    state.retract_average_({"conv": average})
    assert state.is_obeyed({"conv": average})
    assert float((average - moved).norm()) < 1.01 * best_error(moved, 3)
    torch.testing.assert_close(state.bases["conv"], basis, rtol=0, atol=0)


def test_a_weight_far_away_is_settled_at_the_best_of_its_rank_and_stays_there_to_the_bit() -> None:
    state, weight = FactorState(), random(0)
    state.schemes = {"conv": "spatial"}
    state.truncate_({"conv": weight}, {"conv": 2})
    other = random(5)
    expected = float(torch.linalg.svdvals(as_matrix(other, "spatial"))[2:].square().sum().sqrt())
    settled = other.clone()
    state.settle_({"conv": settled})
    assert float((settled - other).norm()) == pytest.approx(expected, rel=1e-4)
    kept = weight.clone()
    state.settle_({"conv": kept})
    torch.testing.assert_close(kept, weight, rtol=0, atol=0)


def test_a_fall_from_rank_to_rank_ends_at_the_decomposition() -> None:
    state, weight = FactorState(), random(0)
    state.schemes = {"conv": "channel"}
    left, values, right = torch.linalg.svd(weight.flatten(1).double(), full_matrices=False)
    for rank in (6, 5, 3, 2):
        state.truncate_({"conv": weight}, {"conv": rank})
    expected = (left[:, :2] * values[:2]) @ right[:2]
    torch.testing.assert_close(weight.flatten(1), expected.float(), rtol=1e-4, atol=1e-5)


def test_states_come_back_from_what_they_save_and_copies_are_their_own() -> None:
    factors, sharing, weight = FactorState(), SharingState(), random(0)
    factors.schemes, sharing.groups = {"conv": "channel"}, {"fc": [[0, 1]]}
    factors.truncate_({"conv": weight}, {"conv": 3})
    sharing.close_({"fc": torch.rand(2, 2)}, 0.5)
    other_factors, other_sharing = FactorState(), SharingState()
    other_factors.load(factors.save())
    other_sharing.load(sharing.save())
    assert other_factors.record() == {"conv": {"scheme": "channel", "rank": 3}}
    assert (other_sharing.groups, other_sharing.closed) == ({"fc": [[0, 1]]}, 0.5)
    twin = copy.deepcopy(sharing)
    twin.clear()
    assert sharing.decided
    for state in (other_factors, other_sharing):
        state.load({})
        assert not state.decided


def test_a_state_of_other_settings_is_refused() -> None:
    saved = SharingState()
    saved.settings = {"size": 2}
    ours = SharingState()
    ours.settings = {"size": 3}
    with pytest.raises(CompressionError, match=r"^The checkpoint was written with size=2, this run has size=3\."):
        ours.load(saved.save())


def test_only_the_gradients_that_an_optimizer_holds_become_one() -> None:
    state = SharingState()
    state.groups = {"a": [[0, 1]], "b": [[0, 1]]}
    weights = {name: nn.Parameter(torch.tensor([[1.0, 2.0]])) for name in "ab"}
    state.close_(weights, 1.0)
    for weight in weights.values():
        weight.grad = torch.tensor([[0.0, 4.0]])
    state.tie_gradients_(weights, ["a"])
    found = {name: None if weight.grad is None else weight.grad.tolist() for name, weight in weights.items()}
    assert found == {"a": [[2.0, 2.0]], "b": [[0.0, 4.0]]}
