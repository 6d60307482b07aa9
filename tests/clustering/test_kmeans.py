"""One-dimensional k-means against a slow reference and by hand, and codes with their zeros."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_compress.clustering import ClusteringState, Init, kmeans
from lightning_compress.clustering.kmeans import INITS
from lightning_compress.clustering.state import books_of, check_enough_weights, cluster_codes
from lightning_compress.errors import CompressionError


def slow_lloyd(values: list[float], centroids: list[float]) -> list[float] | None:
    """Lloyd's algorithm by every distance; a value in the middle goes to the lower centroid; None for empty ones."""
    while True:
        members: list[list[float]] = [[] for _ in centroids]
        for value in values:
            members[min(range(len(centroids)), key=lambda k: (abs(value - centroids[k]), k))].append(value)
        if not all(members):
            return None
        moved = sorted(sum(m) / len(m) for m in members)
        if max(abs(a - b) for a, b in zip(moved, centroids, strict=True)) < 1e-12:
            return moved
        centroids = moved


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-1000, 1000), min_size=9, max_size=60, unique=True), st.integers(2, 6))
def test_the_same_as_every_distance_would_give(numbers: list[int], n_clusters: int) -> None:
    values = [number / 7 for number in numbers]
    first = torch.linspace(min(values), max(values), n_clusters, dtype=torch.float64).tolist()
    found = kmeans(torch.tensor(values, dtype=torch.float64), n_clusters)
    assert len(torch.unique(found.codes)) == n_clusters
    expected = slow_lloyd(values, first)
    if expected is not None:
        torch.testing.assert_close(found.centroids, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("init", INITS)
def test_every_value_has_its_nearest_centroid_and_centroids_are_means(init: Init) -> None:
    torch.manual_seed(0)
    values = torch.randn(40, 50)
    found = kmeans(values, 16, init)
    assert found.codes.shape == values.shape
    distances = (values.double()[..., None] - found.centroids).abs()
    chosen = distances.gather(-1, found.codes[..., None])[..., 0]
    torch.testing.assert_close(chosen, distances.amin(-1))
    for number in range(16):
        torch.testing.assert_close(found.centroids[number], values.double()[found.codes == number].mean())
    again = kmeans(values, 16, init)
    assert torch.equal(found.codes, again.codes)


def test_inits_begin_elsewhere() -> None:
    values = torch.cat([torch.randn(1000, generator=torch.Generator().manual_seed(0)), torch.tensor([8.0, -8.0])])
    ends = {init: float(kmeans(values, 8, init).centroids[-1]) for init in INITS}
    assert ends["linear"] == 8.0  # the paper's reason: large weights keep a centroid
    assert ends["density"] < 8.0


def test_no_centroid_is_left_in_a_gap() -> None:
    values = torch.cat([torch.linspace(-2, -1, 50), torch.linspace(1, 2, 50)])  # as after pruning
    found = kmeans(values, 8)
    assert torch.bincount(found.codes, minlength=8).min() > 5
    assert float(found.centroids.abs().min()) > 1.0


def test_many_values_and_centroids_take_no_table_of_both() -> None:
    values = torch.randn(300_000, generator=torch.Generator().manual_seed(0))
    found = kmeans(values, 256)
    assert len(torch.unique(found.codes)) == 256
    assert float((values - found.centroids[found.codes]).abs().mean()) < 0.02


def test_fewer_values_than_centroids_are_their_own() -> None:
    found = kmeans(torch.tensor([2.0, -1.0, 2.0]), 16)
    assert found.centroids.tolist() == [-1.0, 2.0]
    assert found.codes.tolist() == [1, 0, 1]
    assert kmeans(torch.full((5,), 3.0), 4).centroids.tolist() == [3.0]


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Linear(2, 5), [0, 0, 0, 1, 1]),
        (nn.Conv2d(2, 5, 3), [0, 0, 0, 1, 1]),
        (nn.ConvTranspose2d(2, 5, 3), [0, 0, 0, 1, 1]),
    ],
)
def test_groups_are_of_output_channels(layer: nn.Module, expected: list[int]) -> None:
    books = books_of(layer, "group", 3)
    assert books.flatten().tolist() == expected
    weight: Tensor = layer.get_parameter("weight")
    codes = cluster_codes("layer", weight, books, 2, "linear")
    for book in (0, 1):
        here = codes[(books == book).expand(weight.shape)]
        assert set(here.tolist()) == {1 + 2 * book, 2 + 2 * book}


def test_zeros_have_a_code_of_their_own_and_stay() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(8, 20) * (torch.rand(8, 20) < 0.3))
    state = ClusteringState()
    state.codes = {"fc": cluster_codes("fc", weight, torch.zeros(1, 1, dtype=torch.long), 4, "linear")}
    assert torch.equal(state.codes["fc"] == 0, weight == 0)
    zeros = weight == 0
    state.apply_({"fc": weight})
    assert torch.equal(weight == 0, zeros)
    assert len(torch.unique(weight)) == 5
    before = weight.detach().clone()
    state.apply_({"fc": weight})
    assert torch.equal(weight, before)  # to the bit
    assert state.n_values() == {"fc": 4}


def test_gradients_by_hand() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 1.0, 0.0, 5.0]))
    state = ClusteringState()
    state.codes = {"fc": torch.tensor([1, 1, 0, 2])}
    for how, expected in (("mean", [2.0, 2.0, 0.0, 7.0]), ("sum", [4.0, 4.0, 0.0, 7.0])):
        weight.grad = torch.tensor([1.0, 3.0, 9.0, 7.0])
        state.unite_gradients_({"fc": weight}, how, ["other"])  # type: ignore[arg-type]
        assert weight.grad.tolist() == [1.0, 3.0, 9.0, 7.0]
        state.unite_gradients_({"fc": weight}, how, ["fc"])  # type: ignore[arg-type]
        assert weight.grad.tolist() == expected


def test_sums_are_those_of_any_device_and_equal_members_stay_to_the_bit() -> None:
    from lightning_compress.clustering.state import _Members

    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(7, (500,), generator=generator)
    codes[codes == 3] = 2  # one without members
    members, values = _Members(codes, torch.device("cpu")), torch.randn(500, generator=generator, dtype=torch.float64)
    by_segments = torch.segment_reduce(values[members.order], "sum", lengths=members.lengths)
    torch.testing.assert_close(members.sums(values), by_segments)
    one_each = torch.randn(7, generator=generator, dtype=torch.float64)[codes]
    one_each[codes == 0] = 0
    before = one_each.clone()
    members.unite_(one_each, "mean")
    assert torch.equal(one_each, before)


def test_bad_weights_are_named() -> None:
    books = torch.zeros(1, 1, dtype=torch.long)
    with pytest.raises(CompressionError, match="The weight of layer `fc` holds NaN or infinite values"):
        cluster_codes("fc", torch.tensor([[1.0, float("nan")]]), books, 2, "linear")
    message = r"Layer `fc` has 3 weights in a codebook, fewer than the 4 clusters .*`exclude=\[\"fc\"\]`"
    with pytest.raises(ValueError, match=message):
        check_enough_weights("fc", torch.zeros(2, 3), books_of(nn.Linear(3, 2), "channel", 1), 4)
