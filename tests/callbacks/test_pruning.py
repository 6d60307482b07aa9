"""`MagnitudePruning` in real fits: exact counts, plain weights, resumes, and errors in one sentence."""

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader, IterableDataset

from lightning_compress.callbacks.checkpoint import COMPRESSION_KEY
from lightning_compress.callbacks.clock import completed_steps
from lightning_compress.callbacks.pruning import MagnitudePruning
from lightning_compress.errors import CompressionError
from lightning_compress.pruning import Scope, magnitude_masks, pattern_mask
from lightning_compress.schedules import CubicSchedule

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),  # raised inside Lightning 2.6
]

N_WEIGHTS = 8 * 13 + 13 * 3  # of `Net`: 143, an odd number


class Net(pl.LightningModule):
    """Layers on the module itself, Adam."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 13)
        self.norm = nn.BatchNorm1d(13)
        self.last = nn.Linear(13, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.norm(self.first(x)).relu())
        return logits

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        return self(batch).square().mean()  # type: ignore[no-any-return]

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("loss", self(batch).square().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.05)


class SubNetworks(pl.LightningModule):
    """Two sub-networks that share a weight, SGD with momentum."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 5, 3), nn.ReLU(), nn.Flatten())
        self.decoder = nn.ModuleDict({"up": nn.Linear(10, 10), "again": nn.Linear(10, 10)})
        self.decoder["again"].weight = self.decoder["up"].weight

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.decoder["again"](self.decoder["up"](self.encoder(batch))).square().mean()
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Manual(Net):
    """Two optimizers under manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.zero_grad()
            self.manual_backward(self(batch).square().mean())
            optimizer.step()
        return None

    def configure_optimizers(self) -> Any:
        rest = [*self.norm.parameters(), *self.last.parameters()]
        return [torch.optim.Adam(self.first.parameters(), lr=0.05), torch.optim.SGD(rest, lr=0.05, momentum=0.9)]


class Ladder(pl.LightningModule):
    """Inputs that are multiples of four, but for the last layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 12)
        self.up = nn.Sequential(nn.Unflatten(1, (12, 1)), nn.ConvTranspose1d(12, 3, 2), nn.Flatten())
        self.odd = nn.Linear(6, 2)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.odd(self.up(self.first(batch).relu())).square().mean()
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.05)


class LateLayers(Net):
    """Creates its layers in `configure_model`."""

    def __init__(self) -> None:
        pl.LightningModule.__init__(self)

    def configure_model(self) -> None:
        self.first, self.norm, self.last = nn.Linear(8, 13), nn.BatchNorm1d(13), nn.Linear(13, 3)


class SetupLayers(LateLayers):
    """Creates its layers in `setup`."""

    configure_model = pl.LightningModule.configure_model

    def setup(self, stage: str) -> None:
        LateLayers.configure_model(self)


class Weightless(Net):
    """Has nothing but a normalisation."""

    def __init__(self) -> None:
        pl.LightningModule.__init__(self)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(x)
        return normed


class Watch(pl.Callback):
    """Writes down the clock, the counted zeros of each layer, and what optimizers remember where masks are new."""

    def __init__(self, pruning: MagnitudePruning) -> None:
        self.pruning = pruning
        self.zeros: dict[int, int] = {}
        self.complete_at: list[int] = []
        self.stray_moments = 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        step = completed_steps(trainer)
        weights = [pl_module.get_parameter(f"{name}.weight") for name in self.pruning.sparsity_by_layer(pl_module)]
        self.zeros[step] = sum(int((weight == 0).sum()) for weight in weights)
        self.complete_at += [step] * self.pruning.complete
        if not self.pruning._rise.is_due(step):
            return
        for optimizer in trainer.optimizers:
            for parameter, memory in optimizer.state.items():
                pruned = (parameter == 0) & (parameter.dim() > 1)
                same = [value for value in memory.values() if torch.is_tensor(value) and value.shape == pruned.shape]
                self.stray_moments += sum(int(value[pruned].count_nonzero()) for value in same)


