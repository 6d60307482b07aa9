"""Kept memory: used again at the next step, and never while anyone still reads it."""

from __future__ import annotations

import copy
import pickle

import torch
from torch import nn

from lightning_compress.quantization.affine import fake_quantize_weight
from lightning_compress.quantization.kept_memory import KeptMemory
from tests.small_networks import Residual, images, quantized, warmed


def test_memory_is_used_again_once_the_graph_that_reads_it_is_gone() -> None:
    memory, weight, x = KeptMemory(), nn.Parameter(torch.randn(4, 3)), torch.randn(2, 3)
    rounded = fake_quantize_weight(weight, 8, memory)
    address, result = rounded.data_ptr(), nn.functional.linear(x.requires_grad_(), rounded)
    del rounded
    assert fake_quantize_weight(weight, 8, memory).data_ptr() != address  # the graph of `result` still reads it
    memory = KeptMemory()
    result = nn.functional.linear(x, fake_quantize_weight(weight, 8, memory)).sum()
    result.backward()  # type: ignore[no-untyped-call]
    address = fake_quantize_weight(weight, 8, memory).data_ptr()
    assert fake_quantize_weight(weight, 8, memory).data_ptr() == address


def test_two_calls_before_one_backward_give_the_gradients_of_memory_of_their_own() -> None:
    first, second = torch.randn(2, 3), torch.randn(2, 3)
    gradients = []
    for memory in (KeptMemory(), None):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(3, 3))
        hidden = nn.functional.linear(first.requires_grad_(), fake_quantize_weight(weight, 4, memory))
        nn.functional.linear(hidden, fake_quantize_weight(weight, 4, memory)).square().sum().backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            weight.mul_(2.0)
        nn.functional.linear(second, fake_quantize_weight(weight, 4, memory)).square().sum().backward()  # type: ignore[no-untyped-call]
        gradients.append(weight.grad)
    assert gradients[0] is not None
    assert gradients[1] is not None
    assert torch.equal(gradients[0], gradients[1])


def test_a_retained_graph_can_be_run_again_after_the_weights_moved_on() -> None:
    memory, weight, x = KeptMemory(), nn.Parameter(torch.randn(2, 3)), torch.randn(2, 3, requires_grad=True)
    result = nn.functional.linear(x, fake_quantize_weight(weight, 8, memory)).sum()
    (expected,) = torch.autograd.grad(result, x, retain_graph=True)
    with torch.no_grad():
        weight.add_(1.0)
    fake_quantize_weight(weight, 8, memory)
    (found,) = torch.autograd.grad(result, x)
    assert torch.equal(found, expected)


def test_a_tensor_of_another_shape_type_or_layout_gets_other_memory() -> None:
    memory = KeptMemory()
    shapes = [torch.ones(2, 3), torch.ones(3, 2).t(), torch.ones(2, 3, dtype=torch.float64), torch.ones(6)]
    found = [memory.like(x) for x in shapes for _ in range(2)]
    assert [(x.shape, x.dtype, x.stride()) for x in found[::2]] == [(x.shape, x.dtype, x.stride()) for x in shapes]


def test_a_copy_and_a_pickle_start_without_memory() -> None:
    memory = KeptMemory()
    address = memory.like(torch.ones(64)).data_ptr()
    for other in (copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))):
        assert other.like(torch.ones(64)).data_ptr() != address


def test_a_copied_network_does_not_write_into_the_memory_of_the_first() -> None:
    torch.manual_seed(0)
    model = warmed(Residual())
    quantized(model)
    model.train()
    x = images()
    expected = model(x)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(3.0)
    other(x).sum().backward()
    expected.sum().backward()
    found = model(x)
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert torch.equal(found, expected)


def test_without_gradients_every_call_has_memory_of_its_own() -> None:
    memory, weight = KeptMemory(), torch.randn(4, 3)
    with torch.no_grad():
        kept = fake_quantize_weight(weight, 8, memory)
    assert memory.like(weight).data_ptr() != kept.data_ptr()
