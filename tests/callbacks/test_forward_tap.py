import copy
import gc
import pickle
import re
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.callbacks.forward_tap import ForwardTap
from lightning_compress.errors import CompressionError


class LayersOnSelf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 3)
        self.second = nn.Linear(3, 1)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        out: Tensor = self.second(self.first(x)) * scale
        return out


class WithoutForward(nn.Module):
    """A network, a loss with a learned parameter, and a part of the network under a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = LayersOnSelf()
        self.part = self.net.first
        self.criterion = nn.PReLU()


class InAList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList([LayersOnSelf()])


class Sends(nn.Module):
    """Calls a whole step through the wrapped module's forward, as Lightning does under DDP."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: dict[str, Tensor]) -> Any:
        original = self.module.forward

        def step(batch: dict[str, Tensor]) -> Any:
            self.module.forward = original
            return self.module(batch["x"], scale=2.0)

        self.module.forward = step
        return self.module(batch)


X = torch.ones(4, 2)


def names(tap: ForwardTap) -> list[str]:
    return [call.name for call in tap.calls()]


def n_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_a_call_of_the_module_itself_is_the_networks() -> None:
    model = LayersOnSelf()
    tap = ForwardTap(model)
    with tap.recording():
        output = model(X, scale=2.0)
        (call,) = tap.calls()
    assert call.name == ""
    assert call.args[0] is X
    assert call.kwargs == {"scale": 2.0}
    assert call.output is output


def test_the_child_that_holds_all_layers_is_the_network() -> None:
    model = WithoutForward()
    tap = ForwardTap(model)
    with tap.recording():
        model.criterion(model.net(X))
        assert names(tap) == ["net"]


def test_a_call_inside_the_network_is_not_the_networks() -> None:
    model = WithoutForward()  # `part` is a direct child, too, and called by `net`
    tap = ForwardTap(model)
    with tap.recording():
        model.net(X)
        assert [call.name for call in tap._log.calls] == ["net"]


def test_an_entry_of_a_module_list_is_found() -> None:
    model = InAList()
    tap = ForwardTap(model)
    with tap.recording():
        model.nets[0](X)
        assert names(tap) == ["nets.0"]


def test_a_network_without_convolutions_is_the_child_with_all_parameters() -> None:
    model = nn.ModuleDict({"net": nn.Embedding(5, 2)})
    tap = ForwardTap(model)
    with tap.recording():
        model["net"](torch.tensor([1, 2]))
        assert names(tap) == ["net"]


def test_every_call_of_a_step_is_kept_in_order() -> None:
    model = LayersOnSelf()
    tap = ForwardTap(model)
    with tap.recording():
        outputs = [model(X), model(2 * X)]
        assert all(call.output is output for call, output in zip(tap.calls(), outputs, strict=True))


def test_module_points_at_a_submodule_however_deep() -> None:
    model = WithoutForward()
    tap = ForwardTap(model, module="net.second")
    with tap.recording():
        model.net(X)
        (call,) = tap.calls()
    assert call.name == "net.second"
    torch.testing.assert_close(call.args[0], model.net.first(X))


def test_a_step_sent_through_forward_is_not_the_networks_call() -> None:
    model = LayersOnSelf()
    tap = ForwardTap(model)
    with tap.recording():
        output = Sends(model)({"x": X})
        (call,) = tap.calls()
    assert call.args[0] is X
    assert call.kwargs == {"scale": 2.0}
    assert call.output is output


def test_nothing_is_heard_outside_of_a_recording() -> None:
    model = LayersOnSelf()
    tap = ForwardTap(model)
    model(X)
    with tap.recording():
        model(X)
    model(X)
    assert tap.calls_so_far() == []


def test_no_tensor_outlives_the_recording() -> None:
    model = LayersOnSelf()
    tap = ForwardTap(model)
    with tap.recording():
        x = torch.ones(4, 2)
        seen = [weakref.ref(x), weakref.ref(model(x))]
        assert len(tap.calls()) == 1
    del x
    gc.collect()
    assert [reference() for reference in seen] == [None, None]


