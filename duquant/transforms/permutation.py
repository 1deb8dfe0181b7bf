"""The zigzag permutation that evens out the blocks between the two rotations."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from duquant.errors import ShapeError


def zigzag(magnitude: Float[Tensor, " channels"], block_size: int) -> Int64[Tensor, " channels"]:
    """Return `perm` that deals channels, largest first, back and forth over the blocks; use as X[:, perm].

    With K blocks the i-th largest goes to block i mod K on even rounds and K - 1 - (i mod K) on odd ones; inside a
    block the order stays descending. Ties keep the channel order, so the result is the same everywhere.

    Raises:
        ShapeError: block_size does not divide the number of channels.

    Reference: DuQuant, arXiv 2406.01721v3, section 3.3.

    >>> zigzag(torch.tensor([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]), 4).tolist()
    [0, 3, 4, 7, 1, 2, 5, 6]
    """
    channels = magnitude.shape[0]
    if channels % block_size:
        raise ShapeError(f"block size {block_size} does not divide {channels} channels")
    blocks = channels // block_size
    order = torch.argsort(magnitude, descending=True, stable=True)
    rounds = order.view(block_size, blocks).clone()  # row r holds the channels dealt in round r
    rounds[1::2] = rounds[1::2].flip(1)
    return rounds.T.reshape(-1)
