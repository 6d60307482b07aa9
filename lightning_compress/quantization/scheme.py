"""The scheme of a quantization: how many bits which layer gets, and what stays in float."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from lightning_compress.quantization.dct import DCT
from lightning_compress.quantization.estimators import RANGE_METHODS, RangeMethod
from lightning_compress.selection import match_names
from lightning_compress.settings import plain

MIN_MAX_BITS = 7
"""Bits from which on the extremes of the values are the range: at 8 that costs no accuracy, and learning costs time.

Seven are eight with a reduced range. Below, learned scales are worth points (`benchmarks/RESULTS.md`).
"""


@dataclass(frozen=True)
class LayerSettings:
    """Bits of one layer.

    Attributes:
        weight_bits: Bits of its weight, 1 to 8.
        activation_bits: Bits of the value it reads, 1 to 8; where several layers read a value, the most of them.
    """

    weight_bits: int = 8
    activation_bits: int = 8


@dataclass(frozen=True)
class Scheme:
    """How a model is quantized.

    Args:
        weight_bits: Bits of weights, 1 to 8: 2 are ternary (-1, 0, 1), 1 is binary, see `binary_weight`.
        activation_bits: Bits of the activations that layers and matrix products read, 1 to 8, where 1 are signs, see
            `binary_activation`; inputs and results of the model keep 8, and so does what only additions and poolings
            read.
        exclude: Patterns of layer names that stay in float.
        overrides: Settings other than these by pattern of layer names, such as ``{"head": {"weight_bits": 8}}``; where
            several patterns match, the last one wins.
        edge_bits: Bits at least of the first and the last layers, for weights and for what they read.
        symmetric: Whether activations get the zero point in the middle of their grid, so that it covers ``-L .. L``, as
            TensorRT wants it. Weights always are symmetric.
        reduce_range: Whether weights of 8 bits use 7: processors without VNNI saturate sums of 8-bit products.
        ranges: How scales are found: ``"minmax"``, ``"percentile"``, ``"mse"`` or ``"learned"``; None learns those
            below `MIN_MAX_BITS` bits, and takes the extremes from there on.
        weight_transform: `DCT`, or ``"dct"`` for ``DCT()``: weights of more than one bit are rounded in frequencies.

    Raises:
        ValueError: If bits are out of range, an override has a setting that is none, or ``ranges`` or
            ``weight_transform`` is unknown.
        TypeError: If bits are no ints.

    Example:
        >>> scheme = Scheme(weight_bits=4, activation_bits=4, overrides={"head": {"weight_bits": 6}})
        >>> scheme.settings(["stem", "body", "head"], edges={"stem"})["head"]
        LayerSettings(weight_bits=6, activation_bits=4)
        >>> scheme.settings(["stem", "body", "head"], edges={"stem"})["stem"]
        LayerSettings(weight_bits=8, activation_bits=8)
    """

    weight_bits: int = 8
    activation_bits: int = 8
    exclude: Sequence[str] = ()
    overrides: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    edge_bits: int = 8
    symmetric: bool = False
    reduce_range: bool = False
    ranges: RangeMethod | None = None
    weight_transform: DCT | Mapping[str, Any] | str | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            object.__setattr__(self, name, plain(value))
        check_bits("weight_bits", self.weight_bits)
        check_bits("activation_bits", self.activation_bits)
        check_bits("edge_bits", self.edge_bits)
        if self.ranges is not None and self.ranges not in RANGE_METHODS:
            known = ", ".join(f'"{method}"' for method in RANGE_METHODS)
            raise ValueError(f"`ranges` must be one of {known}, or None, got {self.ranges!r}.")
        object.__setattr__(self, "weight_transform", _transform(self.weight_transform))
        if not isinstance(self.weight_transform, DCT | None):
            raise ValueError(f'`weight_transform` must be "dct", a `DCT` or None, got {self.weight_transform!r}.')
        if self.weight_transform is not None and self.weight_bits == 1:
            raise ValueError("`weight_transform` rounds coefficients to 2 to 8 bits, got `weight_bits=1`.")
        for pattern, settings in self.overrides.items():
            for name, bits in settings.items():
                if name not in ("weight_bits", "activation_bits"):
                    raise ValueError(
                        f"`overrides` for {pattern!r} has the setting {name!r}; a layer has `weight_bits` and "
                        "`activation_bits`."
                    )
                check_bits(f"overrides[{pattern!r}][{name!r}]", bits)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain types, for a checkpoint."""
        overrides = {pattern: dict(settings) for pattern, settings in self.overrides.items()}
        transform = asdict(self.weight_transform) if isinstance(self.weight_transform, DCT) else None
        return {**vars(self), "exclude": list(self.exclude), "overrides": overrides, "weight_transform": transform}

    def settings(self, names: Sequence[str], edges: Collection[str]) -> dict[str, LayerSettings]:
        """Return the settings of every layer.

        Args:
            names: Names of the layers.
            edges: Names of the first and the last ones.

        Raises:
            ValueError: If a pattern of ``overrides`` matches no layer.
        """
        found: dict[str, dict[str, Any]] = {}
        for name in names:
            least = self.edge_bits if name in edges else 1
            found[name] = {
                "weight_bits": max(self.weight_bits, least),
                "activation_bits": max(self.activation_bits, least),
            }
        for pattern, settings in self.overrides.items():
            for name in match_names(names, [pattern], "overrides"):
                found[name].update(settings)
        for settings in found.values():
            if self.reduce_range and settings["weight_bits"] == 8:
                settings["weight_bits"] = 7
        return {name: LayerSettings(**settings) for name, settings in found.items()}

    def method(self, bits: int) -> RangeMethod:
        """Return how the scale of a grid of ``bits`` bits is found; of signs it is known.

        Example:
            >>> Scheme().method(8), Scheme().method(4), Scheme(ranges="mse").method(4)
            ('minmax', 'learned', 'mse')
        """
        if bits == 1:
            return "minmax"
        return self.ranges or ("minmax" if bits >= MIN_MAX_BITS else "learned")


def _transform(given: Any) -> Any:
    """Return a transform from its name or from what a checkpoint tells of it; anything else as it came."""
    if given == "dct":
        return DCT()
    if isinstance(given, Mapping):
        unknown = sorted(set(given) - {entry.name for entry in fields(DCT)})
        if unknown:
            raise ValueError(f"`weight_transform` has the setting {unknown[0]!r}; a `DCT` has `block` and `allocates`.")
        return DCT(**given)
    return given


def check_bits(name: str, bits: int) -> None:
    """Check that ``bits`` is an int from 1 to 8.

    Raises:
        TypeError: If it is no int.
        ValueError: If it is out of range.

    Example:
        >>> check_bits("weight_bits", 16)
        Traceback (most recent call last):
        ...
        ValueError: `weight_bits` must be from 1 to 8, got 16.
    """
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise TypeError(f"`{name}` must be an int from 1 to 8, got {bits!r}.")
    if not 1 <= bits <= 8:
        raise ValueError(f"`{name}` must be from 1 to 8, got {bits}.")
