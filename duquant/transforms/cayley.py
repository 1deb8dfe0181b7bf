"""Cayley SGD: steps down a gradient that stay among the orthogonal matrices.

Reference: Li, Li and Todorovic, arXiv 2002.01113v1, algorithm 1 without momentum, as SpinQuant (arXiv 2405.16406v4,
section 3.2) uses it.
"""

import torch
from jaxtyping import Float64
from torch import Tensor

_ITERATIONS = 5
"""Of the fixed-point iteration for the Cayley transform."""
_CORRECTIONS = 4
_EPSILON = 1e-8


def cayley_step(
    R: Float64[Tensor, "*matrices n n"], gradient: Float64[Tensor, "*matrices n n"], rate: float
) -> Float64[Tensor, "*matrices n n"]:
    """Return each R moved against its gradient: Y = (I - a/2 W)^-1 (I + a/2 W) R, with W = (R G^T - G R^T) / 2.

    W is the skew part of the gradient along the manifold; a is the rate, or 1 / |W|_1 where that is less, so that the
    iteration Y = R + a/2 W (R + Y) at least halves its distance from the solution each time. What distance is left
    after five times is a step of slightly other length. Newton's iteration for the polar factor then makes the result
    orthogonal to float64 precision, so that no error grows over many steps.
    """
    skew = (R @ gradient.mT - gradient @ R.mT) / 2
    norm = skew.abs().sum(-2, keepdim=True).amax(-1, keepdim=True)
    step = (1.0 / (norm + _EPSILON)).clamp_max(rate)
    W = step * skew
    Y = R + W @ R
    for _ in range(_ITERATIONS):
        Y = R + 0.5 * (W @ (R + Y))
    return nearest_orthogonal(Y)


def nearest_orthogonal(R: Float64[Tensor, "*matrices n n"]) -> Float64[Tensor, "*matrices n n"]:
    """Return the orthogonal matrix next to one that is nearly orthogonal (|R^T R - I| below about 0.1)."""
    for _ in range(_CORRECTIONS):
        R = 1.5 * R - 0.5 * R @ (R.mT @ R)
    return R


def orthogonality_error(R: Float64[Tensor, "*matrices n n"]) -> float:
    """Return the largest entry of |R^T R - I|."""
    identity = torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)
    return float((R.mT @ R - identity).abs().max())
