"""Block rotations in the layout of AMX-BF16's left operand."""

from dataclasses import dataclass

import torch
from jaxtyping import BFloat16, Float, Int32
from torch import Tensor

from duquant.transforms.site import SiteTransform

_ROWS, _DEPTH = 16, 32


@dataclass(frozen=True)
class AmxRotations:
    """R1, P and R2 of a site; R2 and perm are None together."""

    R1: BFloat16[Tensor, "blocks row_tiles depth_tiles 16 32"]
    perm: Int32[Tensor, " channels"] | None
    R2: BFloat16[Tensor, "blocks row_tiles depth_tiles 16 32"] | None
    block: int
    gain: float
    """What outputs are multiplied by to make up for entries that bfloat16 rounds all in one direction: a Hadamard's."""


def amx_rotations(transform: SiteTransform) -> AmxRotations | None:
    """Return the rotations for the matrix unit; None when it cannot run them (blocks of no multiple of 32)."""
    R1, perm, R2 = transform.R1, transform.perm, transform.R2
    if R1 is None or R1.shape[-1] % _DEPTH or (perm is None) != (R2 is None):
        return None
    if R2 is not None and R2.shape[-1] != R1.shape[-1]:
        return None
    return AmxRotations(
        R1=_tiles(R1),
        perm=None if perm is None else perm.to(torch.int32).contiguous(),
        R2=None if R2 is None else _tiles(R2),
        block=R1.shape[-1],
        gain=_gain(R1) * (1.0 if R2 is None else _gain(R2)),
    )


def _tiles(R: Float[Tensor, "*blocks n n"]) -> BFloat16[Tensor, "blocks row_tiles depth_tiles 16 32"]:
    """Cut the transposes of the blocks into operands of 16 output channels by 32 input channels."""
    n = R.shape[-1]
    turned = R.detach().reshape(-1, n, n).transpose(1, 2)  # (blocks, out, in)
    cut = turned.reshape(-1, n // _ROWS, _ROWS, n // _DEPTH, _DEPTH).transpose(2, 3)
    return cut.to(torch.bfloat16).contiguous()


def _gain(R: Float[Tensor, "*blocks n n"]) -> float:
    """Return the factor that brings the rounded rotation nearest to the exact one."""
    exact, rounded = R.detach().double(), R.detach().bfloat16().double()
    return float((exact * rounded).sum() / (rounded * rounded).sum())
