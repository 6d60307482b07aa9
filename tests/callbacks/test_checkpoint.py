"""How the state of our callbacks travels in a module's checkpoints."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_compress.callbacks.checkpoint import COMPRESSION_KEY, attach_state, attached_state, detach_states

USER_CODE = """
import lightning.pytorch as pl
from torch import nn

class UserModule(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)
"""


class Holder:
    """A state of one tensor."""

    def __init__(self, *values: float) -> None:
        self.values = torch.tensor(values)

    def save(self) -> dict[str, Any]:
        return {"values": self.values}

    def load(self, saved: dict[str, Any]) -> None:
        self.values = saved.get("values", torch.empty(0))


class OwnHooks(BoringModel):
    """A user's module with checkpoint hooks of its own."""

    note = "mine"

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["note"] = self.note

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.note = checkpoint["note"]


def saved(model: pl.LightningModule) -> dict[str, Any]:
    checkpoint: dict[str, Any] = {}
    model.on_save_checkpoint(checkpoint)
    return checkpoint


def attached(model: pl.LightningModule, key: str, *values: float) -> Holder:
    holder = Holder(*values)
    attach_state(model, key, holder.save, holder.load)
    return holder


def test_all_states_lie_under_one_top_level_key() -> None:
    model = BoringModel()
    attached(model, "pruning", 1.0)
    attached(model, "quantization", 2.0)
    assert saved(model) == {
        COMPRESSION_KEY: {"pruning": {"values": torch.tensor([1.0])}, "quantization": {"values": torch.tensor([2.0])}}
    }


def test_attaching_a_key_again_replaces_its_state() -> None:
    model = BoringModel()
    attached(model, "pruning", 1.0)
    attached(model, "pruning", 2.0)
    assert saved(model) == {COMPRESSION_KEY: {"pruning": {"values": torch.tensor([2.0])}}}


def test_a_loaded_checkpoint_reaches_the_state() -> None:
    model, other = BoringModel(), BoringModel()
    attached(model, "pruning", 1.0, 2.0)
    holder = attached(other, "pruning", 0.0)
    other.on_load_checkpoint(saved(model))
    assert holder.values.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("checkpoint", [{}, {COMPRESSION_KEY: {}}, {COMPRESSION_KEY: {"other": {"values": 1}}}])
def test_a_checkpoint_without_our_state_lets_it_begin_anew(checkpoint: dict[str, Any]) -> None:
    model = BoringModel()
    holder = attached(model, "pruning", 3.0)
    model.on_load_checkpoint(checkpoint)
    assert holder.values.tolist() == []


def test_of_two_states_the_one_that_the_checkpoint_lacks_begins_anew() -> None:
    model = BoringModel()
    pruning, channels = attached(model, "pruning", 3.0), attached(model, "channels", 4.0)
    model.on_load_checkpoint({COMPRESSION_KEY: {"pruning": {"values": torch.tensor([5.0])}}})
    assert pruning.values.tolist() == [5.0]
    assert channels.values.tolist() == []


def test_the_users_own_hooks_are_still_called() -> None:
    model, other = OwnHooks(), OwnHooks()
    model.note = "kept"
    attached(model, "pruning", 1.0)
    attached(other, "pruning", 0.0)
    other.on_load_checkpoint(saved(model))
    assert other.note == "kept"


def test_a_hook_set_on_the_instance_is_called_and_given_back() -> None:
    model = BoringModel()
    calls: list[str] = []
    own = model.on_save_checkpoint = lambda checkpoint: calls.append("own")  # type: ignore[method-assign]
    attached(model, "pruning", 1.0)
    assert COMPRESSION_KEY in saved(model)
    assert calls == ["own"]
    detach_states(model)
    assert vars(model)["on_save_checkpoint"] is own
    assert "on_load_checkpoint" not in vars(model)


def test_detaching_removes_every_trace() -> None:
    model = OwnHooks()
    before = set(vars(model))
    attached(model, "pruning", 1.0)
    detach_states(model)
    detach_states(model)
    assert set(vars(model)) == before
    assert saved(model) == {"note": "mine"}


def test_the_attached_object_can_be_found_by_its_kind() -> None:
    model = BoringModel()
    assert attached_state(model, "pruning", Holder) is None
    holder = attached(model, "pruning", 1.0)
    assert attached_state(model, "pruning", Holder) is holder
    assert attached_state(model, "pruning", int) is None
    assert attached_state(model, "quantization", Holder) is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copied_module_saves_and_loads_its_own_state(copied: Any) -> None:
    model = OwnHooks()
    holder = attached(model, "pruning", 1.0)
    twin = copied(model)
    twin.on_load_checkpoint({"note": "twin", COMPRESSION_KEY: {"pruning": {"values": torch.tensor([5.0])}}})
    assert (model.note, holder.values.tolist()) == ("mine", [1.0])
    assert saved(model)[COMPRESSION_KEY]["pruning"]["values"].tolist() == [1.0]
    assert saved(twin)["note"] == "twin"
    assert saved(twin)[COMPRESSION_KEY]["pruning"]["values"].tolist() == [5.0]


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")  # raised inside Lightning 2.6
def test_a_trainers_checkpoint_holds_the_state_and_loads_as_plain_data(tmp_path: Path, weights_only: bool) -> None:
    model = BoringModel()
    attached(model, "pruning", 1.0)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(model)
    trainer.save_checkpoint(tmp_path / "model.ckpt", weights_only=weights_only)
    checkpoint = torch.load(tmp_path / "model.ckpt", weights_only=True)
    assert checkpoint[COMPRESSION_KEY] == {"pruning": {"values": torch.tensor([1.0])}}
    assert list(checkpoint["state_dict"]) == ["layer.weight", "layer.bias"]


def test_the_users_class_loads_strictly_where_our_package_was_never_imported(tmp_path: Path) -> None:
    (tmp_path / "user_code.py").write_text(USER_CODE)
    namespace: dict[str, Any] = {}
    exec(USER_CODE, namespace)
    model = namespace["UserModule"]()
    attached(model, "pruning", 1.0)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    script = (
        "import sys, user_code\n"
        "model = user_code.UserModule.load_from_checkpoint('model.ckpt', strict=True)\n"
        "assert not [name for name in sys.modules if name.startswith('lightning_compress')]\n"
        "print(model.layer.weight.flatten().tolist())\n"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == str(model.layer.weight.flatten().tolist())
