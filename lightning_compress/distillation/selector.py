"""Output selectors: where in what a network returns its logits are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

OutputSelector: TypeAlias = str | int | Callable[[Any], Tensor] | None
"""A key or attribute, a position, a function, or None for the tensor itself or whatever is called ``logits``."""


def select_logits(output: Any, selector: OutputSelector, owner: str) -> Tensor:
    """Return the logits in a network's output.

    Args:
        output: What the network's ``forward`` returned.
        selector: A str (key of a mapping, else attribute), an int (position in a tuple or list), a function of the
            output, or None: the output itself where it is a tensor, else its ``logits`` key or attribute.
        owner: Whose output this is, for the message.

    Returns:
        The selected tensor.

    Raises:
        TypeError: If the selector finds nothing in this output, or something that is not a tensor.

    Example:
        >>> select_logits({"logits": torch.ones(2), "features": torch.zeros(3)}, None, "student")
        tensor([1., 1.])
        >>> select_logits((torch.zeros(3), torch.ones(2)), 1, "student")
        tensor([1., 1.])
    """
    try:
        selected = _select(output, selector)
    except (KeyError, IndexError, AttributeError) as error:
        raise _not_found(output, selector, owner) from error
    if not isinstance(selected, Tensor):
        raise _not_found(output, selector, owner)
    return selected


LABELS = ("labels", "label", "targets", "target", "y")
"""What the classes are called in a batch, where nothing else is said."""


def select_labels(batch: Any, selector: OutputSelector) -> Tensor:
    """Return the classes in a batch.

    Args:
        batch: What the loader gave.
        selector: As of `select_logits`; by default one of `LABELS`, else the last entry of a tuple or list.

    Returns:
        The selected tensor.

    Raises:
        TypeError: If the selector finds nothing in this batch, or something that is not a tensor.

    Example:
        >>> select_labels((torch.zeros(2, 3), torch.tensor([1, 0])), None)
        tensor([1, 0])
        >>> select_labels({"image": torch.zeros(2, 3), "label": torch.tensor([1, 0])}, None)
        tensor([1, 0])
    """
    if selector is None:
        is_rows = isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) > 1
        names = [name for name in LABELS if name in batch] if isinstance(batch, Mapping) else []
        selector = names[0] if names else -1 if is_rows else LABELS[0]
    try:
        selected = _select(batch, selector)
    except (KeyError, IndexError, AttributeError):
        selected = None
    if not isinstance(selected, Tensor):
        raise TypeError(
            f"No tensor of labels was found by `labels={selector!r}` in the batch, which is {_describe(batch)}: pass "
            "`labels` as a key, a position or a function of the batch."
        )
    return selected


def check_selector(selector: object, name: str = "output") -> None:
    """Check that ``selector`` can select an output.

    Args:
        selector: What the user gave.
        name: As which argument.

    Raises:
        TypeError: If it is neither a str, an int, a callable nor None.

    Example:
        >>> check_selector("logits")
        >>> check_selector(0.5)
        Traceback (most recent call last):
        ...
        TypeError: `output` must be a key (str), a position (int), a callable or None, got float.
    """
    is_selector = selector is None or isinstance(selector, str | int) or callable(selector)
    if isinstance(selector, bool) or not is_selector:
        raise TypeError(
            f"`{name}` must be a key (str), a position (int), a callable or None, got {type(selector).__name__}."
        )


def _select(output: Any, selector: OutputSelector) -> Any:
    if callable(selector):
        return selector(output)
    if isinstance(selector, int):
        return output[selector] if isinstance(output, Sequence) else None
    if selector is None and isinstance(output, Tensor):
        return output
    name = "logits" if selector is None else selector
    return output[name] if isinstance(output, Mapping) else getattr(output, name)


def _not_found(output: Any, selector: OutputSelector, owner: str) -> TypeError:
    sought = "`logits`" if selector is None else f"`output={selector!r}`"
    return TypeError(
        f"No tensor of logits was found by {sought} in the {owner}'s output, which is {_describe(output)}: "
        f"pass `output` as a key, a position or a function of the output."
    )


def _describe(output: Any) -> str:
    kind = type(output).__name__
    if isinstance(output, torch.Tensor):
        return f"a {kind} of shape {tuple(output.shape)}"
    if isinstance(output, Mapping):
        return f"a {kind} with the keys {', '.join(repr(key) for key in output)}"
    if isinstance(output, tuple | list):
        return f"a {kind} of {', '.join(type(entry).__name__ for entry in output)}"
    return f"a {kind}"
