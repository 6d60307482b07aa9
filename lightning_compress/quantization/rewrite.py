"""Rewritten forwards: a module's own graph with rounding put in, set on the instance.

The class, the children, the hooks, the attributes and the state-dict keys of a module stay as they are; only the
instance's ``forward`` is replaced, by an importable callable, so that deep copies and pickles carry it along.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import operator
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from lightning_compress.graph import (
    CallKey,
    Trace,
    call_key,
    forward_signature,
    is_in_place,
    is_operator,
    memory_of,
    passed_parameters,
)
from lightning_compress.quantization.affine import (
    NO_CLAMP,
    fake_quantize,
    fake_quantize_,
    fake_quantize_weight,
    weight_scales,
)
from lightning_compress.quantization.batchnorm import INT32_LIMIT, norm_factor_and_offset
from lightning_compress.quantization.placement import NORMS, QUANTIZABLE_LAYERS, Place, Placement

if TYPE_CHECKING:
    from lightning_compress.quantization.state import Quantization

MAX_CALL_KEYS = 8
"""Ways of calling one module that are rewritten; past that a module runs as it was written."""


class QuantizerSite:
    """One place in a forward where a value is rounded.

    Args:
        state: The state of the whole model.
        index: Index of the quantizer among the state's ranges.
        clamp: Bounds of the activation that the rounding takes over.
        in_place: Whether the value's own memory may be overwritten.
        producer: The layer whose result the value is, if any: forward hooks on it may have kept it.
        activation: The module that the rounding takes over, if any: it is called where hooks wait for it.
    """

    def __init__(
        self,
        state: Quantization,
        index: int,
        clamp: tuple[float, float],
        in_place: bool,
        producer: nn.Module | None = None,
        activation: nn.Module | None = None,
    ) -> None:
        self.state = state
        self.index = index
        self.clamp = clamp
        self.in_place = in_place
        self.producer = producer
        self.activation = activation

    def __call__(self, x: Any) -> Any:
        """Round ``x``, or only watch it before quantization starts; what is no floating-point tensor passes through."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        state = self.state
        if self.activation is not None and _has_hooks(self.activation):
            x = self.activation(x)
        if state.is_observing:
            self._observe(x)
        if not state.is_quantizing:
            return x.clamp(*self.clamp) if self.clamp != NO_CLAMP else x
        if torch.compiler.is_compiling() or x.device.type != "cpu":
            rounded = self._round_with_tensors(x)
        else:
            rounded = self._round(x)
        if state.recorded is not None:
            state.recorded.append((state.ranges.names[self.index], rounded.detach()))
        return rounded

    def _observe(self, x: Tensor) -> None:
        minimum, maximum = torch.aminmax(x.detach())
        self.state.ranges.observe(self.index, minimum.clamp(*self.clamp), maximum.clamp(*self.clamp))

    def _round(self, x: Tensor) -> Tensor:
        ranges = self.state.ranges
        grid = ranges.grid(self.index)
        if grid is None:
            if not self.state.is_observing:
                return x.clamp(*self.clamp) if self.clamp != NO_CLAMP else x
            minimum, maximum = torch.aminmax(x.detach())
            grid = ranges.start_from(self.index, minimum.clamp(*self.clamp), maximum.clamp(*self.clamp))
        # Reading the gradient's mask off the result is only fair where few values lie on a bound: at 8 bits.
        if self._may_overwrite(x) and grid.bits == 8:
            return fake_quantize_(x, grid, self.clamp)
        return fake_quantize(x, grid, self.clamp)

    def _may_overwrite(self, x: Tensor) -> bool:
        is_kept = any(module is not None and _has_hooks(module) for module in (self.producer, self.activation))
        return self.in_place and not is_kept and x.dtype == torch.float32 and not (x.is_leaf and x.requires_grad)

    def _round_with_tensors(self, x: Tensor) -> Tensor:
        ranges = self.state.ranges
        if not ranges.is_seen(self.index) and not self.state.is_observing:
            return x.clamp(*self.clamp) if self.clamp != NO_CLAMP else x
        clamped = x.clamp(*self.clamp) if self.clamp != NO_CLAMP else x
        if not ranges.is_seen(self.index):
            minimum, maximum = torch.aminmax(clamped.detach())
            ranges.start_from(self.index, minimum, maximum)
            grid = ranges.grid(self.index)
            return clamped if grid is None else fake_quantize(clamped, grid)
        scale, zero_point = ranges.parameters(self.index)
        largest = 2 ** ranges.bits[self.index] - 1
        rounded = torch.fake_quantize_per_tensor_affine(
            clamped.float(), scale.to(x.device), zero_point.to(x.device), 0, largest
        )
        return rounded.to(x.dtype)


