"""Block rotations as the AMX machine's kernel reads them."""

from dataclasses import dataclass

import torch
from jaxtyping import BFloat16, Float64, Int32
from torch import Tensor

from duquant.transforms.hadamard import flat_orthogonal
from duquant.transforms.site import SiteTransform

_ROWS, _DEPTH = 16, 32
_MOST_HADAMARD = 256
_TOLERANCE = 1e-6
"""How far a rotation may be from a Hadamard matrix: float32's rounding of its entries."""


@dataclass(frozen=True)
class AmxRotations:
    """R1, P and R2 of a site; R2 and perm are None together."""

    R1: Tensor
    """Dense: bfloat16 (blocks, row tiles, depth tiles, 16, 32). Hadamard: int32 (blocks, n), masks of the sign bit."""
    perm: Int32[Tensor, " channels"] | None
    R2: Tensor | None
    block: int
    is_hadamard: bool
    """Both rotations are diag(signs) H."""
    gain: float
    """What outputs are multiplied by: 1/sqrt(n) for each Hadamard matrix of ones; for dense rotations what makes up for
    entries that bfloat16 rounds in one direction."""


def amx_rotations(transform: SiteTransform) -> AmxRotations | None:
    """Return the rotations for the kernel; None when it cannot run them (blocks of no multiple of 32)."""
    R1, perm, R2 = transform.R1, transform.perm, transform.R2
    if R1 is None or R1.shape[-1] % _DEPTH or (perm is None) != (R2 is None):
        return None
    n = R1.shape[-1]
    if R2 is not None and R2.shape[-1] != n:
        return None
    rotations = [R.detach().double().reshape(-1, n, n) for R in (R1, R2) if R is not None]
    signs = [_signs(R) for R in rotations]
    is_hadamard = all(each is not None for each in signs)
    made = [_tiles(R) if each is None or not is_hadamard else each for R, each in zip(rotations, signs, strict=True)]
    gain = 1.0
    for R in rotations:
        gain *= n**-0.5 if is_hadamard else _gain(R)
    return AmxRotations(
        R1=made[0],
        perm=None if perm is None else perm.to(torch.int32).contiguous(),
        R2=made[1] if R2 is not None else None,
        block=n,
        is_hadamard=is_hadamard,
        gain=gain,
    )


def _signs(R: Float64[Tensor, "blocks n n"]) -> Int32[Tensor, "blocks n"] | None:
    """Return the sign bits of D where every block is D H, H the Hadamard matrix of order 2^k; None where one is not."""
    n = R.shape[-1]
    if n & (n - 1) or n > _MOST_HADAMARD:
        return None
    signs = R[:, :, 0].sign()  # the first column of H is positive
    if float((signs[..., None] * R - flat_orthogonal(n)).abs().max()) > _TOLERANCE:
        return None
    return torch.where(signs < 0, torch.iinfo(torch.int32).min, 0).to(torch.int32).contiguous()


def _tiles(R: Float64[Tensor, "blocks n n"]) -> BFloat16[Tensor, "blocks row_tiles depth_tiles 16 32"]:
    """Cut the transposes into operands of 16 output channels by 32 input channels."""
    blocks, n, _ = R.shape
    turned = R.transpose(1, 2)  # (blocks, out, in)
    cut = turned.reshape(blocks, n // _ROWS, _ROWS, n // _DEPTH, _DEPTH).transpose(2, 3)
    return cut.to(torch.bfloat16).contiguous()


def _gain(R: Float64[Tensor, "blocks n n"]) -> float:
    """Return the factor that brings the rounded rotation nearest to the exact one."""
    rounded = R.bfloat16().double()
    return float((R * rounded).sum() / (rounded * rounded).sum())
