"""Rewritten graphs: the code of one forward with its roundings put in."""

from __future__ import annotations

import difflib
import importlib
import itertools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from lightning_compress.graph import Trace, is_in_place, is_operator, memory_of
from lightning_compress.quantization.affine import NO_CLAMP
from lightning_compress.quantization.placement import Place
from lightning_compress.quantization.roles import NORMS, QUANTIZABLE_LAYERS
from lightning_compress.quantization.sites import QuantizerSite

if TYPE_CHECKING:
    from lightning_compress.quantization.state import Quantization


@dataclass(frozen=True)
class Edits:
    """What is put into the graph of a forward.

    Attributes:
        sites: The place, and the index of its quantizer, after each node of the eval graph whose value is rounded.
        calls: What is called in place of a function, by node of the eval graph.
    """

    sites: Mapping[fx.Node, tuple[Place, int]]
    calls: Mapping[fx.Node, Callable[..., Any]]


class RewrittenGraph:
    """The train-mode and eval-mode code of one forward, with the places where it rounds as attributes.

    Args:
        trace: The traced forward.
        edits: What is put into it.
        state: The state of the whole model.

    Attributes:
        is_exact: Whether it gives the module's own bits while nothing is rounded.
        fits: Tells whether it stands for a call with these values.
    """

    def __init__(self, trace: Trace, edits: Edits, state: Quantization) -> None:
        self.is_exact = trace.is_exact
        self.fits = trace.fits
        self.places: list[Callable[..., Any]] = []
        evaluation = _edited(trace.evaluation, trace.module, edits, state, self.places)
        aligned = _aligned(trace.training, trace.evaluation).items()
        training_edits = Edits(
            {training_node: edits.sites[node] for training_node, node in aligned if node in edits.sites},
            {training_node: edits.calls[node] for training_node, node in aligned if node in edits.calls},
        )
        training = _edited(trace.training, trace.module, training_edits, state, self.places)
        self._sources = (_Source(training), _Source(evaluation))

    def __call__(self, owner: nn.Module, values: Any) -> Any:
        """Run the code that fits the mode of ``owner``."""
        return self._sources[0 if owner.training else 1].function(owner, self.places, *values)

    def observe(self, owner: nn.Module, values: Any) -> None:
        """Run the eval code for the sake of the ranges alone."""
        with torch.no_grad():
            self._sources[1].function(owner, self.places, *values)


class _Source:
    """Generated code that pickles as text, with the importable objects it names."""

    def __init__(self, graph: fx.Graph) -> None:
        code = graph.python_code("self")
        self.text = code.src
        self.globals = dict(code.globals)
        self.function = self._compiled()

    def _compiled(self) -> Callable[..., Any]:
        namespace = dict(self.globals)
        exec(compile(self.text, "<rewritten forward>", "exec"), namespace)
        function: Callable[..., Any] = namespace["forward"]
        return function

    def __getstate__(self) -> dict[str, Any]:
        modules = {name: item.__name__ for name, item in self.globals.items() if isinstance(item, ModuleType)}
        objects = {name: item for name, item in self.globals.items() if name not in modules}
        return {"text": self.text, "objects": objects, "modules": modules}

    def __setstate__(self, state: dict[str, Any]) -> None:
        modules = {name: importlib.import_module(module) for name, module in state["modules"].items()}
        self.text, self.globals = state["text"], {**state["objects"], **modules}
        self.function = self._compiled()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Source:
        return self  # code and importable objects only: nothing of it belongs to one copy


def call_at(places: list[Callable[..., Any]], index: int, *args: Any, **kwargs: Any) -> Any:
    """Call one of ``places``; the rewritten code rounds with it.

    Args:
        places: The places of one forward.
        index: Which of them.
        args: What it takes: the value to round, or the arguments of the function it stands for.
        kwargs: Keyword arguments of that function.

    Returns:
        The rounded value.

    Example:
        >>> call_at([lambda x: x.round()], 0, torch.tensor(1.2))
        tensor(1.)
    """
    return places[index](*args, **kwargs)


