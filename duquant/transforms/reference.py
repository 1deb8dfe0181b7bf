"""The rotation search of DuQuant's authors' code, its differences from the paper included, to compare with its figures.

What differs from duquant.transforms.rotation: the channel is the outlier's row number modulo the block's side, not its
column; the range is made small, not the largest magnitude; one random matrix serves all steps; the matrix's first row
is not flat; rows are pooled over all blocks. It computes in float32, where the authors' code has float16.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def spreading_matrix(n: int, generator: torch.Generator) -> Float[Tensor, "n n"]:
    """Return the code's M in float64: the Helmert matrix, its ends swapped, times diag(1, random orthogonal)."""
    helmert = torch.zeros(n, n, dtype=torch.float64)
    for row in range(n - 1):
        norm = math.sqrt((row + 1) * (row + 2))
        helmert[row, : row + 1] = 1 / norm
        helmert[row, row + 1] = -(row + 1) / norm
    helmert[n - 1] = 1 / math.sqrt(n)
    ends = torch.arange(n)
    ends[[0, n - 1]] = ends[[n - 1, 0]]
    helmert = helmert[ends][:, ends]
    mixed = torch.eye(n, dtype=torch.float64)
    if n > 1:
        gaussian = torch.randn(n - 1, n - 1, generator=generator, dtype=torch.float64)
        mixed[1:, 1:] = torch.linalg.qr(gaussian).Q
    return helmert @ mixed


def reference_rotation(
    X: Float[Tensor, "tokens channels"], n: int, *, steps: int, generator: torch.Generator
) -> Float[Tensor, "n n"]:
    """Return the rotation, in float64, that all blocks share: the product of the first k swapped copies of M.

    k is the number of steps after which the range of all entries was smallest; none is a candidate.

    Reference: Hsu1023/DuQuant at 62c58446, `rotation` in quantize/quantizer.py.
    """
    rows = X.float().reshape(-1, n)  # (tokens * blocks, n): a row's number says nothing of its channel
    M = spreading_matrix(n, generator).to(X.device)
    R = best = torch.eye(n, dtype=torch.float64, device=X.device)
    least, row = _range_and_extreme(rows)
    for _ in range(steps):
        d = row % n
        swap = torch.arange(n, device=X.device)
        swap[[0, d]] = swap[[d, 0]]
        step = M[swap][:, swap]
        rows = rows @ step.float()
        R = R @ step
        found, row = _range_and_extreme(rows)
        if found < least:
            best, least = R, found
    return best


def _range_and_extreme(rows: Float[Tensor, "rows n"]) -> tuple[float, int]:
    """Return the distance from the smallest to the largest entry, and the row of the one of larger magnitude."""
    (high, high_row), (low, low_row) = rows.amax(1).max(0), rows.amin(1).min(0)
    return float(high - low), int(high_row if bool(high.abs() >= low.abs()) else low_row)
