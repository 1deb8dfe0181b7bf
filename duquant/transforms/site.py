"""SiteTransform: the part of a site's transform that runs online, R1, P, R2, and how it meets the weights."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from duquant.config import TransformConfig
from duquant.transforms.balance import balance, diagonal_blocks
from duquant.transforms.permutation import zigzag
from duquant.transforms.reference import reference_rotation
from duquant.transforms.rotation import (
    apply_rotation,
    greedy_rotation,
    hadamard_rotation,
    kronecker_sides,
    resolve_block_size,
)


@dataclass(frozen=True)
class SiteTransform:
    """T(X) = (X R1)[:, perm] R2; a part that is None is the identity.

    R1 and R2 are (n, n) or (blocks, n, n), orthogonal or at least invertible, in the dtype that they are stored in;
    perm is (channels,) int64. Both have blocks of one side, but where they are the two factors of one rotation of all
    channels.
    Weights take V = `for_weights()`, so that T(X) V(W).T = X W.T for every weight W that reads X. V is T itself when T
    is orthogonal.
    """

    R1: Float[Tensor, "*blocks n n"] | None = None
    perm: Int64[Tensor, " channels"] | None = None
    R2: Float[Tensor, "*blocks2 n2 n2"] | None = None
    is_orthogonal: bool = True

    def apply(self, X: Float[Tensor, "*rows channels"]) -> Float[Tensor, "*rows channels"]:
        """Transform rows of activations or of a weight, in the dtype of `X`."""
        if self.R1 is not None:
            X = apply_rotation(X, self.R1)
        if self.perm is not None:
            X = X[..., self.perm]
        if self.R2 is not None:
            X = apply_rotation(X, self.R2)
        return X

    def apply_both(self, moment: Float[Tensor, "channels channels"]) -> Float[Tensor, "channels channels"]:
        """Return the second moment of transformed rows, given that of the rows."""
        return self.apply(self.apply(moment).T.contiguous())

    def for_weights(self) -> "SiteTransform":
        """Return what the weights take: R1 and R2 inverted, in float64, and transposed."""
        if self.is_orthogonal:
            return self

        return SiteTransform(_inverse_transposed(self.R1), self.perm, _inverse_transposed(self.R2), is_orthogonal=False)


def _inverse_transposed(R: Float[Tensor, "*blocks n n"] | None) -> Float[Tensor, "*blocks n n"] | None:
    if R is None:
        return None
    # By QR: torch's inverse goes through LU, and oneMKL's LU of a batch was seen to fail with more than one thread.
    Q, upper = torch.linalg.qr(R.double())
    inverse: Tensor = torch.linalg.solve_triangular(upper, Q.mT, upper=True)
    return inverse.mT.contiguous().float()


@dataclass(frozen=True)
class Moments:
    """What a balanced transform is computed from, both after smoothing and up to a factor."""

    inputs: Float[Tensor, "channels channels"]
    """X^T X of the site's inputs."""
    weights: Float[Tensor, "channels channels"]
    """W^T W of all weights that read them."""

    def under(self, transform: SiteTransform) -> "Moments":
        """Return the moments of transformed inputs and weights."""
        return Moments(transform.apply_both(self.inputs), transform.for_weights().apply_both(self.weights))


def rotation_sides(width: int, config: TransformConfig) -> tuple[int, int]:
    """Return the sides of the blocks of R1 and R2 for a site of that width."""
    if config.permutation == "transpose":
        return kronecker_sides(width)
    n = resolve_block_size(width, config.block_size)
    return n, n


def search_transform(
    X: Float[Tensor, "tokens channels"],
    config: TransformConfig,
    generator: torch.Generator,
    moments: Moments | None = None,
) -> SiteTransform:
    """Choose R1, P and R2 for a site from a sample of its (smoothed) inputs.

    Without a permutation there is one rotation only: a product of two would be no more than one.

    Args:
        X: sample of the site's inputs after smoothing; any float dtype, computed in float32.
        config: which transform.
        generator: CPU generator; the result depends on the other arguments and its state alone.
        moments: for config.rotation="balanced".
    """
    if config.rotation == "none":
        return SiteTransform()
    X = X.float()
    n, n2 = rotation_sides(X.shape[1], config)
    if config.permutation == "transpose":
        return _full_hadamard(n, n2, generator, X.device)
    if config.rotation == "balanced":
        assert moments is not None
        return _balanced_transform(X, n, config, generator, moments)
    blocks = None if config.shared_rotation else X.shape[1] // n

    def rotation(rows: Tensor, perm: Tensor | None = None) -> Tensor:
        if config.rotation == "hadamard":  # looks at no rows, so none are permuted
            return hadamard_rotation(n, blocks, generator).to(device=X.device, dtype=torch.float32)
        rows = rows if perm is None else rows[:, perm]
        if config.rotation == "reference":
            return reference_rotation(rows, n, steps=config.greedy_steps, generator=generator).float()
        found = greedy_rotation(rows, n, steps=config.greedy_steps, shared=config.shared_rotation, generator=generator)
        return found.float()

    R1 = rotation(X)
    if config.permutation == "none":
        return SiteTransform(R1=R1)
    rotated = apply_rotation(X, R1)
    perm = zigzag(torch.maximum(rotated.amax(0), -rotated.amin(0)), n)
    return SiteTransform(R1=R1, perm=perm, R2=rotation(rotated, perm))


def _full_hadamard(n1: int, n2: int, generator: torch.Generator, device: torch.device) -> SiteTransform:
    """Return the Kronecker product of two Hadamard matrices with random signs, its output channels in another order."""
    perm = torch.arange(n1 * n2, device=device).view(n2, n1).T.reshape(-1)
    R1, R2 = (hadamard_rotation(n, None, generator).to(device, torch.float32) for n in (n1, n2))
    return SiteTransform(R1=R1, perm=perm, R2=R2)


def _balanced_transform(
    X: Tensor, n: int, config: TransformConfig, generator: torch.Generator, moments: Moments
) -> SiteTransform:
    """Balance blocks of neighbours, mix, deal the channels out, and balance the new blocks; see `balance`."""
    H = hadamard_rotation(n, None, generator).to(X.device)
    # All that follows, the weights too, sees the blocks as they are stored.
    dtype = getattr(torch, config.rotation_dtype)

    def blocks(moments: Moments) -> Tensor:
        S, G = diagonal_blocks(moments.inputs, n), diagonal_blocks(moments.weights, n)
        return (balance(S, G, alpha=config.balance_alpha, damp=config.balance_damp) @ H).to(dtype)

    first = SiteTransform(R1=blocks(moments), is_orthogonal=False)
    if config.permutation == "none":
        return first
    rotated = first.apply(X)
    perm = zigzag(torch.maximum(rotated.amax(0), -rotated.amin(0)), n)
    half = SiteTransform(first.R1, perm, is_orthogonal=False)
    return SiteTransform(first.R1, perm, blocks(moments.under(half)), is_orthogonal=False)