def _edited(
    graph: fx.Graph,
    module: nn.Module,
    edits: Edits,
    state: Quantization,
    places: list[Callable[..., Any]],
) -> fx.Graph:
    """Copy ``graph`` with a call of a place after each site, or instead of its node where it takes it over."""
    sites = edits.sites
    copy = fx.Graph()
    places_argument = copy.placeholder("places")
    copies: dict[fx.Node, fx.Node] = {}
    result = copy.graph_copy(graph, copies)
    copy.output(result)
    _keep_self_free_(copy)
    # What a later operation overwrites: an in-place rounding needs its result for backward, so it must not lie there.
    overwritten: set[fx.Node] = set()
    for node in graph.nodes:
        if not _is_taken_over(node, sites) and is_in_place(node, module) and isinstance(node.args[0], fx.Node):
            memory = memory_of(node.args[0], module, sites)
            overwritten.add(memory)
            if memory.op == "placeholder" or _is_composite(memory, module):
                with copy.inserting_before(copies[node]):
                    own = copy.call_method("clone", (copies[node.args[0]],))
                copies[node].args = (own, *copies[node].args[1:])
    for node, replacement in edits.calls.items():
        copies[node].target = call_at
        copies[node].args = (places_argument, len(places), *copies[node].args)
        places.append(replacement)
    for node, (place, index) in sites.items():
        takes_over = _is_taken_over(node, sites)
        value = node.all_input_nodes[0] if takes_over else node
        in_place = _owns_memory(value, module) and not place.escapes and node not in overwritten
        if takes_over:
            in_place = in_place and len(value.users) == 1 and value not in sites
        copied = copies[node]
        with copy.inserting_after(copied):
            call = copy.call_function(call_at)
        copied.replace_all_uses_with(call)
        call.args = (places_argument, len(places), copied.all_input_nodes[0] if takes_over else copied)
        if takes_over:
            copy.erase_node(copied)
        producer = module.get_submodule(str(value.target)) if value.op == "call_module" else None
        takes_over_module = takes_over and node.op == "call_module"
        activation = module.get_submodule(str(node.target)) if takes_over_module else None
        places.append(QuantizerSite(state, index, place.clamp, in_place, producer, activation, place.is_constant))
    return copy


def _keep_self_free_(graph: fx.Graph) -> None:
    """Rename what is called ``self``, the result of a child of that name: in the code it would hide the module."""
    taken = {node.name for node in graph.nodes}
    for node in graph.nodes:
        if node.name == "self":
            node.name = next(name for name in map("self_{}".format, itertools.count(1)) if name not in taken)


def _is_taken_over(node: fx.Node, sites: Mapping[fx.Node, tuple[Place, int]]) -> bool:
    return node in sites and sites[node][0].clamp != NO_CLAMP


def _is_composite(node: fx.Node, module: nn.Module) -> bool:
    return node.op == "call_module" and not is_operator(module.get_submodule(str(node.target)))


def _owns_memory(node: fx.Node, module: nn.Module) -> bool:
    """Tell whether the value of ``node`` may be overwritten: no backward pass of its producer needs it."""
    if node.op == "call_module":
        return isinstance(module.get_submodule(str(node.target)), (*QUANTIZABLE_LAYERS, *NORMS))
    return node.op == "call_function" and node.target in (torch.add, operator.add)


def _aligned(training: fx.Graph, evaluation: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Match the nodes of the train graph to those of the eval graph: the longest runs of equal operations."""
    first, second = list(training.nodes), list(evaluation.nodes)
    matcher = difflib.SequenceMatcher(
        None, [(node.op, str(node.target)) for node in first], [(node.op, str(node.target)) for node in second], False
    )
    return {
        first[block.a + offset]: second[block.b + offset]
        for block in matcher.get_matching_blocks()
        for offset in range(block.size)
    }