class RewrittenForward:
    """The forward of a composite module with rounding put in; one variant for each way it is called.

    Args:
        owner: The module whose forward this is.
        state: The state of the whole model.
        path: Name of the module in the model.
    """

    def __init__(self, owner: nn.Module, state: Quantization, path: str) -> None:
        self.owner = owner
        self.state = state
        self.path = path
        self.signature = forward_signature(owner)
        self.variants: dict[CallKey, RewrittenGraph] = {}
        self.positional: tuple[int, RewrittenGraph] | None = None

    @property
    def __signature__(self) -> inspect.Signature:
        """The signature of the original forward."""
        return self.signature

    def add(self, key: CallKey, variant: RewrittenGraph) -> None:
        """Add the variant for calls that match ``key``."""
        self.variants[key] = variant
        names = passed_parameters(key)
        parameters = list(self.signature.parameters.values())
        leading = [parameter.name for parameter in parameters[: len(names)]]
        if leading == names and all(
            parameter.default == dict(key)[parameter.name] for parameter in parameters[len(names) :]
        ):
            self.positional = (len(names), variant)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the rewritten forward, or the original one while the model neither observes nor quantizes."""
        state = self.state
        if not (state.is_quantizing or state.is_observing):
            return type(self.owner).forward(self.owner, *args, **kwargs)
        if self.positional is not None and not kwargs and len(args) == self.positional[0] and _are_tensors(args):
            return self.positional[1](self.owner, args)
        key = call_key(self.signature, args, kwargs)
        if key is None or not self._knows(key):
            return type(self.owner).forward(self.owner, *args, **kwargs)
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return self.variants[key](self.owner, [bound.arguments[name] for name in passed_parameters(key)])

    def _knows(self, key: CallKey) -> bool:
        if key not in self.variants and len(self.variants) < MAX_CALL_KEYS:
            self.state.add_call(self.path, key)
        return key in self.variants


class RewrittenGraph:
    """The train-mode and eval-mode code of one forward, with the places where it rounds as attributes.

    Args:
        trace: The traced forward.
        sites: The place after each node of the eval graph whose value is rounded.
    """

    def __init__(self, trace: Trace, sites: dict[fx.Node, tuple[Place, int]], state: Quantization) -> None:
        self.places: list[QuantizerSite] = []
        evaluation = _with_sites(trace.evaluation, trace.module, sites, state, self.places)
        training_sites = {
            training_node: sites[node]
            for training_node, node in _aligned(trace.training, trace.evaluation).items()
            if node in sites
        }
        training = _with_sites(trace.training, trace.module, training_sites, state, self.places)
        self._sources = (_Source(training), _Source(evaluation))

    def __call__(self, owner: nn.Module, values: Any) -> Any:
        """Run the code that fits the mode of ``owner``."""
        return self._sources[0 if owner.training else 1].function(owner, self.places, *values)


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


class QuantizedLayerForward:
    """The forward of a convolution or linear layer on rounded weights.

    Where a batch norm follows and computes with its running statistics, the layer takes it over, so that what is
    evaluated, and trained once the statistics are frozen, is the layer that ships: one layer with an integer bias.

    Args:
        owner: The layer.
        state: The state of the whole model.
        norm: The batch norm that folds into it, or None.
        input_index: Index of the one quantizer whose grid its input lies on, or None.
        before: Place at its input; for layers that untraced code calls.
        after: Place at its output; likewise.
    """

    def __init__(
        self,
        owner: nn.Module,
        state: Quantization,
        norm: nn.Module | None = None,
        input_index: int | None = None,
        before: QuantizerSite | None = None,
        after: QuantizerSite | None = None,
    ) -> None:
        self.owner = owner
        self.state = state
        self.norm = norm
        self.input_index = input_index
        self.before = before
        self.after = after

    def __call__(self, input: Tensor) -> Tensor:
        """Run the layer; with its own weights until quantization starts."""
        state = self.state
        if not (state.is_quantizing or state.is_observing):
            return type(self.owner).forward(self.owner, input)  # type: ignore[no-any-return]
        x: Tensor = self.before(input) if self.before is not None else input
        weight, bias = self._parameters()
        result = layer_result(self.owner, x, weight, bias)
        return self.after(result) if self.after is not None else result

    def _parameters(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.owner.weight, self.owner.bias
        assert isinstance(weight, Tensor)
        assert bias is None or isinstance(bias, Tensor)
        bits = self.state.weight_bits
        if not self.state.is_quantizing:
            return weight, bias
        rounded = fake_quantize_weight(weight, bits)
        folds = self.norm is not None and not self.norm.training
        if not folds and bias is None:
            return rounded, None
        scales = weight_scales(weight, bits)
        if self.norm is not None and folds:
            factor, offset = norm_factor_and_offset(self.norm)
            rounded = rounded * factor.to(rounded.dtype).view(-1, *[1] * (weight.dim() - 1))
            scales = scales * factor.detach().abs()
            bias = offset if bias is None else offset + bias * factor
            return rounded, self._rounded_bias(bias, scales).to(rounded.dtype)
        # A batch norm that still learns its statistics takes up the bias and its rounding; only a last bias shows.
        return rounded, bias if self.norm is not None else self._rounded_bias(bias, scales)

    def _rounded_bias(self, bias: Tensor, scales: Tensor) -> Tensor:
        """Round ``bias`` to the 32-bit integers that ship; the gradient passes (straight-through)."""
        if self.input_index is None or not self.state.ranges.is_seen(self.input_index):
            return bias
        step = scales * self.state.ranges.parameters(self.input_index)[0].to(scales.device)
        fits = bias.detach().abs() < step * (INT32_LIMIT // 2)
        rounded = torch.where(fits, (bias.detach() / step).round() * step, bias.detach())
        return bias + (rounded - bias.detach())


class FoldedNormForward:
    """The forward of a batch norm that folds: nothing, where the layer before it has taken it over.

    Args:
        owner: The batch norm.
        state: The state of the whole model.
    """

    def __init__(self, owner: nn.Module, state: Quantization) -> None:
        self.owner = owner
        self.state = state

    def __call__(self, input: Tensor) -> Tensor:
        """Run the norm, or pass ``input`` through."""
        if self.state.is_quantizing and not self.owner.training:
            return input
        return type(self.owner).forward(self.owner, input)  # type: ignore[no-any-return]


def layer_result(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Run a convolution or linear layer on other weights than its own.

    Args:
        layer: One of `QUANTIZABLE_LAYERS`.
        x: Its input.
        weight: Weight shaped like the layer's.
        bias: Bias shaped like the layer's, or None.

    Returns:
        What the layer gives with these weights.

    Example:
        >>> layer_result(nn.Linear(2, 1), torch.ones(1, 2), torch.tensor([[1.0, 2.0]]), None)
        tensor([[3.]])
    """
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(x, weight, bias)
    return layer._conv_forward(x, weight, bias)  # type: ignore[operator, no-any-return]


