"""How many cores there are to share."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """Return the number of cores that this process may use; where the system keeps no such set (macOS), of all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