class SaveEachStep(pl.Callback):
    """Writes a checkpoint at the end of every batch, named by the clock."""

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir) / f"{completed_steps(trainer)}.ckpt")


class Stream(IterableDataset[Tensor]):
    """Samples of unknown number."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.ones(8, 8))


def batches(count: int) -> DataLoader[Tensor]:
    samples = torch.randn(4 * count, 8, generator=torch.Generator().manual_seed(1))
    return DataLoader(samples, batch_size=4)  # type: ignore[arg-type]


def make_trainer(path: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 1}
    return pl.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        enable_model_summary=False,
        default_root_dir=path,
        **{**quiet, **options},
    )


def zeros(model: nn.Module, *layers: str) -> int:
    return sum(int((model.get_parameter(f"{layer}.weight") == 0).sum()) for layer in layers)


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize(
    ("model_class", "layers", "total"),
    [
        (Net, ["first", "last"], N_WEIGHTS),
        (SubNetworks, ["encoder.1", "decoder.up"], 30 + 100),
        (Manual, ["first", "last"], N_WEIGHTS),
    ],
)
def test_every_step_has_the_exact_count_of_the_cubic_schedule(
    tmp_path: Path, model_class: type[pl.LightningModule], layers: list[str], total: int, scope: Scope
) -> None:
    model = model_class()
    pruning = MagnitudePruning(0.8, start=0.2, end=0.8, scope=scope)
    watch = Watch(pruning)
    make_trainer(tmp_path, pruning, watch, max_epochs=2).fit(model, batches(5))
    schedule = CubicSchedule(0.8, 2, 8)
    assert watch.zeros == {step: round(schedule(step) * total) for step in range(1, 11)}
    assert watch.complete_at == [8, 9, 10]
    assert zeros(model, *layers) == round(0.8 * total)
    assert watch.stray_moments == 0


@pytest.mark.parametrize("sparsity", [0.0, 0.001, 0.333, 0.5, 0.77, 0.9, 0.999])
def test_the_target_is_hit_to_one_weight_at_the_last_step_of_the_run(tmp_path: Path, sparsity: float) -> None:
    model, pruning = Net(), MagnitudePruning(sparsity=sparsity, end=1.0)
    make_trainer(tmp_path, pruning).fit(model, batches(4))
    assert pruning.complete
    assert zeros(model, "first", "last") == round(sparsity * N_WEIGHTS)
    assert pruning.counted_sparsity(model) == round(sparsity * N_WEIGHTS) / N_WEIGHTS


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_epochs": 2, "accumulate_grad_batches": 2}, 6),
        ({"max_epochs": 2, "accumulate_grad_batches": 3}, 4),
        ({"max_epochs": -1, "max_steps": 7}, 7),
        ({"max_epochs": 9, "max_steps": 4, "accumulate_grad_batches": 2}, 4),
        ({"max_epochs": 3, "limit_train_batches": 2}, 6),
        ({"fast_dev_run": 3}, 3),
    ],
)
def test_the_run_may_be_of_any_length_and_accumulate(tmp_path: Path, options: dict[str, Any], steps: int) -> None:
    model, pruning = Net(), MagnitudePruning(0.8, end=1.0)
    watch = Watch(pruning)
    make_trainer(tmp_path, pruning, watch, **options).fit(model, batches(5))
    schedule = CubicSchedule(0.8, 0, steps)
    assert {**watch.zeros, 0: 0} == {step: round(schedule(step) * N_WEIGHTS) for step in range(steps + 1)}


def test_between_updates_the_masks_stay_and_the_end_is_always_one(tmp_path: Path) -> None:
    pruning = MagnitudePruning(0.5, start=1, end=8, update_every=3)
    watch = Watch(pruning)
    make_trainer(tmp_path, pruning, watch).fit(Net(), batches(10))
    at_4, at_7 = (round(CubicSchedule(0.5, 1, 8)(step) * N_WEIGHTS) for step in (4, 7))
    assert list(watch.zeros.values()) == [0, 0, 0, at_4, at_4, at_4, at_7, 72, 72, 72]


def test_by_default_there_are_at_most_a_hundred_updates(tmp_path: Path) -> None:
    pruning = MagnitudePruning(0.9, end=250)
    watch = Watch(pruning)
    make_trainer(tmp_path, pruning, watch).fit(Net(), batches(250))
    changed = {step for step in range(2, 251) if watch.zeros[step] != watch.zeros[step - 1]}
    # 250 steps in at most 100 updates: every third step, and the last.
    assert changed <= {*range(3, 250, 3), 250}
    assert {3, 6, 9} <= changed
    assert watch.zeros[250] == round(0.9 * N_WEIGHTS)


def test_a_jump_at_step_zero_prunes_before_the_first_batch(tmp_path: Path) -> None:
    model = Net()
    expected = magnitude_masks({"first": model.first.weight, "last": model.last.weight}, 0.5)
    make_trainer(tmp_path, MagnitudePruning(0.5, start=0, end=0)).fit(model, batches(3))
    assert torch.equal(model.first.weight != 0, expected["first"])
    assert torch.equal(model.last.weight != 0, expected["last"])


def test_before_the_start_training_is_untouched(tmp_path: Path) -> None:
    plain, model = Net(), Net()
    make_trainer(tmp_path).fit(plain, batches(3))
    pruning = MagnitudePruning(0.5, start=4, end=5)
    with pytest.warns(UserWarning, match="The fit ended after 3 optimizer steps"):
        make_trainer(tmp_path, pruning).fit(model, batches(3))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
    assert not pruning.complete


def test_pruned_weights_stay_pruned(tmp_path: Path) -> None:
    model = Net()

    class StaysPruned(pl.Callback):
        pruned = torch.zeros(13, 8, dtype=torch.bool)

        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
            now = model.first.weight == 0
            assert bool((now | ~self.pruned).all())
            self.pruned = now

    watch = StaysPruned()
    make_trainer(tmp_path, MagnitudePruning(0.8, end=0.9), watch).fit(model, batches(10))
    assert int(watch.pruned.sum()) == zeros(model, "first") > 0


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_pattern_is_reached_gradually_and_holds_exactly(tmp_path: Path, scope: Scope) -> None:
    model = Ladder()
    pruning = MagnitudePruning(pattern=(2, 4), end=6, scope=scope, exclude=["odd"])
    watch = Watch(pruning)
    make_trainer(tmp_path, pruning, watch).fit(model, batches(8))
    total = 8 * 12 + 12 * 3 * 2
    schedule = CubicSchedule(0.5, 0, 6)
    assert watch.zeros == {step: round(schedule(step) * total) for step in range(1, 9)}
    first, up = model.first.weight, model.get_parameter("up.1.weight")
    assert torch.equal(first != 0, pattern_mask(first, (2, 4)))
    assert torch.equal(up != 0, pattern_mask(up, (2, 4), input_dim=0))
    assert zeros(model, "odd") == 0


def test_after_the_fit_the_weights_are_plain_zeros_under_their_own_names(tmp_path: Path) -> None:
    model = Net()
    keys, parameters = list(model.state_dict()), list(model.parameters())
    make_trainer(tmp_path, MagnitudePruning(0.8)).fit(model, batches(5))
    assert list(model.state_dict()) == keys
    assert all(now is before for now, before in zip(model.parameters(), parameters, strict=True))
    assert all(parameter.is_leaf and parameter.requires_grad for parameter in model.parameters())
    assert zeros(model, "first", "last") == round(0.8 * N_WEIGHTS)
    pruned = model.first.weight[model.first.weight == 0]
    assert not bool(torch.signbit(pruned).any())
    assert bool((model.first.bias != 0).all())


def test_excluded_layers_keep_all_their_weights(tmp_path: Path) -> None:
    model, pruning = Net(), MagnitudePruning(0.75, exclude=["la*"])
    make_trainer(tmp_path, pruning).fit(model, batches(5))
    assert pruning.sparsity_by_layer(model) == {"first": 0.75}
    assert zeros(model, "last") == 0


def test_layers_created_in_the_modules_setup_are_pruned(tmp_path: Path) -> None:
    model, pruning = SetupLayers(), MagnitudePruning(0.8)
    make_trainer(tmp_path, pruning).fit(model, batches(5))
    assert pruning.counted_sparsity(model) == round(0.8 * N_WEIGHTS) / N_WEIGHTS


def test_the_counted_sparsity_is_logged(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trainer = make_trainer(tmp_path, MagnitudePruning(0.8, start=2, end=4), logger=logger, log_every_n_steps=1)
    trainer.fit(Net(), batches(5))
    rows = Path(logger.log_dir, "metrics.csv").read_text().splitlines()
    counts = [round(CubicSchedule(0.8, 2, 4)(step) * N_WEIGHTS) for step in (2, 3, 4, 5)]
    column = rows[0].split(",").index("compress/sparsity")
    assert [float(row.split(",")[column]) * N_WEIGHTS for row in rows[1:]] == pytest.approx(counts, rel=1e-5)
    assert trainer.callback_metrics["compress/sparsity"].item() * N_WEIGHTS == pytest.approx(counts[-1])


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("pattern", [None, (1, 2)])
@pytest.mark.parametrize("step", [2, 5, 6, 9])
@pytest.mark.parametrize("model_class", [Net, Manual])
def test_a_resumed_run_equals_the_uninterrupted_run_bit_for_bit(
    tmp_path: Path, model_class: type[Net], step: int, pattern: tuple[int, int] | None
) -> None:
    options: dict[str, Any] = {"start": 0.3, "end": 0.8, "update_every": 2, "pattern": pattern}
    options["exclude"] = ["last"] if pattern else []
    sparsity = None if pattern else 0.8

    # One batch an epoch, so that every step is the end of an epoch and the data go on in order.
    def run(resume: Path | None, *extra: pl.Callback) -> dict[str, Any]:
        trainer = make_trainer(tmp_path, MagnitudePruning(sparsity, **options), *extra, max_epochs=10)
        trainer.fit(model_class(), batches(1), ckpt_path=resume)
        trainer.save_checkpoint(tmp_path / "end.ckpt")
        checkpoint: dict[str, Any] = torch.load(tmp_path / "end.ckpt", weights_only=True)
        return checkpoint

    whole = run(None, SaveEachStep())
    resumed = run(tmp_path / f"{step}.ckpt")
    for part in ("state_dict", "optimizer_states", COMPRESSION_KEY):
        leaves, spec = tree_flatten(whole[part])
        others, other_spec = tree_flatten(resumed[part])
        assert spec == other_spec
        assert all(
            type(a) is type(b) and bool(torch.all(torch.as_tensor(a == b))) for a, b in zip(leaves, others, strict=True)
        )
        assert any(torch.is_tensor(leaf) for leaf in leaves)
    assert whole[COMPRESSION_KEY]["pruning"]["complete"]


def test_a_weights_only_checkpoint_holds_masks_of_one_bit_a_weight(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, MagnitudePruning(0.8))
    trainer.fit(Net(), batches(5))
    trainer.save_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    checkpoint = torch.load(tmp_path / "model.ckpt", weights_only=True)
    masks = checkpoint[COMPRESSION_KEY]["pruning"]["masks"]
    assert {name: bits.numel() for name, bits in masks.items()} == {"first": 13, "last": 5}
    model = Net.load_from_checkpoint(tmp_path / "model.ckpt", strict=True)
    assert zeros(model, "first", "last") == round(0.8 * N_WEIGHTS)


def test_a_run_resumed_from_an_unpruned_checkpoint_catches_up(tmp_path: Path) -> None:
    make_trainer(tmp_path, SaveEachStep(), max_epochs=6).fit(Net(), batches(1))
    pruning = MagnitudePruning(0.8, end=4)
    watch = Watch(pruning)
    make_trainer(tmp_path, pruning, watch, max_epochs=7).fit(Net(), batches(1), ckpt_path=tmp_path / "5.ckpt")
    assert watch.zeros == {6: round(0.8 * N_WEIGHTS), 7: round(0.8 * N_WEIGHTS)}


def test_a_checkpoint_of_other_layers_is_refused(tmp_path: Path) -> None:
    pruning = MagnitudePruning(0.5, end=2, exclude=["last"])
    make_trainer(tmp_path, pruning, SaveEachStep(), max_epochs=4).fit(Net(), batches(1))
    with pytest.raises(CompressionError, match="exclude") as caught:
        make_trainer(tmp_path, MagnitudePruning(0.5, end=2), max_epochs=4).fit(
            Net(), batches(1), ckpt_path=tmp_path / "3.ckpt"
        )
    assert str(caught.value) == (
        "The checkpoint was written with exclude=['last'], this run has exclude=[]. Use the same settings to go on "
        "with it, or `load_from_checkpoint` to begin a new run with its weights."
    )


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path: Path) -> None:
    make_trainer(tmp_path, MagnitudePruning(0.5, end=2), SaveEachStep(), max_epochs=4).fit(Net(), batches(1))
    state = torch.load(tmp_path / "3.ckpt", weights_only=True)
    saved = state["lightning_compress"]["pruning"]
    for by_layer in (saved["masks"], saved["shapes"]):
        by_layer["head"] = by_layer.pop("last")
    torch.save(state, tmp_path / "other.ckpt")
    with pytest.raises(CompressionError, match="masks") as caught:
        make_trainer(tmp_path, MagnitudePruning(0.5, end=2), max_epochs=4).fit(
            Net(), batches(1), ckpt_path=tmp_path / "other.ckpt"
        )
    assert str(caught.value) == (
        "The checkpoint holds masks for the layers ['first', 'head'], but this run prunes ['first', 'last']. "
        "Resume with the model and the `exclude` of the run that wrote it."
    )


@pytest.mark.parametrize("kind", [LateLayers, SetupLayers])
def test_layers_that_are_made_late_are_pruned(kind: type[Net], tmp_path: Path) -> None:
    model, pruning = kind(), MagnitudePruning(0.8, end=3)
    make_trainer(tmp_path, pruning).fit(model, batches(5))
    weights = [model.first.weight, model.last.weight]
    assert sum(int((weight == 0).sum()) for weight in weights) == round(0.8 * sum(w.numel() for w in weights))


def test_a_pattern_is_checked_on_layers_that_are_made_late(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Layer `last` has 13 inputs, which is not a multiple of 4"):
        make_trainer(tmp_path, MagnitudePruning(pattern=(2, 4))).fit(LateLayers(), batches(5))


def test_testing_after_the_fit_measures_the_pruned_weights(tmp_path: Path) -> None:
    model, pruning = Net(), MagnitudePruning(0.8)
    trainer = make_trainer(tmp_path, pruning)
    trainer.fit(model, batches(5))
    before = copy.deepcopy(model.state_dict())
    trainer.test(model, batches(2), verbose=False)
    assert pruning.complete
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_second_fit_follows_its_schedule_from_the_beginning(tmp_path: Path) -> None:
    model, pruning = Net(), MagnitudePruning(0.8, start=2, end=4)
    make_trainer(tmp_path, pruning).fit(model, batches(5))
    watch = Watch(pruning)
    make_trainer(tmp_path, pruning, watch).fit(model, batches(5))
    assert watch.complete_at == [4, 5]
    assert zeros(model, "first", "last") == round(0.8 * N_WEIGHTS)


def test_a_fit_continued_by_the_same_trainer_keeps_its_masks(tmp_path: Path) -> None:
    model, pruning = Net(), MagnitudePruning(0.8, end=4)
    trainer = make_trainer(tmp_path, pruning)
    trainer.fit(model, batches(5))
    kept = model.first.weight != 0
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, batches(5))
    assert completed_steps(trainer) == 10
    assert torch.equal(model.first.weight != 0, kept)


def test_copies_of_callback_and_module_are_independent(tmp_path: Path) -> None:
    model, pruning = Net(), MagnitudePruning(0.8)
    make_trainer(tmp_path, pruning).fit(model, batches(5))
    for twin_model in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin = copy.deepcopy(pruning)
        make_trainer(tmp_path, twin, max_epochs=0).fit(twin_model, batches(5))
        assert twin.complete
        twin._state.clear()
        checkpoint: dict[str, Any] = {}
        model.on_save_checkpoint(checkpoint)
        assert checkpoint[COMPRESSION_KEY]["pruning"]["complete"]
        assert pruning.complete


@pytest.mark.parametrize("pruning_first", [True, False])
def test_averaged_weights_end_under_the_masks(tmp_path: Path, pruning_first: bool) -> None:
    model, pruning = Net(), MagnitudePruning(0.8)
    callbacks = [pruning, EMAWeightAveraging(decay=0.5)][:: 1 if pruning_first else -1]
    make_trainer(tmp_path, *callbacks).fit(model, batches(5))
    assert zeros(model, "first", "last") == round(0.8 * N_WEIGHTS)


def test_a_fit_that_ends_too_early_says_so(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="The fit ended") as caught:
        make_trainer(tmp_path, MagnitudePruning(0.8, end=8)).fit(Net(), batches(4))
    assert str(caught[-1].message) == (
        "The fit ended after 4 optimizer steps, before the full compression was reached: `MagnitudePruning` was at a "
        "sparsity of 0.6993, and the full 0.8000 was due after step 8. Resume the run to finish, or choose earlier "
        "moments."
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "`sparsity` is a fraction of zeros in [0, 1), got 1.0."),
        ({"sparsity": -0.1}, "`sparsity` is a fraction of zeros in [0, 1), got -0.1."),
        ({"sparsity": float("nan")}, "`sparsity` is a fraction of zeros in [0, 1), got nan."),
        ({}, "`MagnitudePruning` needs a `sparsity` in [0, 1), or a `pattern` such as (2, 4)."),
        (
            {"sparsity": 0.8, "start": 0.7, "end": 0.6},
            "`start` must not come after `end`, got start=0.7 and end=0.6.",
        ),
        ({"sparsity": 0.8, "start": 20, "end": 10}, "`start` must not come after `end`, got start=20 and end=10."),
        (
            {"sparsity": 0.8, "start": 1.5},
            "`start` as a float is a share of the run in [0, 1], got 1.5. For optimizer steps pass an int.",
        ),
        (
            {"pattern": (2, 4), "scope": "lamp"},
            '`scope="lamp"` ranks weights that `pattern` has chosen already. Leave one of them out.',
        ),
        ({"sparsity": 0.8, "scope": "local"}, '`scope` must be "global", "layer" or "lamp", got \'local\'.'),
        ({"sparsity": 0.8, "update_every": 0}, "`update_every` must be at least 1 optimizer step, got 0."),
        (
            {"sparsity": 0.8, "pattern": (2, 4)},
            "`sparsity=0.8` is not the sparsity of `pattern=(2, 4)`, which is 0.5. Leave `sparsity` out.",
        ),
        (
            {"pattern": (4, 2)},
            "`pattern` must be two ints (n, m) with 0 < n < m, such as (2, 4) to keep 2 of every 4 weights, "
            "got (4, 2).",
        ),
    ],
)
def test_arguments_that_make_no_sense_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="`") as caught:
        MagnitudePruning(**options)
    assert str(caught.value) == message


def test_a_patterns_own_sparsity_may_be_given() -> None:
    assert MagnitudePruning(0.75, pattern=(1, 4)).sparsity == MagnitudePruning(pattern=(1, 4)).sparsity == 0.75


@pytest.mark.parametrize(
    ("pruning", "model_class", "error", "message"),
    [
        (
            MagnitudePruning(0.8, exclude=["head"]),
            Net,
            ValueError,
            "`exclude` pattern 'head' matches no layer. The layers are: `first`, `last`.",
        ),
        (
            MagnitudePruning(0.8, exclude="last"),
            Net,
            TypeError,
            "`exclude` must be a list of patterns, got the single string 'last'.",
        ),
        (
            MagnitudePruning(0.8),
            Weightless,
            CompressionError,
            "`Weightless` has no convolution or linear layer to prune. Give it one, or exclude fewer.",
        ),
        (
            MagnitudePruning(0.8, exclude=["*"]),
            Net,
            CompressionError,
            "`Net` has no convolution or linear layer to prune. Give it one, or exclude fewer.",
        ),
        (
            MagnitudePruning(pattern=(2, 4)),
            Ladder,
            ValueError,
            "Layer `odd` has 6 inputs, which is not a multiple of 4 as `pattern=(2, 4)` needs. "
            'Leave it out with `exclude=["odd"]`.',
        ),
        (
            MagnitudePruning(0.8, start=0.5, end=1),
            Net,
            ValueError,
            "`start` must not come after `end`, got start=0.5 (optimizer step 2) and end=1 (optimizer step 1).",
        ),
    ],
)
def test_a_model_or_run_that_does_not_fit_is_refused_before_training(
    tmp_path: Path, pruning: MagnitudePruning, model_class: type[Net], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match="`") as caught:
        make_trainer(tmp_path, pruning).fit(model_class(), batches(4))
    assert str(caught.value) == message
    assert pruning._state.masks == {}


@pytest.mark.parametrize("options", [{"max_epochs": -1}, {"max_epochs": 1}])
def test_shares_of_an_endless_run_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no known end") as caught:
        make_trainer(tmp_path, MagnitudePruning(0.8, start=0, end=0.5), **options).fit(Net(), DataLoader(Stream(), 4))
    assert str(caught.value) == (
        "`end=0.5` is a share of the run, but this run has no known end. "
        "Pass `end` as an int (optimizer steps), or give the Trainer `max_steps` or a finite `max_epochs`."
    )


def test_optimizer_steps_work_on_an_endless_run(tmp_path: Path) -> None:
    model, pruning = Net(), MagnitudePruning(0.8, start=0, end=2)
    make_trainer(tmp_path, pruning).fit(model, DataLoader(Stream(), 4))
    assert zeros(model, "first", "last") == round(0.8 * N_WEIGHTS)


def test_a_second_callback_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="more than one") as caught:
        make_trainer(tmp_path, MagnitudePruning(0.8), MagnitudePruning(0.5)).fit(Net(), batches(4))
    assert str(caught.value) == "The Trainer has more than one `MagnitudePruning` callback. Keep one of them."


def test_a_weight_that_became_nan_is_named(tmp_path: Path) -> None:
    model = Net()
    nn.init.constant_(model.last.weight, float("nan"))
    with pytest.raises(ValueError, match="NaN") as caught:
        make_trainer(tmp_path, MagnitudePruning(0.8)).fit(model, batches(4))
    assert str(caught.value) == (
        "The weight of layer `last` holds NaN or infinity, so its entries cannot be ranked. "
        "The training has diverged: lower the learning rate or clip the gradients."
    )
