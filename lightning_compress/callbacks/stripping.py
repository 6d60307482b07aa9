"""`strip`: the plain float module, with nothing of ours left on it."""

from __future__ import annotations

import lightning.pytorch as pl
from torch import nn

from lightning_compress import quantization
from lightning_compress.callbacks.checkpoint import detach_states
from lightning_compress.callbacks.distilled_methods import uncover_own_methods
from lightning_compress.callbacks.forward_tap import remove_copied_hooks


def strip(module: nn.Module) -> nn.Module:
    """Take every rewritten forward and every attached state off ``module``; its weights stay what training made them.

    Pruned weights stay zeros. Checkpoints written afterwards hold no ranges and no masks. Of a copy or a pickle that
    was made during a fit, it takes what belongs to the fit too.

    Args:
        module: A module that was compressed, or any other.

    Returns:
        ``module`` itself.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2))
        >>> _ = quantization.prepare(net)
        >>> "forward" in vars(strip(net))
        False
    """
    quantization.strip(module)
    for submodule in module.modules():
        remove_copied_hooks(submodule)
        if isinstance(submodule, pl.LightningModule):
            detach_states(submodule)
            uncover_own_methods(submodule)
    return module
