"""The graphs of modules, and the dataflow of a model that is stitched from them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.graph import (
    Program,
    Trace,
    UntraceableError,
    call_key,
    entry_key,
    forward_signature,
    overwritten_parameters,
    trace_module,
    trace_program,
)

ONE_VALUE = (("x", "<value>"),)


def names_of(program: Program) -> list[str]:
    return [operation.name for operation in program.operations]


def readers_of(trace: Trace) -> list[tuple[str, list[str]]]:
    """Return every operation of the eval graph with the names of those it reads."""
    return [(node.name, [value.name for value in node.all_input_nodes]) for node in trace.evaluation.nodes]


class Switched(nn.Module):
    """Goes another way for None, a boolean and a string."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.second = nn.Linear(2, 2)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, twice: bool = False, mode: str = "plain") -> Tensor:
        x = self.first(x)
        if mask is not None:
            x = x * mask
        if twice:
            x = self.second(x)
        return x.tanh() if mode == "tanh" else x


@pytest.mark.parametrize(
    ("args", "kwargs", "operations"),
    [
        ((torch.ones(1, 2),), {}, ["first"]),
        ((torch.ones(1, 2), torch.ones(2)), {}, ["first", "mul"]),
        ((torch.ones(1, 2),), {"mask": torch.ones(2), "twice": True}, ["first", "mul", "second"]),
        ((torch.ones(1, 2),), {"mode": "tanh"}, ["first", "tanh"]),
    ],
)
def test_none_booleans_and_strings_choose_the_graph(args: Any, kwargs: Any, operations: list[str]) -> None:
    model = Switched()
    key = call_key(forward_signature(model), args, kwargs)
    assert key is not None
    nodes = [node.name for node in trace_module(model, key).evaluation.nodes if node.op.startswith("call")]
    assert nodes == operations


def test_a_call_that_does_not_fit_the_signature_has_no_key() -> None:
    signature = forward_signature(Switched())
    assert call_key(signature, (), {}) is None
    assert call_key(signature, (1,), {"unknown": 2}) is None


def test_an_entry_leaves_defaults_alone() -> None:
    assert entry_key(forward_signature(Switched())) == (
        ("x", "<value>"),
        ("mask", None),
        ("twice", False),
        ("mode", "plain"),
    )


