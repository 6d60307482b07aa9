"""An image classifier as any user of Lightning writes it; it knows nothing of compression."""

from __future__ import annotations

from typing import Literal

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_accuracy

from examples.image_data import Batch


class ImageClassifier(L.LightningModule):
    """Trains a network with cross-entropy under a one-cycle learning rate.

    Args:
        network: Maps images (n, channels, height, width) to logits (n, n_classes).
        n_classes: Number of classes.
        learning_rate: Highest learning rate of the cycle (Smith & Topin 2017, arXiv:1708.07120).
        weight_decay: Weight decay.
        optimizer: ``"sgd"`` with Nesterov momentum 0.9, or ``"adamw"``.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        n_classes: int = 10,
        learning_rate: float = 0.2,
        weight_decay: float = 5e-4,
        optimizer: Literal["sgd", "adamw"] = "sgd",
    ) -> None:
        super().__init__()
        self.network = network
        self.n_classes = n_classes
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.optimizer = optimizer

    def forward(self, images: Tensor) -> Tensor:
        """Map images to logits."""
        return self.network(images)  # type: ignore[no-any-return]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the cross-entropy of a batch."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the accuracy on the validation images."""
        images, labels = batch
        accuracy = multiclass_accuracy(self(images), labels, self.n_classes, average="micro")
        self.log("val_accuracy", accuracy, batch_size=len(labels))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer and its one-cycle schedule, stepped with every optimizer step."""
        optimizer: torch.optim.Optimizer
        if self.optimizer == "sgd":
            optimizer = torch.optim.SGD(
                self.parameters(), self.learning_rate, momentum=0.9, nesterov=True, weight_decay=self.weight_decay
            )
        else:
            optimizer = torch.optim.AdamW(self.parameters(), self.learning_rate, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            self.learning_rate,
            total_steps=int(self.trainer.estimated_stepping_batches),
            pct_start=0.25,
            div_factor=10,
            final_div_factor=100,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