def test_an_exception_in_the_block_ends_the_recording() -> None:
    model = LayersOnSelf()
    tap = ForwardTap(model)
    with pytest.raises(RuntimeError, match="mat1 and mat2"), tap.recording():
        model(torch.ones(4, 7))
    with tap.recording():
        model(X)
        assert names(tap) == [""]


def test_start_and_reset_do_what_the_block_does() -> None:
    model = LayersOnSelf()
    tap = ForwardTap(model)
    tap.start()
    model(X)
    assert names(tap) == [""]
    tap.reset()
    model(X)
    assert tap.calls_so_far() == []


def test_remove_takes_every_hook_away() -> None:
    model = WithoutForward()
    tap = ForwardTap(model)
    assert n_hooks(model) == 2 * 4  # two for the model, two for each child with parameters
    tap.remove()
    assert n_hooks(model) == 0


def test_a_deep_copy_is_not_heard() -> None:
    model = LayersOnSelf()
    tap = ForwardTap(model)
    with tap.recording():
        model(X)
        copied = copy.deepcopy(model)
        copied(X)
        assert len(tap.calls()) == 1


def test_a_pickle_made_while_recording_holds_no_batch() -> None:
    model = LayersOnSelf()
    tap = ForwardTap(model)
    bare = len(pickle.dumps(model))
    with tap.recording():
        model(torch.ones(1000, 2))
        pickled = pickle.dumps(model)
    assert len(pickled) == bare
    torch.testing.assert_close(pickle.loads(pickled)(X), model(X))


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_caller_is_heard(fullgraph: bool) -> None:
    model = LayersOnSelf()
    tap = ForwardTap(model)
    step = torch.compile(lambda x: model(x, scale=2.0).sum(), backend="eager", fullgraph=fullgraph)
    for _ in range(2):
        with tap.recording():
            total = step(X)
            (call,) = tap.calls()
        torch.testing.assert_close(call.output.sum(), total)
        torch.testing.assert_close(call.output, model(X, scale=2.0))


def test_a_compiled_network_is_heard() -> None:
    compiled: Any = torch.compile(LayersOnSelf(), backend="eager")
    model = nn.Sequential(compiled)
    tap = ForwardTap(model)
    with tap.recording():
        output = model[0](X)
        (call,) = tap.calls()
    assert call.output is output


def test_a_step_that_calls_nothing_is_explained() -> None:
    tap = ForwardTap(WithoutForward())
    message = (
        "The step called neither `WithoutForward` itself nor one of its children (`net`, `part`, `criterion`), "
        "so the network's forward is unknown: call `self(...)`, or name the submodule that the step calls with "
        '`module="..."`.'
    )
    with tap.recording(), pytest.raises(CompressionError, match=f"^{re.escape(message)}$"):
        tap.calls()


def test_a_step_that_calls_parts_names_them() -> None:
    model = LayersOnSelf()
    tap = ForwardTap(model)
    message = (
        "The step called `first`, `second` of `LayersOnSelf`, not exactly one of which is the whole network: "
        'call `self(...)`, or name the network with `module="first"`.'
    )
    with tap.recording():
        model.second(model.first(X))
        with pytest.raises(CompressionError, match=f"^{re.escape(message)}$"):
            tap.calls()


def test_a_submodule_that_is_never_called_is_named() -> None:
    model = LayersOnSelf()
    tap = ForwardTap(model, module="second")
    message = (
        "The step never called `second` of `LayersOnSelf`, which `module=` points at: "
        "name the submodule that the step calls."
    )
    with tap.recording():
        model.first(X)
        with pytest.raises(CompressionError, match=f"^{re.escape(message)}$"):
            tap.calls()


def test_a_wrong_name_lists_its_neighbours() -> None:
    message = (
        "`module='net.frist'` is not a submodule of `WithoutForward`, whose nearest names are "
        "`net.first`, `net.second`, `net`."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ForwardTap(WithoutForward(), module="net.frist")


def test_a_strange_name_lists_the_first_names() -> None:
    message = "`module='qqq'` is not a submodule of `LayersOnSelf`, whose nearest names are `first`, `second`."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ForwardTap(LayersOnSelf(), module="qqq")
