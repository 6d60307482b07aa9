"""Small networks, one for each way in which channels hang together."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from lightning_compress.pruning.channels.narrowing import narrow_
from lightning_compress.pruning.channels.places import ChannelGroup, Member, removed_places

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class Residual(nn.Module):
    """Two convolutions whose outputs are added, read by a third."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(torch.relu(self.bn(self.second(x)) + x))  # type: ignore[no-any-return]


class Concatenated(nn.Module):
    """Two convolutions side by side, read by a third."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 4, 1)
        self.right = nn.Conv2d(3, 6, 1)
        self.last = nn.Conv2d(10, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.left(x), self.right(x)], 1))  # type: ignore[no-any-return]


class Flattened(nn.Module):
    """A convolution, a flattening and a linear layer that reads four entries of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=4, padding=1)
        self.fc = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).flatten(1))  # type: ignore[no-any-return]


class FixedReshape(Flattened):
    """The same with a number of entries that is written down."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).reshape(-1, 16))  # type: ignore[no-any-return]


class Depthwise(nn.Module):
    """An inverted bottleneck: wide, depthwise, narrow."""

    def __init__(self) -> None:
        super().__init__()
        self.widen = nn.Conv2d(3, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.narrow = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(torch.relu(self.depthwise(torch.relu(self.widen(x)))))  # type: ignore[no-any-return]


class Grouped(nn.Module):
    """A grouped convolution between two ordinary ones."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Conv2d(3, 8, 1)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=4)
        self.after = nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(torch.relu(self.grouped(torch.relu(self.before(x)))))  # type: ignore[no-any-return]


class Transposed(nn.Module):
    """Transposed convolutions, one of them grouped."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ConvTranspose2d(3, 8, 2)
        self.grouped = nn.ConvTranspose2d(8, 4, 2, groups=2)
        self.last = nn.ConvTranspose2d(4, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.grouped(torch.relu(self.first(x)))))  # type: ignore[no-any-return]


class Halves(nn.Module):
    """A convolution whose output is cut in two equal halves that are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.conv(x).chunk(2, dim=1)
        return self.last(value * gate.sigmoid())  # type: ignore[no-any-return]


class Gates(nn.Module):
    """Squeeze and excitation: channels scaled by what two linear layers make of their means."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.squeeze = nn.Linear(8, 4)
        self.excite = nn.Linear(4, 8)
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        gate = self.excite(self.squeeze(x.mean((2, 3))).relu()).sigmoid()
        return self.last(x * gate[:, :, None, None])  # type: ignore[no-any-return]


class Normed(nn.Module):
    """A layer norm over channels, around a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return self.head(x)  # type: ignore[no-any-return]


class Scaled(nn.Module):
    """A bare parameter with an entry for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.scale = nn.Parameter(torch.rand(8, 1, 1))
        self.act = nn.PReLU(8)
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.conv(x) * self.scale))  # type: ignore[no-any-return]


class AddedToInput(nn.Module):
    """A residual branch that is added to the input itself."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Conv2d(3, 8, 1)
        self.back = nn.Conv2d(8, 3, 1)
        self.last = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + self.back(self.hidden(x).sigmoid()))  # type: ignore[no-any-return]


class Recurring(nn.Module):
    """One convolution that is called three times on its own output."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.again = nn.Conv2d(8, 8, 1)
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(3):
            x = self.again(x).relu()
        return self.last(x)  # type: ignore[no-any-return]


class Shuffled(nn.Module):
    """A channel shuffle between two grouped convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.second = nn.Conv2d(8, 8, 1)
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        n, channels, height, width = x.shape
        x = x.view(n, 2, channels // 2, height, width).transpose(1, 2).reshape(n, channels, height, width)
        return self.last(self.second(x).relu())  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Multi-head attention between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.attention = nn.MultiheadAttention(8, 4, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(self.attention(x, x, x, need_weights=False)[0])  # type: ignore[no-any-return]


def with_two_of_four_heads(attention: ModuleT) -> tuple[ModuleT, ModuleT]:
    """Give an attention module random weights; return it with the heads 1 and 3 masked, and without them."""
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.5)
    masked, small = copy.deepcopy(attention), copy.deepcopy(attention)
    holder = nn.ModuleDict({"attention": masked})
    group = ChannelGroup("attention", 4, (Member("attention", "heads", torch.arange(4), torch.arange(4)),))
    for place in removed_places(holder, [group], [torch.tensor([True, False, True, False])]):
        place.clear_(holder.get_parameter(place.parameter))
    narrow_(nn.ModuleDict({"attention": small}), {"attention": {"heads": [0, 2]}})
    return masked, small
