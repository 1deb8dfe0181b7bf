"""Magnitudes of 16-bit floating-point numbers, compared as integers."""

import torch
from jaxtyping import Int16
from torch import Tensor

SHORT_FORMATS = (torch.bfloat16, torch.float16)
_WITHOUT_SIGN = 0x7FFF


def magnitude_bits(X: Tensor) -> Int16[Tensor, "..."]:
    """Return the bits of |X| of a 16-bit format as integers, in the same shape.

    They are in the order of the magnitudes, with Inf and then NaN above all numbers, and on a CPU torch reduces int16
    several times faster than bfloat16.
    """
    return X.view(torch.int16) & _WITHOUT_SIGN


def is_finite(X: Tensor) -> bool:
    """Return whether no element of a floating-point tensor is NaN or Inf."""
    if X.dtype not in SHORT_FORMATS or not X.numel():
        return bool(torch.isfinite(X).all())
    infinite = int(magnitude_bits(torch.tensor(torch.inf, dtype=X.dtype)))
    return int(magnitude_bits(X).max()) < infinite
