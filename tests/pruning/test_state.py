"""How masks are applied, and how they are carried in a checkpoint."""

import copy
import io
import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.pruning import PruningState, apply_masks_, clear_optimizer_state_, magnitude_masks
from lightning_compress.pruning.state import pack_mask, unpack_mask


def test_dropped_weights_become_plain_positive_zeros_in_a_plain_leaf() -> None:
    weight = nn.Parameter(torch.tensor([-1.0, -2.0, 3.0]))
    apply_masks_({"a": weight}, {"a": torch.tensor([False, True, True])})
    assert weight.tolist() == [0.0, -2.0, 3.0]
    assert math.copysign(1.0, weight[0].item()) == 1.0
    assert weight.is_leaf
    assert weight.requires_grad
    assert weight.grad_fn is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_whatever_is_dropped_becomes_zero_in_any_format_and_layout(dtype: torch.dtype) -> None:
    values = [-0.0, -2.0, math.inf, -math.inf, math.nan, 3.0, -4.0, 5.0]
    weight = nn.Parameter(torch.tensor(values, dtype=dtype).view(2, 2, 2, 1).to(memory_format=torch.channels_last))
    mask = torch.tensor([False] * 5 + [True, False, True]).view(2, 2, 2, 1)
    expected = torch.tensor([0.0] * 5 + [3.0, 0.0, 5.0], dtype=dtype)
    state = PruningState()
    state.masks = {"a": mask}
    for _ in range(2):
        apply_masks_({"a": weight}, {"a": mask})
        assert torch.equal(weight.detach().flatten(), expected)
        assert not weight.signbit().any()
        with torch.no_grad():
            weight.sub_((~mask).to(dtype))  # as an optimizer does
        state.apply_({"a": weight})
        assert torch.equal(weight.detach().flatten(), expected)
        assert not weight.signbit().any()


def test_a_new_mask_and_another_format_are_followed() -> None:
    state, weight = PruningState(), nn.Parameter(torch.ones(2))
    state.masks = {"a": torch.tensor([True, False])}
    state.apply_({"a": weight})
    assert weight.tolist() == [1.0, 0.0]
    state.masks["a"] = torch.tensor([False, False])
    half = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    state.apply_({"a": half})
    state.apply_({"a": weight})
    assert [half.tolist(), weight.tolist()] == [[0.0, 0.0], [0.0, 0.0]]
    assert copy.deepcopy(state).masks["a"].tolist() == [False, False]


@pytest.mark.parametrize(
    ("make_optimizer", "names"),
    [
        (partial(torch.optim.SGD, lr=0.1, momentum=0.9), {"momentum_buffer"}),
        (partial(torch.optim.Adam, amsgrad=True), {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
        (partial(torch.optim.RMSprop, momentum=0.9), {"square_avg", "momentum_buffer"}),
    ],
)
def test_all_moments_of_dropped_weights_are_cleared_and_the_others_stay(
    make_optimizer: partial[torch.optim.Optimizer], names: set[str]
) -> None:
    weight, bias = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = make_optimizer([weight, bias])
    torch.autograd.backward(weight.sum() + bias.sum())
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict()["state"])
    clear_optimizer_state_(optimizer, {"a": weight}, {"a": torch.tensor([True, False])})
    after = optimizer.state_dict()["state"]
    moments = {name: value for name, value in after[0].items() if isinstance(value, Tensor) and value.shape == (2,)}
    assert set(moments) == names
    assert all(value[1] == 0 and value[0] == before[0][name][0] != 0 for name, value in moments.items())
    assert all(torch.equal(after[1][name], before[1][name]) for name in names)


def test_an_optimizer_that_has_not_stepped_yet_stays_empty() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    clear_optimizer_state_(optimizer, {"a": weight}, {"a": torch.tensor([True, False])})
    assert not optimizer.state


@pytest.mark.parametrize("shape", [[], [1], [8], [9], [3, 5], [2, 3, 5, 7], [0]])
def test_a_packed_mask_comes_back_as_it_was(shape: list[int]) -> None:
    torch.manual_seed(0)
    mask = torch.rand(shape) > 0.5
    assert torch.equal(unpack_mask(pack_mask(mask), shape), mask)


def test_saved_masks_take_a_thirty_second_of_the_float_weights() -> None:
    weights = {"a": torch.randn(1000, 1000)}
    state = PruningState()
    state.masks = magnitude_masks(weights, 0.8)
    assert state.save()["masks"]["a"].nbytes == 4 * 1_000_000 // 32


def test_a_saved_state_loads_without_our_classes_and_comes_back_equal() -> None:
    state = PruningState()
    state.masks = magnitude_masks({"a": torch.randn(3, 5), "b": torch.randn(7)}, 0.5)
    state.complete = True
    file = io.BytesIO()
    torch.save(state.save(), file)
    file.seek(0)
    resumed = PruningState()
    resumed.load(torch.load(file, weights_only=True))
    assert resumed.complete
    assert list(resumed.masks) == ["a", "b"]
    assert all(torch.equal(resumed.masks[name], mask) for name, mask in state.masks.items())


def test_nothing_saved_means_no_masks() -> None:
    state = PruningState()
    state.masks, state.complete = {"a": torch.tensor([True, False])}, True
    state.settings = {"sparsity": 0.5}
    state.load({})
    assert (state.masks, state.complete, state.settings) == ({}, False, {"sparsity": 0.5})
