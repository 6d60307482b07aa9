"""Forwards that stand in for the one of a module's class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import nn

from lightning_compress.compiled import uncompiled


class StandIn:
    """A forward of ours: set on a module, it does what the forward of the class does, and more.

    Args:
        owner: The module.

    Attributes:
        replaced: The class's forward as `torch.compile` had wrapped it for this module, if it had.

    Example:
        >>> class Doubled(StandIn):
        ...     def __call__(self, x):
        ...         return 2 * x
        >>> layer = nn.Identity()
        >>> Doubled(layer).put_on()
        >>> layer(3), has_own_forward(layer)
        (6, False)
        >>> take_off(layer)
        >>> layer(3)
        3
    """

    replaced: Callable[..., Any] | None = None

    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The forward of the class: with it Lightning tells whether a module has a forward."""
        return cast(Callable[..., Any], type(self.owner).forward.__get__(self.owner))

    def put_on(self) -> None:
        """Make it the forward of its owner, in place of another stand-in if there is one."""
        own = forward_on(self.owner)
        self.replaced = own.replaced if isinstance(own, StandIn) else vars(self.owner).get("forward")
        vars(self.owner)["forward"] = self

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy takes over: what was compiled for one module is not for its copy."""
        return {**vars(self), "replaced": None}


def take_off(module: nn.Module) -> None:
    """Give ``module`` back the forward that a stand-in has replaced; any other module stays as it is."""
    own = forward_on(module)
    if not isinstance(own, StandIn):
        return
    if own.replaced is None:
        del vars(module)["forward"]
    else:
        vars(module)["forward"] = own.replaced


def uncover(module: nn.Module) -> None:
    """Take off what `torch.compile` wrapped around a stand-in on ``module``, which copies of it could not follow."""
    own = forward_on(module)
    if isinstance(own, StandIn):
        vars(module)["forward"] = own


def forward_on(module: nn.Module) -> Callable[..., Any] | None:
    """Return the forward that was set on ``module`` itself, out of what `torch.compile` wrapped around it, or None.

    Example:
        >>> layer = nn.Identity()
        >>> forward_on(layer) is None
        True
        >>> layer.forward = abs
        >>> forward_on(layer)(-1)
        1
    """
    return cast(Callable[..., Any] | None, uncompiled(vars(module).get("forward")))


def has_own_forward(module: nn.Module) -> bool:
    """Tell whether somebody set another forward on ``module`` than the one of its class.

    Example:
        >>> layer = nn.Identity()
        >>> has_own_forward(layer)
        False
        >>> layer.forward = abs
        >>> has_own_forward(layer)
        True
    """
    own = forward_on(module)
    return not (own is None or isinstance(own, StandIn) or getattr(own, "__func__", None) is type(module).forward)
