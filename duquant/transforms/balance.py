"""Balancing: the invertible map of a site's channels that makes the expected rounding error smallest.

Behind a rotation that spreads energy evenly, a rounded token errs in proportion to its norm and a rounded weight row
errs in proportion to its own, so with X = inputs and W = all weights that read them, y = x B and W' = W B^-T,

    output error ~ E|x B|^2 |W B^-T|^2 = tr(M S) tr(M^-1 G),    M = B B^T, S = E[x^T x], G = W^T W.

The smallest value is reached at M S M = G, the geometric mean of S^-1 and G; B is its square root. Smoothing by
(G_jj / S_jj)^(1/4) per channel is the same with B diagonal. The derivation is ours; learned maps of this kind are
FlatQuant's (arXiv 2410.09426v4) and the diagonal case is SmoothQuant's with alpha 1/2 (arXiv 2211.10438v7, equation 4).
"""

import torch
from jaxtyping import Float
from torch import Tensor

_FLOOR = 1e-8


def balance(
    second_moment: Float[Tensor, "*blocks n n"],
    weight_moment: Float[Tensor, "*blocks n n"],
    *,
    alpha: float,
    damp: float,
) -> Float[Tensor, "*blocks n n"]:
    """Return B, symmetric and positive definite, float64.

    Args:
        second_moment: S; symmetric up to rounding and positive semidefinite up to rounding.
        weight_moment: G, likewise.
        alpha: 1/2 is the mean above; more makes the rotated activations more alike and weights less, as in smoothing:
            M is the weighted mean S^-1 #_(1 - alpha) G.
        damp: added to both diagonals, as a share of their mean over all blocks; so dead channels and directions that
            the sample does not show stay bounded.
    """
    S, G = _damped(second_moment, damp), _damped(weight_moment, damp)
    half, inverse_half = _powers(S, 0.5, -0.5)
    (middle,) = _powers(half @ G @ half, 1.0 - alpha)
    (B,) = _powers(inverse_half @ middle @ inverse_half, 0.5)
    return B


def diagonal_blocks(matrix: Float[Tensor, "channels channels"], n: int) -> Float[Tensor, "blocks n n"]:
    """Return the blocks of side n on the diagonal."""
    blocks = matrix.shape[0] // n
    index = torch.arange(blocks, device=matrix.device)
    return matrix.view(blocks, n, blocks, n)[index, :, index, :]


def _damped(matrix: Tensor, damp: float) -> Tensor:
    matrix = matrix.double()
    mean = matrix.diagonal(dim1=-2, dim2=-1).mean().clamp_min(torch.finfo(torch.float32).tiny)
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    # A common factor of S or of G scales B alone, and no grid minds that; without it all powers are well in range.
    return (matrix + matrix.mT) / (2 * mean) + damp * identity


def _powers(matrix: Tensor, *exponents: float) -> list[Tensor]:
    """Return powers of a symmetric positive semidefinite matrix, with its spectrum floored."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    values = torch.maximum(values, values[..., -1:] * _FLOOR)
    return [(vectors * values[..., None, :] ** exponent) @ vectors.mT for exponent in exponents]
