"""Outlier channels: those of largest energy come last and keep 8 bits, in weights and activations.

Reference: Atom, arXiv 2310.19102v3, sections 4.1 (mixed precision with reordering) and 4.2 (groups).
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from duquant.config import ActivationConfig, WeightConfig

OUTLIER_WEIGHTS = WeightConfig(bits=8, symmetric=True)
"""How the outlier channels' weights are rounded: one scale a row, not clipped."""
OUTLIER_ACTIVATIONS = ActivationConfig(bits=8, symmetric=True)
"""How the outlier channels' inputs are rounded: one scale a token, not clipped."""


def by_energy(X: Float[Tensor, "tokens channels"]) -> Int64[Tensor, " channels"]:
    """Return the channels by rising mean square; use as X[:, perm]. Ties keep their order.

    The last ones are the outliers; the others are among their like in groups.

    >>> by_energy(torch.tensor([[3.0, 0.0, -5.0, 1.0]])).tolist()
    [1, 3, 0, 2]
    """
    return torch.argsort(torch.linalg.vector_norm(X.float(), dim=0), stable=True)
