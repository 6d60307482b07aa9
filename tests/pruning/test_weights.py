"""Which weights are pruned, and how their zeros are counted."""

from functools import partial

import pytest
import torch
from torch import nn

from lightning_compress.errors import CompressionError
from lightning_compress.pruning import check_pattern_fits, sparsity, sparsity_by_layer
from lightning_compress.pruning.weights import input_dims
from lightning_compress.selection import plain_weights


def test_weights_of_convolutions_and_linear_layers_are_chosen_and_nothing_else() -> None:
    net = nn.Sequential(
        nn.Conv1d(1, 2, 3), nn.BatchNorm1d(2), nn.ConvTranspose2d(1, 2, 3), nn.LayerNorm(4), nn.Linear(3, 4)
    )
    assert list(plain_weights(net)) == ["0", "2", "4"]
    assert plain_weights(net)["4"] is net[4].weight


def test_a_shared_weight_is_counted_once() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    net[2].weight = net[0].weight
    assert list(plain_weights(net)) == ["0", "1"]


def test_excluded_layers_are_left_out() -> None:
    net = nn.ModuleDict({"body": nn.Sequential(nn.Linear(2, 2)), "head": nn.Linear(2, 2)})
    assert list(plain_weights(net, exclude=["body"])) == ["head"]


@pytest.mark.parametrize(
    "wrap", [nn.utils.parametrizations.weight_norm, partial(nn.utils.parametrizations.spectral_norm, name="weight")]
)
def test_a_computed_weight_is_refused(wrap: partial[nn.Module]) -> None:
    net = nn.ModuleDict({"normed": wrap(nn.Linear(2, 2))})
    with pytest.raises(CompressionError, match="normed") as caught:
        plain_weights(net)
    assert str(caught.value) == (
        "The weight of layer `normed` is computed from other parameters (a parametrization or a weight norm) "
        'and cannot be changed in place. Remove the parametrization, or leave it out with `exclude=["normed"]`.'
    )


def test_a_lazy_layer_is_refused() -> None:
    with pytest.raises(CompressionError, match="lazy") as caught:
        plain_weights(nn.Sequential(nn.LazyLinear(2)))
    assert str(caught.value) == (
        "Layer `0` is lazy and has no weight yet. Run one batch through the model before the fit to give it its shape."
    )


def test_zeros_are_counted_over_all_layers_and_in_each() -> None:
    weights = {"a": torch.tensor([0.0, -0.0, 1.0, 2.0]), "b": torch.tensor([[3.0]])}
    assert sparsity(weights) == 2 / 5
    assert sparsity_by_layer(weights) == {"a": 0.5, "b": 0.0}
    assert sparsity({}) == 0.0


@pytest.mark.parametrize(
    ("layer", "inputs"),
    [
        (nn.Conv2d(3, 8, 3), "3 inputs"),
        (nn.Conv2d(8, 8, 3, groups=8), "1 input"),
        (nn.ConvTranspose1d(8, 8, 3, groups=4), "2 inputs"),
        (nn.Linear(6, 4), "6 inputs"),
    ],
)
def test_a_layer_that_the_pattern_does_not_fit_is_named(layer: nn.Module, inputs: str) -> None:
    net = nn.ModuleDict({"fits": nn.Linear(4, 1), "odd": layer})
    with pytest.raises(ValueError, match="odd") as caught:
        check_pattern_fits(net, ["fits", "odd"], (2, 4))
    assert str(caught.value) == (
        f"Layer `odd` has {inputs}, which is not a multiple of 4 as `pattern=(2, 4)` needs. "
        'Leave it out with `exclude=["odd"]`.'
    )


def test_only_transposed_convolutions_have_their_inputs_first() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ConvTranspose2d(4, 4, 1), nn.Linear(4, 4))
    assert input_dims(net, ["0", "1", "2"]) == {"0": 1, "1": 0, "2": 1}
