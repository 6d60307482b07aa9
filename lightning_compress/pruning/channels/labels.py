"""Channel labels: what a run of a model has told of its channels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Side = Literal["out", "in", "both", "heads"]
"""Which channels of a module: those it makes, those it reads, both where they are the same (norms, depthwise), or its
attention heads."""


@dataclass
class Reads:
    """The labels of the channels of one module, on one side.

    Args:
        side: Which channels.
        labels: One label a channel.
        blocks: In how many blocks of equal length the channels must stay: the groups of a grouped convolution.
    """

    side: Side
    labels: Tensor
    blocks: int = 1


@dataclass
class LabelledRun:
    """What one run of a model told of its channels.

    Attributes:
        reads: The labelled channels of modules, by the module's name.
        parameters: The labels of parameters that no known layer holds, by name, in the parameter's shape.
        frozen: Why a label must stay, by label.
        blocks: Sequences of labels that are cut into parts of equal length somewhere: a row a part.
        costs: Multiply-accumulates of one sample in each convolution and linear layer, by the module's name.
    """

    reads: dict[str, list[Reads]] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    frozen: dict[int, str] = field(default_factory=dict)
    blocks: list[Tensor] = field(default_factory=list)
    costs: dict[str, int] = field(default_factory=dict)
    _parents: list[int] = field(default_factory=lambda: [0])

    def new_labels(self, count: int) -> Tensor:
        """Return labels that nothing has yet."""
        first = len(self._parents)
        self._parents.extend(range(first, first + count))
        return torch.arange(first, first + count)

    def root(self, label: int) -> int:
        """Return the one label that stands for all that have become one with ``label``."""
        while self._parents[label] != label:
            self._parents[label] = self._parents[self._parents[label]]
            label = self._parents[label]
        return label

    def roots(self, labels: Tensor) -> Tensor:
        """Return `root` of every label."""
        roots = {label: self.root(label) for label in set(labels.flatten().tolist())}
        return torch.tensor([roots[label] for label in labels.flatten().tolist()], dtype=torch.long).view(labels.shape)

    def unite(self, first: Tensor, second: Tensor) -> None:
        """Make the labels of two tensors of the same shape one, entry by entry; 0 is no label."""
        for a, b in set(zip(first.flatten().tolist(), second.flatten().tolist(), strict=True)):
            if a and b:
                self._parents[self.root(b)] = self.root(a)

    def freeze(self, labels: Tensor, reason: str) -> None:
        """Keep labels for ``reason``; the first reason stays."""
        for label in set(labels.flatten().tolist()):
            if label:
                self.frozen.setdefault(label, reason)

    def reasons(self) -> dict[int, str]:
        """Return why labels are frozen, by `root`."""
        found: dict[int, str] = {}
        for label, reason in self.frozen.items():
            found.setdefault(self.root(label), reason)
        return found
