"""Block rotations: the greedy search of DuQuant and the search-free Hadamard variant.

A rotation is (block_size, block_size) when all blocks of a site share it, (blocks, block_size, block_size) when each
block has its own. It acts on rows: X @ R within every block.
"""

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from duquant.transforms.hadamard import flat_orthogonal, hadamard_factor, random_signs

MAX_SEARCH_ROWS = 2048
"""Rows that one search looks at; those of largest norm are kept."""
_POOL = 16
_MIN_BLOCK = 16


def resolve_block_size(width: int, requested: int) -> int:
    """Return the side of the rotation blocks for a site of `width` channels.

    The requested size when it divides the width, otherwise the largest divisor below it, so that all blocks are equal.
    A width without a divisor of at least 16 (or its own size) is rotated as one block.

    >>> resolve_block_size(4096, 128), resolve_block_size(576, 128), resolve_block_size(1538, 128)
    (128, 96, 1538)
    """
    if width <= requested:
        return width
    divisor = next(size for size in range(min(requested, width), 0, -1) if width % size == 0)
    return divisor if divisor >= min(_MIN_BLOCK, requested) else width


def kronecker_sides(width: int) -> tuple[int, int]:
    """Return (n1, n2), n1 >= n2, n1 n2 = width: the sides of two matrices that rotate all channels as one.

    Sides that Hadamard matrices are known for come first, then the pair of least sum, which costs least online.

    >>> kronecker_sides(576), kronecker_sides(1536), kronecker_sides(4096), kronecker_sides(11008)
    ((24, 24), (48, 32), (64, 64), (128, 86))
    """

    def rank(n2: int) -> tuple[bool, int]:
        n1 = width // n2
        return hadamard_factor(n1) is None or hadamard_factor(n2) is None, n1 + n2

    best = min((n2 for n2 in range(1, math.isqrt(width) + 1) if width % n2 == 0), key=rank)
    return width // best, best