def rewrite(model: nn.Module, traces: list[Trace], placement: Placement, state: Quantization) -> None:
    """Set rewritten forwards on every module that holds a place, and on every layer with rounded weights.

    Args:
        model: The model the traces were made of.
        traces: Its traces.
        placement: Where it is quantized.
        state: The state of the whole model; its ranges get an entry for each quantizer.
    """
    for name, bits in placement.bits.items():
        state.ranges.add(name, bits)
    for trace in traces:
        sites = {
            node: (placement.nodes[node], state.ranges.names.index(placement.nodes[node].quantizer))
            for node in trace.evaluation.nodes
            if node in placement.nodes
        }
        forward = vars(trace.module).get("forward")
        if not isinstance(forward, RewrittenForward):
            forward = RewrittenForward(trace.module, state, trace.path)
            _set_forward(trace.module, forward)
        forward.add(trace.key, RewrittenGraph(trace, sites, state))
    for module in model.modules():
        if id(module) not in placement.weighted:
            continue
        norm = placement.folds.get(id(module))
        input_name = placement.layer_grids.get(id(module))
        layer_forward = QuantizedLayerForward(
            module,
            state,
            norm,
            None if input_name is None else state.ranges.names.index(input_name),
            _layer_site(placement.layer_inputs.get(id(module)), state),
            _layer_site(placement.layer_outputs.get(id(module)), state),
        )
        _set_forward(module, layer_forward)
        if norm is not None:
            _set_forward(norm, FoldedNormForward(norm, state))


