"""Residual networks for small images: CIFAR-style students and a teacher that is wide where pixels are few."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut around them (He et al. 2016, figure 2, arXiv:1512.03385)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, in_channels, height, width) to (n, channels, height / stride, width / stride)."""
        out: Tensor = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out)) + self.shortcut(x)
        return self.relu(out)  # type: ignore[no-any-return]


class ResNet(nn.Module):
    """A residual network of basic blocks; every stage but the first halves the resolution.

    Args:
        n_classes: Number of logits.
        in_channels: 1 for grey images, 3 for colour.
        widths: Channels of each stage.
        depths: Blocks of each stage.
        stem_channels: Channels of the first convolution.
        stem_stride: Stride of the first convolution; 2 makes everything after it four times cheaper.
    """

    def __init__(
        self,
        *,
        n_classes: int,
        in_channels: int,
        widths: Sequence[int],
        depths: Sequence[int],
        stem_channels: int,
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, stem_channels, 3, stem_stride, padding=1, bias=False),
            nn.BatchNorm2d(stem_channels),
            nn.ReLU(inplace=True),
        )
        blocks: list[nn.Module] = []
        channels = stem_channels
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            for block in range(depth):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(BasicBlock(channels, width, stride))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (n, in_channels, height, width) to logits (n, n_classes)."""
        features = self.pool(self.blocks(self.stem(x)))
        return self.head(features.flatten(1))  # type: ignore[no-any-return]


def student(depth: int = 20, *, width: int = 16, in_channels: int = 1, n_classes: int = 10) -> ResNet:
    """Build a CIFAR-style ResNet (He et al. 2016, section 4.2, with projection shortcuts).

    Args:
        depth: Layers, 6 n + 2 with n blocks a stage: 8, 14, 20, 32, ...
        width: Channels of the first stage; the next two have twice and four times as many.
        in_channels: 1 for grey images, 3 for colour.
        n_classes: Number of logits.

    Returns:
        The network, with random weights.

    Raises:
        ValueError: If ``depth`` is not 6 n + 2.

    Example:
        >>> sum(parameter.numel() for parameter in student(20).parameters())
        272186
    """
    n_blocks, rest = divmod(depth - 2, 6)
    if rest or n_blocks < 1:
        raise ValueError(f"`depth` must be 6 n + 2 (8, 14, 20, ...), got {depth}.")
    return ResNet(
        n_classes=n_classes,
        in_channels=in_channels,
        widths=(width, 2 * width, 4 * width),
        depths=(n_blocks, n_blocks, n_blocks),
        stem_channels=width,
    )


def teacher(width: int = 48, *, in_channels: int = 1, n_classes: int = 10) -> ResNet:
    """Build a network with over five times the parameters of ``student(20)`` that costs no more to run.

    It halves the resolution at once and is wide from there on.

    Args:
        width: Channels of the first stage; the next two have twice and four times as many.
        in_channels: 1 for grey images, 3 for colour.
        n_classes: Number of logits.

    Returns:
        The network, with random weights.

    Example:
        >>> sum(parameter.numel() for parameter in teacher().parameters())
        1512178
    """
    return ResNet(
        n_classes=n_classes,
        in_channels=in_channels,
        widths=(width, 2 * width, 4 * width),
        depths=(1, 2, 2),
        stem_channels=width // 2,
        stem_stride=2,
    )


def lenet_300_100(n_classes: int = 10, in_features: int = 784) -> nn.Sequential:
    """Return LeNet-300-100 (LeCun et al. 1998): two hidden layers, 266,610 parameters for 28x28 images.

    Example:
        >>> sum(parameter.numel() for parameter in lenet_300_100().parameters())
        266610
    """
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(in_features, 300),
        nn.ReLU(),
        nn.Linear(300, 100),
        nn.ReLU(),
        nn.Linear(100, n_classes),
    )


def lenet_5(n_classes: int = 10, pixels: int = 28) -> nn.Sequential:
    """Return LeNet-5 as Caffe has it, and the papers on pruning: 431,080 parameters for 28x28 images.

    Example:
        >>> sum(parameter.numel() for parameter in lenet_5().parameters())
        431080
    """
    size = ((pixels - 4) // 2 - 4) // 2
    return nn.Sequential(
        nn.Conv2d(1, 20, 5),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(50 * size**2, 500),
        nn.ReLU(),
        nn.Linear(500, n_classes),
    )