class Twig(nn.Module):
    """What an untraceable parent holds."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Any:
        return self.layer(x).relu()


class Parent(nn.Module):
    """Runs a twig and a layer in a way of its own."""

    def __init__(self, run: Callable[[Parent, Tensor], Any]) -> None:
        super().__init__()
        self.twig = Twig()
        self.layer = nn.Linear(2, 2)
        self.run = run
        self.last: Any = None
        self.kept: list[Tensor] = []
        self.table: dict[str, Tensor] = {}
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def looks_at_values(self: Parent, x: Tensor) -> Tensor:
    return self.layer(self.twig(x)) if x.sum() > 0 else x


def draws_from_torch(self: Parent, x: Tensor) -> Tensor:
    return self.layer(self.twig(x)) if torch.rand(()) < 2.0 else x


def draws_from_python(self: Parent, x: Tensor) -> Tensor:
    return self.layer(self.twig(x)) if random.random() < 2.0 else x


def makes_a_tensor(self: Parent, x: Tensor) -> Any:
    return self.layer(self.twig(x)) + torch.ones(2)


def sets_an_attribute(self: Parent, x: Tensor) -> Any:
    self.last = self.twig(x)
    return self.layer(self.last)


def makes_an_attribute(self: Parent, x: Tensor) -> Any:
    self.made = self.twig(x)
    return self.layer(self.made)


def keeps_in_a_list(self: Parent, x: Tensor) -> Any:
    self.kept.append(x)
    return self.layer(self.twig(x))


def keeps_in_a_dict(self: Parent, x: Tensor) -> Any:
    self.table["x"] = x
    return self.layer(self.twig(x))


def counts_in_a_buffer(self: Any, x: Tensor) -> Any:
    self.calls += 1
    return self.layer(self.twig(x))


UNTRACEABLE: dict[Callable[[Any, Tensor], Any], str] = {
    looks_at_values: "TraceError: symbolically traced variables cannot be used as inputs to control flow",
    draws_from_torch: "its forward draws random numbers that a graph would freeze",
    draws_from_python: "its forward draws random numbers that a graph would freeze",
    makes_a_tensor: "its forward makes a tensor that a graph would freeze",
    sets_an_attribute: "its forward changes its attribute `last`, which a graph would leave out",
    makes_an_attribute: "its forward changes its attribute `made`, which a graph would leave out",
    keeps_in_a_list: "its forward changes its attribute `kept`, which a graph would leave out",
    keeps_in_a_dict: "its forward changes its attribute `table`, which a graph would leave out",
    counts_in_a_buffer: "its forward changes its attribute `calls`, which a graph would leave out",
}


@pytest.mark.parametrize("run", UNTRACEABLE, ids=lambda run: run.__name__)
def test_what_cannot_be_traced_stays_local_and_says_why(run: Callable[[Parent, Tensor], Any]) -> None:
    program = trace_program(nn.Sequential(Parent(run), nn.ReLU()))
    assert program.untraceable == {"0": UNTRACEABLE[run]}
    assert {trace.path for trace in program.traces.values()} == {"", "0.twig"}
    assert "0.twig.layer" in names_of(program)
    assert "0.layer" in names_of(program)


@pytest.mark.parametrize("run", UNTRACEABLE, ids=lambda run: run.__name__)
def test_tracing_leaves_nothing_behind(run: Callable[[Parent, Tensor], Any]) -> None:
    model = Parent(run)
    model.twig.eval()
    attributes = set(vars(model))
    random_states = torch.get_rng_state(), random.getstate()
    with pytest.raises(UntraceableError):
        trace_module(model, ONE_VALUE)
    assert set(vars(model)) == attributes
    assert (model.last, model.kept, model.table, model.get_buffer("calls").item()) == (None, [], {}, 0.0)
    assert (model.training, model.twig.training, model.twig.layer.training) == (True, False, False)
    assert torch.equal(random_states[0], torch.get_rng_state())
    assert random_states[1] == random.getstate()


def test_star_arguments_have_no_graph_but_children_do() -> None:
    class Star(Twig):
        def forward(self, *values: Tensor) -> Any:
            return self.layer(values[0])

    program = trace_program(Star())
    assert program.untraceable == {"": "its forward takes *args"}
    assert names_of(program) == ["layer", "layer"]  # what enters the layer, and the layer


def traced(run: Callable[[Parent, Tensor], Any]) -> Trace:
    return trace_module(Parent(run), ONE_VALUE)


def test_an_in_place_operator_makes_a_new_value() -> None:
    def run(self: Parent, x: Tensor) -> Any:
        first = self.layer(x)
        first += x
        return first * x

    assert readers_of(traced(run)) == [
        ("x", []),
        ("layer", ["x"]),
        ("add", ["layer", "x"]),
        ("mul", ["add", "x"]),
        ("output", ["mul"]),
    ]


def test_later_readers_of_an_overwritten_value_read_what_overwrote_it() -> None:
    def run(self: Parent, x: Tensor) -> tuple[Tensor, Tensor]:
        value = self.layer(x)
        before = value * 2
        F.relu(value, inplace=True)
        return before, value + 1

    assert readers_of(traced(run))[2:] == [
        ("mul", ["layer"]),
        ("relu", ["layer"]),
        ("add", ["relu"]),
        ("output", ["mul", "add"]),
    ]


@pytest.mark.parametrize(
    ("module", "overwritten"),
    [
        (nn.Sequential(nn.ReLU(inplace=True), nn.Linear(2, 2)), {"input"}),
        (nn.Sequential(nn.Flatten(), nn.Dropout(inplace=True)), {"input"}),
        (nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True)), set()),
        (nn.Sequential(nn.ReLU()), set()),
    ],
)
def test_a_module_that_overwrites_its_input_is_known(module: nn.Module, overwritten: set[str]) -> None:
    assert overwritten_parameters(trace_module(module, (("input", "<value>"),))) == overwritten


def test_a_child_that_overwrites_what_its_parent_reads_again_keeps_its_own_forward() -> None:
    class Reads(nn.Module):
        def __init__(self, again: bool) -> None:
            super().__init__()
            self.stem = nn.Linear(2, 2)
            self.branch = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(2, 2))
            self.again = again

        def forward(self, x: Tensor) -> Any:
            x = self.stem(x)
            return self.branch(x) + x if self.again else self.branch(x)

    reason = {"branch": "it overwrites its input, which is read again after it"}
    assert [trace_program(Reads(again)).untraceable for again in (True, False)] == [reason, {}]


class Records(NamedTuple):
    """A result with names."""

    pooled: Tensor
    features: Tensor


@dataclass
class Fields:
    """The same as a dataclass."""

    pooled: Tensor
    features: Tensor


def as_dict(pooled: Tensor, features: Tensor) -> dict[str, Tensor]:
    return {"pooled": pooled, "features": features}


def as_tuple(pooled: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    return pooled, features


class Two(nn.Module):
    """Returns two values in a container."""

    def __init__(self, container: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.second = nn.Linear(2, 2)
        self.container = container

    def forward(self, x: Tensor) -> Any:
        return self.container(self.first(x), self.second(x))


class TakesTwo(nn.Module):
    """Reads the second value of a container that its child returned."""

    def __init__(self, container: Callable[[Tensor, Tensor], Any], entry: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.two = Two(container)
        self.head = nn.Linear(2, 2)
        self.entry = entry

    def forward(self, x: Tensor) -> Any:
        return self.head(self.entry(self.two(x)))


@pytest.mark.parametrize(
    ("container", "entry"),
    [
        (as_tuple, lambda two: two[1]),
        (as_dict, lambda two: two["features"]),
        (Records, lambda two: two.features),
        (Records, lambda two: two[1]),
        (Fields, lambda two: two.features),
    ],
)
def test_values_are_followed_through_containers(container: Any, entry: Any) -> None:
    program = trace_program(TakesTwo(container, entry))
    assert program.untraceable == {}
    head = program.operations[-1]
    assert (head.path, [value.path for value in head.inputs]) == ("head", ["two.second"])


def test_a_module_that_is_called_twice_is_followed_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twig = Twig()

        def forward(self, x: Tensor) -> Any:
            return self.twig(self.twig(x))

    program = trace_program(Twice())
    assert [operation.path for operation in program.operations if operation.kind == "module"] == ["twig.layer"] * 2
    assert len(program.traces) == 2
    assert program.operations[-2].inputs == [program.operations[-3]]


def test_a_loop_over_a_module_list_is_followed() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    assert names_of(trace_program(Loop()))[1:] == ["layers.0", "layers.1", "layers.2"]


def test_shapes_are_no_tensors_but_other_attributes_are() -> None:
    def run(self: Parent, x: Tensor) -> Any:
        return self.layer(x.mT.reshape(x.shape[0] * x.size(1), 2))

    program = trace_program(Parent(run))
    scalars = {operation.name for operation in program.operations if operation.is_scalar}
    assert scalars == {"getattr_1", "getitem", "size", "mul"}


def test_both_modes_are_traced() -> None:
    class Dropping(Twig):
        def forward(self, x: Tensor) -> Any:
            x = F.dropout(x, 0.5, self.training)
            return self.layer(x) if self.training else super().forward(x)

    trace = trace_module(Dropping(), ONE_VALUE)
    assert [node.name for node in trace.training.nodes] == ["x", "dropout", "layer", "output"]
    assert [node.name for node in trace.evaluation.nodes] == ["x", "dropout", "layer", "relu", "output"]
    dropouts = [
        next(node for node in graph.nodes if node.name == "dropout") for graph in (trace.training, trace.evaluation)
    ]
    assert [node.kwargs["training"] for node in dropouts] == [True, False]
