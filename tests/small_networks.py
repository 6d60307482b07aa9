"""Small networks of every kind of layer, and how they are trained a little and quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.quantization import Quantization, calibrate, prepare


class Residual(nn.Module):
    """Two residual blocks with one ReLU at five call sites, and a linear layer."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 8, 1)
        self.relu = nn.ReLU(inplace)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        first = self.relu(self.bn1(self.conv1(x)))
        second = self.bn2(self.conv2(first))
        second += first
        second = self.relu(second)
        third = self.relu(self.conv3(second) + second)
        return self.fc(F.adaptive_avg_pool2d(third, 1).flatten(1))


class PreActivation(nn.Module):
    """Norm and activation before the convolution; the sum stays without activation."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        x = self.conv(self.relu(self.norm(x))) + x
        return self.fc(self.relu(x).mean((2, 3)))


class Concatenated(nn.Module):
    """Two branches side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 4, 3, padding=1)
        self.right = nn.Conv2d(3, 4, 1)
        self.after = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Any:
        return self.after(torch.cat([F.relu(self.left(x)), self.right(x)], 1)).mean((2, 3))


class SqueezeExcite(nn.Module):
    """Channels weighted by a sigmoid of their means."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.squeeze = nn.Conv2d(8, 4, 1)
        self.excite = nn.Conv2d(4, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        x = F.silu(self.conv(x))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        return self.fc((x * gate).mean((2, 3)))


class Shuffled(nn.Module):
    """Grouped convolution behind a channel shuffle by view and transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.fc = nn.Linear(8 * 64, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.conv(x)
        batch, channels, height, width = x.shape
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).contiguous()
        first, second = self.grouped(x.view(batch, channels, height, width)).chunk(2, 1)
        return self.fc(torch.cat([second, first], 1).flatten(1))


def plain() -> nn.Module:
    """Convolution, batch norm, ReLU, pooling, linear layer, one after the other."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 5)
    )


def separable() -> nn.Module:
    """Depthwise and pointwise convolutions, as in MobileNetV2."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        nn.Conv2d(8, 6, 1, bias=False),
        nn.BatchNorm2d(6),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(96, 5),
    )


def one_dimensional() -> nn.Module:
    """Convolutions over a sequence (the height and width of the images, read as one)."""
    return nn.Sequential(
        nn.Flatten(2),
        nn.Conv1d(3, 8, 3, stride=2),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Conv1d(8, 4, 3),
        nn.Flatten(),
        nn.Linear(116, 5),
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "plain": plain,
    "separable": separable,
    "one_dimensional": one_dimensional,
    "residual": Residual,
    "pre_activation": PreActivation,
    "concatenated": Concatenated,
    "squeeze_excite": SqueezeExcite,
    "shuffled": Shuffled,
}
"""Networks that take images of shape (batch, 3, 8, 8) and return 5 values for each."""


def images(n_images: int = 8, seed: int = 0) -> Tensor:
    """Return random images of shape (n_images, 3, 8, 8)."""
    return torch.rand(n_images, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2.0 - 0.5


def warmed(model: nn.Module) -> nn.Module:
    """Give the norms of ``model`` statistics, gammas (some negative) and betas as after a training."""
    model.train()
    for seed in range(8):
        model(images(16, seed))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
            module.weight.data[::3] *= -1.0
    return model


def quantized(model: nn.Module, data: Iterable[Any] | None = None, **settings: Any) -> Quantization:
    """Prepare and calibrate ``model``, and let it quantize in eval mode."""
    quantization = prepare(model, **settings)
    calibrate(model, [images(16, seed) for seed in range(4)] if data is None else data)
    quantization.is_quantizing = True
    model.eval()
    return quantization