def apply_rotation(
    X: Float[Tensor, "*rows channels"], R: Float[Tensor, "*blocks n n"]
) -> Float[Tensor, "*rows channels"]:
    """Return `X` with every block of channels multiplied by its rotation, in the dtype of `X`."""
    n = R.shape[-1]
    R = R.to(X.dtype)
    blocks = X.reshape(-1, X.shape[-1] // n, n)  # (rows, blocks, n)
    rotated = blocks @ R if R.dim() == 2 else torch.einsum("rbi,bij->rbj", blocks, R)
    return rotated.reshape(X.shape)


def hadamard_rotation(n: int, blocks: int | None, generator: torch.Generator) -> Float[Tensor, "*blocks n n"]:
    """Return diag(random signs) H in float64: one for all blocks when `blocks` is None, else one for each."""
    base = flat_orthogonal(n)
    if blocks is None:
        return random_signs(n, generator)[:, None] * base
    return torch.stack([random_signs(n, generator)[:, None] * base for _ in range(blocks)])


def _spreading_pool(n: int, generator: torch.Generator) -> Float[Tensor, "pool n n"]:
    """Return random orthogonal matrices whose first row is uniform: diag(1, Q') times the Helmert matrix.

    The paper multiplies in the other order, which leaves the first row random (up to 4.3 times its flat value); this
    order keeps it flat, so that one step really divides the outlier evenly over its block.
    """
    helmert = torch.zeros(n, n, dtype=torch.float64)
    helmert[0] = 1 / math.sqrt(n)
    for row in range(1, n):
        norm = math.sqrt(row * (row + 1))
        helmert[row, :row] = 1 / norm
        helmert[row, row] = -row / norm
    if n == 1:
        return helmert[None]
    gaussian = torch.randn(_POOL, n - 1, n - 1, generator=generator, dtype=torch.float64)
    Q, upper = torch.linalg.qr(gaussian)
    Q = Q * torch.sign(torch.diagonal(upper, dim1=-2, dim2=-1))[:, None, :]  # unique factors: Haar distributed
    mixed = torch.eye(n, dtype=torch.float64).repeat(_POOL, 1, 1)
    mixed[:, 1:, 1:] = Q
    return mixed @ helmert


def _search_rows(X: Float[Tensor, "tokens channels"], n: int, shared: bool) -> Float[Tensor, "problems rows n"]:
    """Return the rows that can decide the largest entry: (1, rows, n) when shared, (blocks, tokens, n) otherwise.

    For orthogonal R, |x|_2 / sqrt(n) <= |x R|_max <= |x|_2, so a row whose norm is below max|x|_2 / sqrt(n) never holds
    the peak; dropping it changes nothing. Beyond that at most MAX_SEARCH_ROWS rows of largest norm are kept.
    """
    blocks = X.float().view(X.shape[0], -1, n)  # (tokens, blocks, n)
    problems = blocks.reshape(1, -1, n) if shared else blocks.transpose(0, 1)
    keep = min(problems.shape[1], MAX_SEARCH_ROWS)
    norms = problems.norm(dim=-1)
    top = norms.topk(keep, dim=1)
    rows = problems.gather(1, top.indices[..., None].expand(-1, -1, n)).contiguous()
    can_peak = top.values >= top.values[:, :1] / math.sqrt(n)
    return rows[:, : int(can_peak.sum(1).max())]


def greedy_rotation(
    X: Float[Tensor, "tokens channels"], n: int, *, steps: int, shared: bool, generator: torch.Generator
) -> Float[Tensor, "*blocks n n"]:
    """Search block rotations that make the largest magnitude small; return them in float64.

    Every step finds the largest |entry|, takes its channel d within the block, and multiplies by E_d M E_d, where E_d
    swaps channels 0 and d and M has a uniform first row, so the outlier spreads over its block. The prefix of steps
    with the smallest peak is kept; doing nothing is a candidate, so the peak never grows. All problems (one when
    shared, else one a block) advance together, and nothing is read back from the device inside the search.

    Reference: DuQuant, arXiv 2406.01721v3, section 3.2, equation 3 and algorithm 1, with the true outlier column.
    """
    rows = _search_rows(X, n, shared)
    pool = _spreading_pool(n, generator).to(X.device)
    pool_like_rows = pool.to(rows.dtype)
    peak, d = _peak(rows)
    peaks, outliers = [peak], []
    for step in range(steps):
        outliers.append(d)
        rows = rows @ _swapped(pool_like_rows[step % len(pool)], d)
        peak, d = _peak(rows)
        peaks.append(peak)
    kept = torch.stack(peaks).argmin(0)  # (problems,): how many steps to keep
    R = torch.eye(n, dtype=torch.float64, device=X.device).repeat(rows.shape[0], 1, 1)
    for step in range(int(kept.max())):
        longer = R @ _swapped(pool[step % len(pool)], outliers[step])
        R = torch.where((step < kept)[:, None, None], longer, R)
    # The search saw the largest rows only; over all rows, too, the result must not be worse than doing nothing.
    everything = X.float().view(X.shape[0], -1, n)
    everything = everything.reshape(1, -1, n) if shared else everything.transpose(0, 1)
    worse = _magnitude(everything @ R.float()) > _magnitude(everything)
    R = torch.where(worse[:, None, None], torch.eye(n, dtype=R.dtype, device=R.device), R)
    return R[0] if shared else R


def _magnitude(rows: Float[Tensor, "problems rows n"]) -> Float[Tensor, " problems"]:
    """Return the largest magnitude of each problem, without a copy of `rows`."""
    return torch.maximum(rows.amax((1, 2)), -rows.amin((1, 2)))


def _peak(rows: Float[Tensor, "problems rows n"]) -> tuple[Float[Tensor, " problems"], Int64[Tensor, " problems"]]:
    """Return the largest magnitude of each problem and its channel."""
    # By rows first: a reduction over the last axis is several times faster than one max with indices over everything.
    peak, row = rows.abs().amax(-1).max(dim=1)
    holder = rows.gather(1, row[:, None, None].expand(-1, 1, rows.shape[-1]))[:, 0]  # (problems, n)
    return peak, holder.abs().argmax(-1)


def _swapped(M: Float[Tensor, "n n"], d: Int64[Tensor, " problems"]) -> Float[Tensor, "problems n n"]:
    """Return E_d M E_d for each problem's channel d."""
    channels = torch.arange(M.shape[0], device=M.device)
    target = d[:, None]
    swap = torch.where(channels == 0, target, torch.where(channels == target, 0, channels))  # (problems, n)
    return M[swap[:, :, None], swap[:, None, :]]
