"""What would not fit is refused before it is allocated."""

from __future__ import annotations

import os

from recadam_core.errors import RecAdamError

__all__ = ["check_memory"]


def check_memory(what: str, size: float) -> None:
    """Raise if so many bytes are more than the machine has.

    Example:
        >>> check_memory("batch_size 1000", 2**10)
    """
    try:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # no Unix
        return
    if size > there > 0:
        raise RecAdamError(
            f"{what}: needs about {size / 2**30:,.0f} GiB, this machine has {there / 2**30:,.0f}; give less"
        )
