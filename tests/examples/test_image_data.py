from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from examples.image_data import Batch, ImageData, ImageSet, TensorBatches, shift_and_flip


def image_set(n: int = 20, *, flip: bool = True) -> ImageSet:
    """Image i is full of the value i."""
    images = torch.arange(n, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 6, 6).contiguous()
    return ImageSet(
        "numbers", images, torch.arange(n), images[:5], torch.arange(5), mean=(0.5,), std=(0.25,), flip=flip
    )


def images_of(batches: TensorBatches) -> list[Tensor]:
    return [images for images, _ in batches]


def labels_of(batches: TensorBatches) -> list[int]:
    return [label for _, labels in batches for label in labels.tolist()]


def test_images_are_normalised_with_the_mean_and_deviation_of_the_set() -> None:
    ((images, _),) = ImageData(image_set(), batch_size=5).test_dataloader()
    assert images[:, 0, 0, 0].tolist() == pytest.approx([(i / 255 - 0.5) / 0.25 for i in range(5)])


def test_test_images_come_in_order_and_as_they_are() -> None:
    assert labels_of(ImageData(image_set(), batch_size=2).test_dataloader()) == [0, 1, 2, 3, 4]


def test_the_last_tenth_is_validation_and_is_not_trained_on() -> None:
    data = ImageData(image_set(20), batch_size=1)
    assert labels_of(data.val_dataloader()) == [18, 19]
    assert sorted(labels_of(data.train_dataloader())) == list(range(18))


def test_without_hold_out_every_image_is_trained_on() -> None:
    data = ImageData(image_set(20), batch_size=1, hold_out=False)
    assert sorted(labels_of(data.train_dataloader())) == list(range(20))


def test_n_train_takes_the_first_images() -> None:
    data = ImageData(image_set(20), batch_size=1, n_train=3)
    assert sorted(labels_of(data.train_dataloader())) == [0, 1, 2]


def test_training_leaves_a_smaller_last_batch_out_and_evaluation_does_not() -> None:
    data = ImageData(image_set(20), batch_size=4)
    assert [len(data.train_dataloader()), len(data.test_dataloader())] == [4, 2]
    assert len(labels_of(data.train_dataloader())) == 16
    assert len(labels_of(data.test_dataloader())) == 5


def test_the_same_seed_and_epoch_give_the_same_batches() -> None:
    first, second = ImageData(image_set(), seed=3, batch_size=5), ImageData(image_set(), seed=3, batch_size=5)
    for one, other in zip(images_of(first.train_dataloader()), images_of(second.train_dataloader()), strict=True):
        assert torch.equal(one, other)


def test_another_epoch_gives_another_order() -> None:
    batches = ImageData(image_set(), batch_size=5).train_dataloader()
    first = labels_of(batches)
    batches.sampler.set_epoch(1)
    assert labels_of(batches) != first
    batches.sampler.set_epoch(0)
    assert labels_of(batches) == first


def test_another_seed_gives_another_order() -> None:
    one, other = (ImageData(image_set(), batch_size=5, seed=seed).train_dataloader() for seed in (0, 1))
    assert labels_of(one) != labels_of(other)


def test_a_loaded_position_continues_with_the_next_batch_once() -> None:
    stopped = ImageData(image_set(), batch_size=2).train_dataloader()
    served = iter(stopped)
    next(served)
    next(served)
    resumed = ImageData(image_set(), batch_size=2).train_dataloader()
    resumed.load_state_dict(stopped.state_dict())
    assert labels_of(resumed) == labels_of(ImageData(image_set(), batch_size=2).train_dataloader())[4:]
    assert len(labels_of(resumed)) == 18


def test_a_position_at_the_end_of_an_epoch_begins_the_next_one() -> None:
    batches = ImageData(image_set(), batch_size=2).train_dataloader()
    n_labels = len(labels_of(batches))
    batches.load_state_dict(batches.state_dict())
    assert len(labels_of(batches)) == n_labels


def test_a_shift_moves_the_picture_and_fills_with_zeros() -> None:
    image = torch.ones(50, 1, 5, 5, dtype=torch.uint8)
    shifted = shift_and_flip(image, torch.Generator().manual_seed(0), max_shift=2)
    kept_rows = shifted[:, 0].amax(dim=2).sum(dim=1)
    kept_columns = shifted[:, 0].amax(dim=1).sum(dim=1)
    assert set(kept_rows.tolist()) == set(kept_columns.tolist()) == {3, 4, 5}
    assert torch.equal(shifted[:, 0].long().sum(dim=(1, 2)), kept_rows.long() * kept_columns.long())


def test_a_mirrored_image_keeps_its_rows_and_channels() -> None:
    images = torch.arange(2 * 3 * 4).view(1, 2, 3, 4).repeat(20, 1, 1, 1)
    out = shift_and_flip(images, torch.Generator().manual_seed(0), max_shift=0)
    mirrored = (out == images.flip(3)).flatten(1).all(dim=1)
    kept = (out == images).flatten(1).all(dim=1)
    assert torch.equal(mirrored, ~kept)
    assert 0 < int(mirrored.sum()) < 20


def test_where_mirroring_is_not_allowed_no_image_is_mirrored() -> None:
    images = torch.arange(3).view(1, 1, 1, 3).repeat(20, 1, 1, 1)
    assert torch.equal(shift_and_flip(images, torch.Generator().manual_seed(0), max_shift=0, flip=False), images)


class Recorder(L.LightningModule):
    """Keeps the mean of every batch it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(36, 20)
        self.seen: list[float] = []

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        self.seen.append(float(images.double().mean()))
        return F.cross_entropy(self.layer(images.flatten(1)), labels)

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


class SaveEveryStep(L.Callback):
    """Writes the checkpoint ``step=N.ckpt`` after every step."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        trainer.save_checkpoint(self.folder / f"step={trainer.global_step}.ckpt")


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")  # raised inside Lightning 2.6
@pytest.mark.parametrize("step", [2, 3, 5, 7])
def test_a_resumed_run_sees_the_batches_that_the_whole_run_would_have_seen(tmp_path: Path, step: int) -> None:
    def fit(model: Recorder, folder: Path, checkpoint: Path | None = None) -> None:
        trainer = L.Trainer(
            max_epochs=3,
            accelerator="cpu",
            callbacks=[SaveEveryStep(folder)],
            enable_checkpointing=False,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(model, ImageData(image_set(), batch_size=6, seed=1).train_dataloader(), ckpt_path=checkpoint)

    whole, resumed = Recorder(), Recorder()
    fit(whole, tmp_path / "whole")
    fit(resumed, tmp_path / "resumed", tmp_path / "whole" / f"step={step}.ckpt")
    assert len(whole.seen) == 9
    assert resumed.seen == whole.seen[step:]
