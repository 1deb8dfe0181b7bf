"""What the environment may say about kernels: the one place in `duquant` that reads it.

A recipe or an argument would travel with an artifact or through every caller; what a machine can run does neither.
"""

import os

BACKENDS = "DUQUANT_KERNELS"
"""Backends that may be used, with commas between; all by default. `reference` is always there."""
CPU_ISA = "DUQUANT_CPU_ISA"
"""Highest instruction set that the CPU kernels may use: portable, avx2, vnni or amx."""
CACHE = "DUQUANT_CACHE_DIR"
"""Where compiled kernels are kept; the user's cache folder by default."""


def setting(name: str) -> str | None:
    """Return a setting, or None when it is not set or empty."""
    return os.environ.get(name) or None  # noqa: TID251  # see above
