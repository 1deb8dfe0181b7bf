"""SiteTransform: the part of a site's transform that runs online, R1, P, R2, and how it meets the weights."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from duquant.config import TransformConfig
from duquant.transforms.permutation import zigzag
from duquant.transforms.rotation import apply_rotation, greedy_rotation, hadamard_rotation, resolve_block_size


@dataclass(frozen=True)
class SiteTransform:
    """T(X) = (X R1)[:, perm] R2; a part that is None is the identity.

    R1 and R2 are float32, (n, n) or (blocks, n, n); perm is (channels,) int64. T is orthogonal, so that
    T(X) T(W).T = X W.T for every weight W that reads X.
    """

    R1: Float[Tensor, "*blocks n n"] | None = None
    perm: Int64[Tensor, " channels"] | None = None
    R2: Float[Tensor, "*blocks n n"] | None = None

    def apply(self, X: Float[Tensor, "*rows channels"]) -> Float[Tensor, "*rows channels"]:
        """Transform rows of activations or of a weight, in the dtype of `X`."""
        if self.R1 is not None:
            X = apply_rotation(X, self.R1)
        if self.perm is not None:
            X = X[..., self.perm]
        if self.R2 is not None:
            X = apply_rotation(X, self.R2)
        return X


def search_transform(
    X: Float[Tensor, "tokens channels"], config: TransformConfig, generator: torch.Generator
) -> SiteTransform:
    """Choose R1, P and R2 for a site from a sample of its (smoothed) inputs.

    Without a permutation there is one rotation only: a product of two would be no more than one.

    Args:
        X: sample of the site's inputs after smoothing; any float dtype, computed in float32.
        config: which transform.
        generator: CPU generator; the result depends on X, config and its state alone.
    """
    if config.rotation == "none":
        return SiteTransform()
    X = X.float()
    n = resolve_block_size(X.shape[1], config.block_size)
    blocks = None if config.shared_rotation else X.shape[1] // n

    def rotation(rows: Tensor, perm: Tensor | None = None) -> Tensor:
        if config.rotation == "hadamard":  # looks at no rows, so none are permuted
            return hadamard_rotation(n, blocks, generator).to(device=X.device, dtype=torch.float32)
        rows = rows if perm is None else rows[:, perm]
        found = greedy_rotation(rows, n, steps=config.greedy_steps, shared=config.shared_rotation, generator=generator)
        return found.float()

    R1 = rotation(X)
    if config.permutation == "none":
        return SiteTransform(R1=R1)
    rotated = apply_rotation(X, R1)
    perm = zigzag(torch.maximum(rotated.amax(0), -rotated.amin(0)), n)
    return SiteTransform(R1=R1, perm=perm, R2=rotation(rotated, perm))
