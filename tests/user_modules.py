"""LightningModules as users write them; none of them knows of this package."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset


class Images(Dataset[dict[str, Tensor]]):
    """Small random images whose class is the brightest quadrant; always the same ones."""

    def __init__(self, n_images: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.rand(n_images, 1, 8, 8, generator=generator)
        self.labels = torch.randint(0, 4, (n_images,), generator=generator)
        for image, label in zip(self.images, self.labels.tolist(), strict=True):
            top, left = divmod(label, 2)
            image[0, 4 * top : 4 * top + 4, 4 * left : 4 * left + 4] += 1.0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"image": self.images[index], "label": self.labels[index]}


def loader(n_images: int = 64, batch_size: int = 8, seed: int = 0) -> DataLoader[dict[str, Tensor]]:
    """Return batches in a fixed order."""
    return DataLoader(Images(n_images, seed), batch_size=batch_size)


class LayersOnSelf(L.LightningModule):
    """Layers on the module itself, one ReLU at three call sites, a residual add."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(width, 4)

    def forward(self, image: Tensor) -> Tensor:
        first = self.relu(self.bn1(self.conv1(image)))
        second = self.bn2(self.conv2(first))
        second += first
        logits: Tensor = self.fc(self.relu(second).mean((2, 3)))
        return logits

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(self(batch["image"]), batch["label"])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor | None:
        return self.loss(batch)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=len(batch["label"]))
        accuracy = (self(batch["image"]).argmax(1) == batch["label"]).float().mean()
        self.log("val_acc", accuracy, batch_size=len(batch["label"]))

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch), batch_size=len(batch["label"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class KeywordNet(nn.Module):
    """Takes an image and, by keyword, a scale and an optional bias image; returns a dict."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU6())
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(width * 16, 4)

    def forward(self, image: Tensor, *, scale: float = 1.0, shift: Tensor | None = None) -> dict[str, Tensor]:
        if shift is not None:
            image = image + shift
        features = self.pool(self.features(image * scale))
        return {"logits": self.head(features.flatten(1)), "features": features}


class NetWithKeywords(LayersOnSelf):
    """Everything in ``self.net``, called with keywords, past a forward that no step uses."""

    def __init__(self, width: int = 8) -> None:
        L.LightningModule.__init__(self)
        self.save_hyperparameters()
        self.net = KeywordNet(width)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.net(image=image, shift=torch.zeros_like(image))["logits"]
        return logits


class TwoNetworks(LayersOnSelf):
    """An encoder and a classifier of their own, with a tuple between them."""

    def __init__(self, width: int = 8) -> None:
        L.LightningModule.__init__(self)
        self.save_hyperparameters()
        self.encoder = Encoder(width)
        self.classifier = nn.Sequential(nn.Linear(width, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 4))

    def forward(self, image: Tensor) -> Tensor:
        pooled, _ = self.encoder(image)
        logits: Tensor = self.classifier(pooled)
        return logits


class Encoder(nn.Module):
    """Returns pooled features and the feature map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        features = F.relu(self.norm(self.conv(image)))
        return F.adaptive_avg_pool2d(features, 1).flatten(1), features


class ManualOptimization(LayersOnSelf):
    """Backward and steps by hand."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor | None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()
        return None


USER_MODULES = (LayersOnSelf, NetWithKeywords, TwoNetworks, ManualOptimization)
