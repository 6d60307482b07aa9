"""The processor a measurement was taken on: its name, and whether it has integer dot products."""

from __future__ import annotations

import os
import platform
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")


def cpu_name(cpuinfo: str | None = None) -> str:
    r"""Return the name of the processor, as its maker wrote it where the system tells.

    Args:
        cpuinfo: Text of ``/proc/cpuinfo``, read from there by default.

    Returns:
        The name, or the architecture where no name is known.

    Example:
        >>> cpu_name("processor : 0\nmodel name : AMD EPYC 7B13\nflags : fpu avx2")
        'AMD EPYC 7B13'
    """
    return _field("model name", cpuinfo) or platform.processor() or platform.machine() or "unknown CPU"


def has_vnni(cpuinfo: str | None = None) -> bool | None:
    """Tell whether an x86 processor has VNNI, the 8-bit dot products that integer inference lives on.

    Without them, ONNX Runtime's uint8 x int8 sums are slower and can saturate.

    Args:
        cpuinfo: Text of ``/proc/cpuinfo``, read from there by default.

    Returns:
        True or False on x86 Linux, None where the system does not tell.

    Example:
        >>> has_vnni("flags : fpu avx512_vnni"), has_vnni("flags : fpu avx2"), has_vnni("Features : asimddp")
        (True, False, None)
    """
    flags = _field("flags", cpuinfo)
    return None if flags is None else not {"avx512_vnni", "avx_vnni"}.isdisjoint(flags.split())


def available_cpus() -> int:
    """Return how many processors this process may use, at least 1.

    Example:
        >>> available_cpus() >= 1
        True
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _field(key: str, cpuinfo: str | None) -> str | None:
    text = cpuinfo if cpuinfo is not None else _CPUINFO.read_text() if _CPUINFO.exists() else ""
    pairs = (line.partition(":") for line in text.splitlines())
    return next((value.strip() for name, _, value in pairs if name.strip() == key), None)
