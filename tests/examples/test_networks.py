from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from examples.networks import student, teacher


def n_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def by_hand(n_blocks: int) -> int:
    """Count the parameters of a CIFAR-style ResNet of 16, 32 and 64 channels; a batch norm has two per channel."""
    stem = 9 * 16 + 2 * 16
    first = n_blocks * (2 * 9 * 16 * 16 + 4 * 16)
    second = 9 * 16 * 32 + (2 * n_blocks - 1) * 9 * 32 * 32 + 16 * 32 + (2 * n_blocks + 1) * 2 * 32
    third = 9 * 32 * 64 + (2 * n_blocks - 1) * 9 * 64 * 64 + 32 * 64 + (2 * n_blocks + 1) * 2 * 64
    return stem + first + second + third + 64 * 10 + 10


@pytest.mark.parametrize(("depth", "n_blocks"), [(8, 1), (14, 2), (20, 3)])
def test_a_student_has_as_many_parameters_as_its_paper_says(depth: int, n_blocks: int) -> None:
    assert n_parameters(student(depth)) == by_hand(n_blocks)


def test_the_teacher_has_over_five_times_the_parameters_of_the_resnet_20() -> None:
    assert n_parameters(teacher()) > 5 * n_parameters(student(20))


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("pixels", [28, 32])
def test_networks_take_grey_and_colour_images_of_several_sizes(in_channels: int, pixels: int) -> None:
    images = torch.zeros(2, in_channels, pixels, pixels)
    for network in (student(8, in_channels=in_channels, n_classes=3), teacher(8, in_channels=in_channels, n_classes=3)):
        assert network(images).shape == (2, 3)


def test_a_students_stages_halve_the_resolution_and_double_the_channels() -> None:
    network = student(14, width=4)
    shapes: list[tuple[int, ...]] = []
    for block in network.blocks:
        block.register_forward_hook(lambda _module, _inputs, output: shapes.append(tuple(output.shape[1:])))
    network(torch.zeros(2, 1, 28, 28))
    assert shapes == [(4, 28, 28), (4, 28, 28), (8, 14, 14), (8, 14, 14), (16, 7, 7), (16, 7, 7)]


@pytest.mark.parametrize("depth", [2, 18, 21])
def test_a_depth_that_is_not_6n_plus_2_is_refused(depth: int) -> None:
    message = f"`depth` must be 6 n + 2 (8, 14, 20, ...), got {depth}."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        student(depth)
