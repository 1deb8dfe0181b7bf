"""Alignment: the dominant direction of a site's inputs becomes one value that all channels of a token share.

An asymmetric grid need not contain zero, so a common offset of a token costs no codes. Inputs have one direction of by
far the largest energy, and behind a Hadamard matrix its share looks like any other: it widens the range of every token.
A reflection that maps it onto the vector of ones hands it to the zero point instead, whatever its size in a token.
The block form, which the tensors of any other transform hold, is ours.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from duquant.transforms.permutation import zigzag
from duquant.transforms.rotation import apply_rotation
from duquant.transforms.site import SiteTransform

_POWER_STEPS = 30
"""Of the power iteration. Where they are too few two directions are nearly as large, and either does."""


def align(transform: SiteTransform, X: Float[Tensor, "tokens channels"]) -> SiteTransform:
    """Return a transform of the same tensors whose outputs have the dominant direction of `X` along the ones.

    With a rotation for each block, each is followed by its own reflection. Blocks that share one can share a
    reflection, too, once they hold the same share of the direction: the channels are dealt out by it, instead of by
    magnitude.

    Args:
        transform: R1, perm and R2, R2 having blocks of one side; it is not changed.
        X: a sample of what it is applied to.
    """
    assert transform.R1 is not None and transform.perm is not None and transform.R2 is not None  # noqa: PT018
    R2, perm = transform.R2, transform.perm
    n = R2.shape[-1]
    if R2.dim() == 3:
        shares = dominant_direction(transform.apply(X.float())).view(-1, n)
    else:
        direction = dominant_direction(apply_rotation(X.float(), transform.R1))
        perm = zigzag(direction, n)
        shares = direction[perm].view(-1, n).mean(0).double() @ R2.double()
    return SiteTransform(transform.R1, perm, reflect_onto_ones(R2, shares), transform.is_orthogonal)


def dominant_direction(X: Float[Tensor, "tokens channels"]) -> Float[Tensor, " channels"]:
    """Return the unit vector along which `X` has the largest energy, by power iteration; zero when `X` is zero.

    Its mean over the tokens is positive, as far as there is one.
    """
    # No random start: the mean over the tokens is near it already.
    direction = _power_iteration(X, X.mean(0))
    largest = X[torch.linalg.vector_norm(X, dim=1).argmax()]
    # Tokens that cancel have no mean, or one that says nothing: along a token's own direction is its energy at least.
    if float((X @ direction).square().sum()) < 0.99 * float(largest.square().sum()):
        direction = _power_iteration(X, largest)
    return direction


def _power_iteration(X: Float[Tensor, "tokens channels"], start: Float[Tensor, " channels"]) -> Tensor:
    direction = start
    for _ in range(_POWER_STEPS):
        direction = torch.nn.functional.normalize(direction, dim=0)
        direction = (X @ direction) @ X
    return torch.nn.functional.normalize(direction, dim=0)


def reflect_onto_ones(
    R: Float[Tensor, "*blocks n n"], directions: Float[Tensor, "*blocks n"]
) -> Float[Tensor, "*blocks n n"]:
    """Return R times the Householder reflection that maps `directions`, which lie behind R, onto the ones.

    Computed in float64 and returned in the dtype of R. A direction of zero reflects nothing.

    Reference: Golub and Van Loan, Matrix Computations, section 5.1.
    """
    n = R.shape[-1]
    unit = torch.nn.functional.normalize(directions.double(), dim=-1)
    is_given = unit.square().sum(-1, keepdim=True) > 0
    w = torch.where(is_given, unit - n**-0.5, torch.zeros_like(unit))
    w = torch.nn.functional.normalize(w, dim=-1)
    exact = R.double()
    return (exact - 2 * (exact @ w[..., :, None]) * w[..., None, :]).to(R.dtype)
