"""The quantization of one model: its settings, its phase, its ranges."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.errors import CompressionError
from lightning_compress.graph import (
    CallKey,
    Program,
    forward_on,
    has_own_forward,
    in_float32,
    is_shaped,
    take_off,
    trace_program,
    uncover,
)
from lightning_compress.processes import n_processes, union
from lightning_compress.quantization import step_sizes
from lightning_compress.quantization.binary import LARGEST_LATENT
from lightning_compress.quantization.layers import QuantizedLayerForward
from lightning_compress.quantization.placement import Placement, PlacementRow, place
from lightning_compress.quantization.ranges import ActivationRanges
from lightning_compress.quantization.rewrite import MAX_CALL_KEYS, RewrittenForward, rewrite
from lightning_compress.quantization.roles import QUANTIZABLE_LAYERS
from lightning_compress.quantization.scheme import Scheme
from lightning_compress.quantization.step_sizes import StepSizes
from lightning_compress.quantization.weights import WeightQuantizer
from lightning_compress.settings import check_same_settings

WEIGHT_PREFIX, ACTIVATION_PREFIX = "weight of ", "activation at "
"""What the names of step sizes begin with."""


class Quantization:
    """Quantization of one model; made by `prepare`, found again by `quantization_of`.

    Args:
        model: The model whose forwards are rewritten.
        scheme: Bits, and what stays in float.
        momentum: Weight of the newest observation in the moving average of the ranges.

    Attributes:
        is_quantizing: Whether weights and activations are rounded.
        is_observing: Whether ranges are observed.
        is_learning: Whether step sizes are learned.
        ranges: The range of every quantizer.
        weights: What rounds each weight, by the name of its layer.
        steps: The learned step sizes.
        rows: What becomes of every operation.
        shapeless: Modules that are called with too many shapes for graphs of their own.
        recorded: A list that takes the name and value of everything that is rounded, or None.
    """

    def __init__(self, model: nn.Module, scheme: Scheme, *, momentum: float = 0.1) -> None:
        self.model = model
        self.scheme = scheme
        self.is_quantizing = False
        self.is_observing = False
        self.is_learning = False
        self.ranges = ActivationRanges(momentum, scheme.symmetric)
        self.steps = StepSizes()
        self.weights: dict[str, WeightQuantizer] = {}
        self.rows: list[PlacementRow] = []
        self.untraceable: dict[str, str] = {}
        self.recorded: list[tuple[str, Tensor]] | None = None
        self.shapeless: set[str] = set()
        self._calls: list[tuple[str, CallKey]] = []
        self._noted: list[tuple[str, CallKey]] = []
        self._used: set[str] = set()
        self._modules: set[int] = set()
        self._borrowed: set[int] = set()
        self.ranges.after_update = self._take_in_calls
        self._rewrite()

    def analyse(self, *, in_float: bool = False) -> tuple[Program, Placement]:
        """Trace the model as it stands and place its quantizers; the same settings always give the same places.

        Args:
            in_float: Whether it is to be called in float32, whatever the precision it was called in so far.
        """
        calls = [(path, in_float32(key)) for path, key in self._calls] if in_float else self._calls
        phases = self.is_quantizing, self.is_observing
        self.is_quantizing = self.is_observing = False  # tracing may run modules, on tensors without data
        try:
            program = trace_program(self.model, list(dict.fromkeys(calls)))
        finally:
            self.is_quantizing, self.is_observing = phases
        layers = [name for name, module in self.model.named_modules() if isinstance(module, QUANTIZABLE_LAYERS)]
        return program, place(program, self.scheme, layers)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def add_call(self, path: str, key: CallKey) -> None:
        """Take in one more way in which the module at ``path`` is called."""
        if n_processes() > 1:
            self._note(path, key)
        elif (path, key) not in self._calls:
            self._calls.append((path, key))
            self._rewrite()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def note_call(self, path: str, key: CallKey) -> None:
        """Take in the shapes that the module at ``path`` is called with: after this step, or now if none is observed.

        A module that is called with more than `MAX_CALL_KEYS` of them is given up: its layers are rounded one by one.
        """
        if self.is_observing or n_processes() > 1:
            self._note(path, key)
        elif path not in self.shapeless and self._n_shapes(path) + 1 < MAX_CALL_KEYS:
            self.add_call(path, key)

    def _note(self, path: str, key: CallKey) -> None:
        if (path, key) not in self._noted:
            self._noted.append((path, key))

    def _take_in_calls(self) -> None:
        """Take in what was noted since the last observation, in every process what any of them has noted."""
        noted, self._noted, is_stale = union(self._noted), [], False
        for path, key in noted:
            if path in self.shapeless or (path, key) in self._calls:
                continue
            is_stale = True
            if is_shaped(key) and self._n_shapes(path) + 1 >= MAX_CALL_KEYS:
                self.shapeless.add(path)
                self._calls = [call for call in self._calls if call[0] != path or not is_shaped(call[1])]
            else:
                self._calls.append((path, key))
        if is_stale:
            self._rewrite()

    def _n_shapes(self, path: str) -> int:
        return sum(called == path and is_shaped(key) for called, key in self._calls)

    def refresh(self) -> None:
        """Look at the model again if new calls were noted, or modules put in place of those it was prepared with.

        Converting batch norms to `SyncBatchNorm` does the latter, as a Trainer does when it sets its strategy up. A
        Trainer that is handed the result of `torch.compile` also wraps the forward anew at every fit.
        """
        for module in self.model.modules():
            uncover(module)
        self._take_in_calls()
        if {id(module) for module in self.model.modules()} != self._modules:
            self._rewrite()

    def _rewrite(self) -> None:
        program, placement = self.analyse()
        self.rows = placement.rows
        self.untraceable = program.untraceable
        self._used = {*placement.bits, *(ACTIVATION_PREFIX + name for name in placement.bits)}
        self._used |= {WEIGHT_PREFIX + place.name for place in placement.weights.values()}
        self._modules = {id(module) for module in self.model.modules()}
        self._borrowed = _borrowed(program, placement)
        rewrite(self.model, list(program.traces.values()), placement, self)

    def learn(self) -> None:
        """Begin to learn the step sizes that the scheme wants learned, from where the weights and ranges are now.

        Those of activations begin as soon as their range was observed: call it again after each observation. In a
        training loop of your own, call `update_steps` after each optimizer step, and `stop_learning` before the last
        ones.
        """
        self.is_learning = True
        self.steps.requires_grad_(True)  # a fit that ended before has stopped them
        for module in self.model.modules():
            forward = forward_on(module)
            if isinstance(forward, QuantizedLayerForward):
                assert isinstance(module.weight, Tensor)
                self.learn_weight(forward.weight.name, module.weight)
        for index in self.ranges.learnable():
            name = ACTIVATION_PREFIX + self.ranges.names[index]
            self.ranges.learn(index, self.steps.add(name, self.ranges.initial_step(index)))

    def learn_weight(self, name: str, weight: Tensor) -> None:
        """Begin to learn the step sizes of one weight, if the scheme wants it and it has not begun."""
        quantizer = self.weights[name]
        if self.is_learning and quantizer.method == "learned" and quantizer.step is None:
            quantizer.step = self.steps.add(WEIGHT_PREFIX + name, quantizer.first_step(weight.detach()))

    @torch.no_grad()
    def clip_binary_(self) -> None:
        """Keep the weights behind binary ones within [-1, 1]; call it after each optimizer step."""
        if all(quantizer.bits > 1 for quantizer in self.weights.values()):
            return  # as in most runs, and at every step
        for module in self.model.modules():
            forward = forward_on(module)
            if isinstance(forward, QuantizedLayerForward) and self.weights[forward.weight.name].bits == 1:
                assert isinstance(module.weight, Tensor)
                module.weight.clamp_(-LARGEST_LATENT, LARGEST_LATENT)

    def stop_learning(self) -> None:
        """Keep the step sizes as they are."""
        self.is_learning = False
        self.steps.requires_grad_(False)

    def update_steps(self, factor: float = 1.0) -> None:
        """Move the learned step sizes down their gradients.

        Args:
            factor: What their learning rate is multiplied by.
        """
        self.steps.update(factor)
        self.ranges.renew_learned()

    def reset(self) -> None:
        """Forget what was observed and learned."""
        self.is_learning = False
        self.ranges.reset()
        self.steps.clear()
        for quantizer in self.weights.values():
            quantizer.forget()

    def begin_anew(self) -> None:
        """Compute in float, and forget all that was observed, learned and taken in since the model was prepared."""
        self.is_quantizing = self.is_observing = False
        self.reset()
        self.shapeless = set()
        self._calls, self._noted = [], []
        self._rewrite()

    @property
    def layer_bits(self) -> dict[str, int]:
        """Bits of the weights of every quantized layer, by name."""
        return {name: quantizer.bits for name, quantizer in self.weights.items() if WEIGHT_PREFIX + name in self._used}

    def unreached_layers(self) -> list[str]:
        """Return the names of the quantized layers whose input was never observed.

        One whose weight another module hands to a function is none of them: the function is quantized in its place.
        """
        forwards = {name: forward_on(module) for name, module in self.model.named_modules()}
        return [
            name
            for name, forward in forwards.items()
            if isinstance(forward, QuantizedLayerForward)
            and forward.weight.input_index is not None
            and not self.ranges.is_seen(forward.weight.input_index)
            and id(self.model.get_submodule(name).weight) not in self._borrowed
        ]

    def waiting_layers(self) -> list[str]:
        """Return the names of the layers whose own forward has a graph only for known shapes: they wait for a call."""
        layers = {name: self.model.get_submodule(name) for name in self.untraceable}
        return [
            name
            for name, layer in layers.items()
            if isinstance(layer, QUANTIZABLE_LAYERS) and not has_own_forward(layer)
        ]

    def recurrent_layers(self) -> list[str]:
        """Return the names of torch's recurrent layers and cells: they have no integer form and stay in float."""
        kinds = (nn.RNNBase, nn.RNNCellBase)
        return [name for name, module in self.model.named_modules() if isinstance(module, kinds)]

    def state_dict(self) -> dict[str, Any]:
        """Return settings, phase and ranges as plain types and CPU tensors."""
        return {
            "scheme": self.scheme.as_dict(),
            "is_quantizing": self.is_quantizing,
            "calls": [[path, [list(item) for item in key]] for path, key in self._calls],
            "shapeless": sorted(self.shapeless),
            "ranges": self.ranges.state_dict(self._used),
            "steps": self.steps.state_dict(self._used),
            "coefficients": {
                name: found
                for name, one in self.weights.items()
                if WEIGHT_PREFIX + name in self._used and (found := one.coefficient_state())
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over phase and ranges of a `state_dict`.

        Raises:
            CompressionError: If it was written with other bits or for another architecture.
        """
        check_same_settings(state["scheme"], self.scheme.as_dict())
        modules = dict(self.model.named_modules())
        missing = [path for path, _ in state["calls"] if path not in modules]
        if missing:
            raise CompressionError(
                f"The checkpoint was written for another architecture: this model has no module `{missing[0]}`. "
                "Load it into the model that it was written with."
            )
        self.shapeless = set(state.get("shapeless", ()))
        self._calls = [(path, tuple((name, value) for name, value in items)) for path, items in state["calls"]]
        self._rewrite()
        self.is_quantizing = state["is_quantizing"]
        self.ranges.load_state_dict(state["ranges"])
        self.steps.load_state_dict(state["steps"])
        for quantizer in self.weights.values():
            quantizer.forget()  # what another fit has found
        for name, found in state.get("coefficients", {}).items():
            if name not in self.weights:
                raise CompressionError(
                    f"The checkpoint quantizes the weight of `{name}`, which this model does not have. "
                    "Load it into the architecture, and with the `exclude`, that it was written with."
                )
            self.weights[name].load_coefficients(found)
        for name, step in self.steps.leaves.items():
            if name.startswith(WEIGHT_PREFIX):
                self.weights[name.removeprefix(WEIGHT_PREFIX)].step = step
            else:
                place = name.removeprefix(ACTIVATION_PREFIX)
                index = self.ranges.names.index(place)
                self.ranges.learn(index, step, state["ranges"]["zero_points"][place])


def narrowed_state(state: Mapping[str, Any], kept: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Return a `Quantization.state_dict` for the same model with fewer output channels in some layers.

    Args:
        state: The state.
        kept: The output channels that stay, by layer name.

    Example:
        >>> quantization = prepare(nn.Sequential(nn.Linear(2, 3)))
        >>> narrowed_state(quantization.state_dict(), {"0": [0, 2]})["is_quantizing"]
        False
    """
    steps = step_sizes.narrowed_state(state["steps"], {WEIGHT_PREFIX + name: rows for name, rows in kept.items()})
    return {**state, "steps": steps}


def _borrowed(program: Program, placement: Placement) -> set[int]:
    """Return the identities of the parameters that quantized calls of functions read."""
    return {
        id(attrgetter(source.target)(trace.module))
        for trace in program.traces.values()
        for node in trace.evaluation.nodes
        if node in placement.weights
        for source in node.all_input_nodes
        if source.op == "get_attr"
    }


def prepare(model: nn.Module, scheme: Scheme | None = None, **settings: Any) -> Quantization:
    """Rewrite the forwards of ``model`` for quantization-aware training; until it is switched on nothing changes.

    Weights are rounded to symmetric integers per output channel, activations to affine integers per tensor, whose
    ranges are moving averages of what was observed (Jacob et al. 2018, arXiv:1712.05877; Krishnamoorthi 2018,
    arXiv:1806.08342). Classes, children, hooks and state-dict keys stay as they are.

    Args:
        model: Any module.
        scheme: How it is quantized; by default int8 everywhere.
        settings: Arguments of a `Scheme` instead, such as ``weight_bits=4``.

    Returns:
        The quantization; its ``is_observing`` and ``is_quantizing`` are the switches.

    Raises:
        ValueError: If bits are out of range, a pattern matches no layer, or there is no layer to quantize.
        CompressionError: If the model is prepared already, or a weight is NaN or infinite.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
        >>> quantization = prepare(net)
        >>> calibrate(net, [torch.rand(8, 1, 4, 4) for _ in range(4)])
        >>> quantization.is_quantizing = True
        >>> net(torch.rand(2, 1, 4, 4)).shape, sorted(net.state_dict())[:2]
        (torch.Size([2, 2]), ['0.bias', '0.weight'])
    """
    scheme = scheme or Scheme(**settings)
    if quantization_of(model) is not None:
        raise CompressionError("The model is prepared for quantization already. Use `strip(model)` to undo that first.")
    check_finite_weights(model)
    quantization = Quantization(model, scheme)
    if not quantization.layer_bits and not quantization.waiting_layers():
        strip(model)
        raise ValueError(
            f"`{type(model).__name__}` has no convolution or linear layer to quantize. "
            "Layers must exist before training, as children of the module; `exclude` must leave some."
        )
    return quantization


def quantization_of(model: nn.Module) -> Quantization | None:
    """Return the quantization that ``model`` was prepared with, or None.

    Example:
        >>> quantization_of(nn.Linear(1, 1)) is None
        True
    """
    for module in model.modules():
        forward = forward_on(module)
        if isinstance(forward, RewrittenForward | QuantizedLayerForward):
            return forward.state
    return None


def strip(model: nn.Module) -> nn.Module:
    """Give ``model`` its own forwards back; weights stay what training made of them.

    Args:
        model: A prepared module; any other is left as it is.

    Returns:
        ``model`` itself.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2))
        >>> _ = prepare(net)
        >>> "forward" in vars(strip(net))
        False
    """
    for module in model.modules():
        take_off(module)
    return model


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[Any], Any] | None = None,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Observe the activation ranges of a prepared model on ``batches``, in eval mode and without gradients.

    Args:
        model: A prepared module.
        batches: What ``forward`` takes; few hundred samples are enough.
        forward: Runs the model on one batch; by default the model itself.
        progress: Told of every batch.

    Raises:
        CompressionError: If the model was not prepared.
    """
    quantization = quantization_of(model)
    if quantization is None:
        raise CompressionError("Only a prepared model can be calibrated: call `prepare(model)` first.")
    modes, was_observing = [(module, module.training) for module in model.modules()], quantization.is_observing
    model.eval()
    quantization.is_observing = True
    try:
        with torch.no_grad():
            for count, batch in enumerate(batches, start=1):
                is_rewritten = True
                while is_rewritten:  # what has a graph only since the shapes are known sees the batch as well
                    before = quantization.rows
                    (forward or model)(batch)
                    quantization.ranges.update()
                    is_rewritten = quantization.rows is not before
                if progress is not None:
                    progress(f"calibration batch {count}")
    finally:
        quantization.is_observing = was_observing
        for module, mode in modes:
            module.training = mode


def check_finite_weights(model: nn.Module) -> None:
    """Check that the weights of layers that can be quantized and norms' statistics are finite, and no parameter NaN.

    Raises:
        CompressionError: If one is not; the message names it.
    """
    for name, module in model.named_modules():
        if isinstance(module, QUANTIZABLE_LAYERS) and not torch.isfinite(module.weight).all():
            raise CompressionError(
                f"The weight of layer `{name}` is NaN or infinite and cannot be compressed. "
                "Start from a checkpoint from before the training diverged."
            )
    for name, parameter in model.named_parameters():
        # Infinity may be meant, as in a mask; NaN never is.
        if parameter.is_floating_point() and parameter.isnan().any():
            raise CompressionError(
                f"The parameter `{name}` is NaN and cannot be compressed. "
                "Start from a checkpoint from before the training diverged."
            )
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")) and not torch.isfinite(buffer).all():
            raise CompressionError(
                f"The statistics `{name}` are NaN or infinite and cannot be compressed. "
                "Start from a checkpoint from before the training diverged."
            )
