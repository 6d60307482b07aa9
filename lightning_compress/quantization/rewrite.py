"""Rewritten forwards: a module's own graph with rounding put in, set on the instance.

The class, the children, the hooks, the attributes and the state-dict keys of a module stay as they are; only the
instance's ``forward`` is replaced, by an importable callable, so that deep copies and pickles carry it along.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx, nn

from lightning_compress.graph import (
    CallKey,
    StandIn,
    Trace,
    call_arguments,
    call_key,
    forward_on,
    forward_signature,
    has_own_forward,
    is_operator,
    is_shaped,
    passed_parameters,
    shaped_key,
)
from lightning_compress.quantization.coefficients import CoefficientQuantizer
from lightning_compress.quantization.dct import DCT
from lightning_compress.quantization.layers import (
    FoldedNormForward,
    QuantizedCall,
    QuantizedLayerForward,
    RoundedWeight,
    ScaledNormForward,
)
from lightning_compress.quantization.placement import Place, Placement, WeightKey
from lightning_compress.quantization.rewritten_graph import Edits, RewrittenGraph
from lightning_compress.quantization.roles import TRANSPOSED_FUNCTIONS
from lightning_compress.quantization.sites import AttentionSites, QuantizerSite
from lightning_compress.quantization.weights import WeightQuantizer
from lightning_compress.selection import TRANSPOSED_LAYERS

if TYPE_CHECKING:
    from lightning_compress.quantization.state import Quantization

MAX_CALL_KEYS = 8
"""Ways of calling one module that are rewritten; past that a module runs as it was written."""


class RewrittenForward(StandIn):
    """The forward of a composite module with rounding put in; one variant for each way it is called.

    Args:
        owner: The module whose forward this is.
        state: The state of the whole model.
        path: Name of the module in the model.
    """

    def __init__(self, owner: nn.Module, state: Quantization, path: str) -> None:
        super().__init__(owner)
        self.state = state
        self.path = path
        self.signature = forward_signature(owner)
        self.variants: dict[CallKey, RewrittenGraph] = {}
        self.positional: tuple[int, RewrittenGraph] | None = None
        self.needs_shapes = False
        self.asked: set[CallKey] = set()

    @property
    def __signature__(self) -> inspect.Signature:
        """The signature of the original forward."""
        return self.signature

    def add(self, key: CallKey, variant: RewrittenGraph) -> None:
        """Add the variant for calls that match ``key``."""
        self.variants[key] = variant
        if is_shaped(key):
            self.needs_shapes = True
            return
        names = passed_parameters(key)
        variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        parameters = [parameter for parameter in self.signature.parameters.values() if parameter.kind not in variable]
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
            return self._run(self.positional[1], args, args, kwargs)
        key = call_key(self.signature, args, kwargs)
        arguments = call_arguments(self.signature, args, kwargs)
        if key is not None and arguments is not None and self.needs_shapes and key not in self.variants:
            key = shaped_key(key, arguments)
        if key is None or arguments is None or not self._knows(key):
            return type(self.owner).forward(self.owner, *args, **kwargs)
        return self._run(self.variants[key], [arguments[name] for name in passed_parameters(key)], args, kwargs)

    def _run(self, variant: RewrittenGraph, values: Sequence[Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
        is_rewritten = variant.fits(values)
        if is_rewritten and (variant.is_exact or self.state.is_quantizing):
            return variant(self.owner, values)
        if is_rewritten:
            variant.observe(self.owner, values)
        return type(self.owner).forward(self.owner, *args, **kwargs)

    def _knows(self, key: CallKey) -> bool:
        if key in self.variants:
            return True
        if not self.needs_shapes:
            if len(self.variants) < MAX_CALL_KEYS:
                self.state.add_call(self.path, key)
        elif is_shaped(key) and key not in self.asked and len(self.asked) < MAX_CALL_KEYS:
            self.asked.add(key)
            self.state.note_call(self.path, key)
        return key in self.variants


def rewrite(model: nn.Module, traces: Sequence[Trace], placement: Placement, state: Quantization) -> None:
    """Set rewritten forwards on every module that holds a place, and on every layer with rounded weights.

    Args:
        model: The model the traces were made of.
        traces: Its traces.
        placement: Where it is quantized.
        state: The state of the whole model; its ranges and weights get an entry for each quantizer.
    """
    _Rewriter(model, placement, state).run(traces)


class _Rewriter:
    """Sets the forwards of one model."""

    def __init__(self, model: nn.Module, placement: Placement, state: Quantization) -> None:
        self.model = model
        self.placement = placement
        self.state = state

    def run(self, traces: Sequence[Trace]) -> None:
        constants = {place.quantizer for place in self.placement.nodes.values() if place.is_constant}
        for name, bits in self.placement.bits.items():
            method = "minmax" if name in constants else self.state.scheme.method(bits)
            self.state.ranges.add(name, bits, method)
        layers = [module for module in self.model.modules() if id(module) in self.placement.weights]
        for layer in layers:
            self._add_weight(id(layer), isinstance(layer, TRANSPOSED_LAYERS))
        for path in self.state.untraceable:
            module = self.model.get_submodule(path)
            if not is_operator(module) and not has_own_forward(module):
                self._ask_for_shapes(module, path)
        for trace in traces:
            self._rewrite_module(trace)
        for layer in layers:
            self._rewrite_layer(layer)
        for module in self.model.modules():
            if id(module) in self.placement.folded:
                FoldedNormForward(module, self.state).put_on()
            elif id(module) in self.placement.norms:
                index = self._index(self.placement.norms[id(module)])
                ScaledNormForward(module, self.state, index).put_on()

    def _rewrite_module(self, trace: Trace) -> None:
        nodes, calls = self.placement.nodes, dict[fx.Node, Callable[..., Any]]()
        sites = {
            node: (nodes[node], self.state.ranges.names.index(nodes[node].quantizer))
            for node in trace.evaluation.nodes
            if node in nodes
        }
        for node in trace.evaluation.nodes:
            if node in self.placement.weights:
                assert callable(node.target)
                self._add_weight(node, node.target in TRANSPOSED_FUNCTIONS)
                calls[node] = QuantizedCall(node.target, self.state, self._weight(node))
            elif node in self.placement.attentions:
                spots = self.placement.attentions[node]
                calls[node] = AttentionSites(self.state, {name: self._site(spot) for name, spot in spots.items()})
        forward = forward_on(trace.module)
        if not isinstance(forward, RewrittenForward):
            forward = RewrittenForward(trace.module, self.state, trace.path)
            forward.put_on()
        forward.add(trace.key, RewrittenGraph(trace, Edits(sites, calls), self.state))

    def _ask_for_shapes(self, module: nn.Module, path: str) -> None:
        """Let a module without a graph tell the shapes it is called with: with them it may have one."""
        forward = forward_on(module)
        if not isinstance(forward, RewrittenForward):
            forward = RewrittenForward(module, self.state, path)
            forward.put_on()
        forward.needs_shapes = True
        forward.variants.clear()

    def _rewrite_layer(self, layer: nn.Module) -> None:
        before = self.placement.layer_inputs.get(id(layer))
        after = self.placement.layer_outputs.get(id(layer))
        forward = QuantizedLayerForward(
            layer,
            self.state,
            self._weight(id(layer)),
            None if before is None else self._site(before),
            None if after is None else self._site(after),
        )
        forward.put_on()

    def _add_weight(self, key: WeightKey, is_transposed: bool) -> None:
        place = self.placement.weights[key]
        method = self.state.scheme.method(place.bits)
        quantizer = WeightQuantizer(place.bits, 1 if is_transposed else 0, method)
        scheme = self.state.scheme
        if isinstance(scheme.weight_transform, DCT) and place.bits > 1:
            quantizer.coefficients = CoefficientQuantizer(place.bits, scheme.weight_transform)
            quantizer.integer_bits = 7 if scheme.reduce_range else 8
        self.state.weights.setdefault(place.name, quantizer)

    def _weight(self, key: WeightKey) -> RoundedWeight:
        place = self.placement.weights[key]
        return RoundedWeight(self.state, place.name, place.norm, self._index(place.grid))

    def _index(self, quantizer: str | None) -> int | None:
        return self.state.ranges.names.index(quantizer) if quantizer else None

    def _site(self, place: Place) -> QuantizerSite:
        # Out of place: untraced code may overwrite what it gets, and an in-place rounding needs its result for
        # backward.
        return QuantizerSite(self.state, self.state.ranges.names.index(place.quantizer), place.clamp, in_place=False)


def _are_tensors(values: tuple[Any, ...]) -> bool:
    return all(isinstance(value, Tensor) for value in values)