def _set_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    vars(module)["forward"] = forward


def _layer_site(place: Place | None, state: Quantization) -> QuantizerSite | None:
    if place is None:
        return None
    # Out of place: untraced code may overwrite what it gets, and an in-place rounding needs its result for backward.
    return QuantizerSite(state, state.ranges.names.index(place.quantizer), place.clamp, in_place=False)


def _are_tensors(values: tuple[Any, ...]) -> bool:
    return all(isinstance(value, Tensor) for value in values)


def round_at(places: list[QuantizerSite], index: int, x: Any) -> Any:
    """Round ``x`` at one of ``places``; the rewritten code calls this.

    Args:
        places: The places of one forward.
        index: Which of them.
        x: The value.

    Returns:
        The rounded value.

    Example:
        >>> round_at([lambda x: x.round()], 0, torch.tensor(1.2))
        tensor(1.)
    """
    return places[index](x)


def _with_sites(
    graph: fx.Graph,
    module: nn.Module,
    sites: dict[fx.Node, tuple[Place, int]],
    state: Quantization,
    places: list[QuantizerSite],
) -> fx.Graph:
    """Copy ``graph`` with a call of a place after each node in ``sites``, or instead of it where it takes it over."""
    copy = fx.Graph()
    places_argument = copy.placeholder("places")
    copies: dict[fx.Node, fx.Node] = {}
    result = copy.graph_copy(graph, copies)
    copy.output(result)
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
    for node, (place, index) in sites.items():
        takes_over = _is_taken_over(node, sites)
        value = node.all_input_nodes[0] if takes_over else node
        in_place = _owns_memory(value, module) and not place.escapes and node not in overwritten
        if takes_over:
            in_place = in_place and len(value.users) == 1 and value not in sites
        copied = copies[node]
        with copy.inserting_after(copied):
            call = copy.call_function(round_at)
        copied.replace_all_uses_with(call)
        call.args = (places_argument, len(places), copied.all_input_nodes[0] if takes_over else copied)
        if takes_over:
            copy.erase_node(copied)
        producer = module.get_submodule(str(value.target)) if value.op == "call_module" else None
        takes_over_module = takes_over and node.op == "call_module"
        activation = module.get_submodule(str(node.target)) if takes_over_module else None
        places.append(QuantizerSite(state, index, place.clamp, in_place, producer, activation))
    return copy


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _is_taken_over(node: fx.Node, sites: dict[fx.Node, tuple[Place, int]]) -> bool:
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
