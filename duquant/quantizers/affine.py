"""Uniform affine grids. Everything here computes in float32 and returns integer codes centred on zero.

A b-bit code q lies in [qmin, qmax] = [-2^(b-1), 2^(b-1) - 1] and stands for scale * (q - zero_point). Centred codes are
what compressed-tensors stores (as q + 2^(b-1)) and what fits an int8 matrix product for every b up to 8.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int8
from torch import Tensor

MIN_RELATIVE_SCALE = 1e-4
"""Smallest scale relative to the largest magnitude. It bounds |zero_point| near 1e4 and makes constant rows exact,
unless they are clipped."""

_TINY = 1e-12


class Grid(NamedTuple):
    """One affine grid per row: `scale` and `zero_point` broadcast against the values; zero points are whole numbers."""

    scale: Float[Tensor, "*rows 1"]
    zero_point: Float[Tensor, "*rows 1"]
    bits: int


def code_range(bits: int) -> tuple[int, int]:
    """Return (qmin, qmax) of centred codes.

    >>> code_range(4)
    (-8, 7)
    """
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def make_grid(
    low: Float[Tensor, "*rows 1"], high: Float[Tensor, "*rows 1"], *, bits: int, symmetric: bool = False
) -> Grid:
    """Return the grid that spans [low, high].

    Asymmetric grids need not contain zero, so a common offset of a row costs nothing unless clipped; their scale is
    (high - low) / (2^bits - 1) as in DuQuant. Symmetric grids take scale = max|.| / (2^(bits-1) - 1/2), the
    compressed-tensors convention.

    Reference: DuQuant, arXiv 2406.01721v3, equation 1; the floor on the scale is ours (the authors' is 1e-5, absolute).
    """
    low, high = low.float(), high.float()
    magnitude = torch.maximum(low.abs(), high.abs())
    qmin, _ = code_range(bits)
    if symmetric:
        scale = (magnitude / (2 ** (bits - 1) - 0.5)).clamp_min(_TINY)
        return Grid(scale, torch.zeros_like(scale), bits)
    scale = torch.maximum((high - low) / (2**bits - 1), magnitude * MIN_RELATIVE_SCALE).clamp_min(_TINY)
    return Grid(scale, qmin - torch.round(low / scale), bits)


def row_grid(
    X: Float[Tensor, "*rows channels"],
    *,
    bits: int,
    symmetric: bool = False,
    clip_ratio: Float[Tensor, "2"] | None = None,
) -> Grid:
    """Return one grid per row of `X`; its range, times `clip_ratio` (of the low end, of the high end) when given.

    A ratio below 1 moves both ends towards zero, so it takes up to 1 - ratio off a row that lies on one side of it.
    """
    low, high = torch.aminmax(X.float(), dim=-1, keepdim=True)
    if clip_ratio is not None:
        low, high = low * clip_ratio[0], high * clip_ratio[1]
    return make_grid(low, high, bits=bits, symmetric=symmetric)


def quantize(X: Float[Tensor, "*rows channels"], grid: Grid) -> Int8[Tensor, "*rows channels"]:
    """Return centred integer codes, rounding half to even and clamping to the grid's range."""
    qmin, qmax = code_range(grid.bits)
    codes = torch.div(X.float(), grid.scale).round_().add_(grid.zero_point)
    return codes.clamp_(qmin, qmax).to(torch.int8)


def dequantize(codes: Int8[Tensor, "*rows channels"], grid: Grid) -> Float[Tensor, "*rows channels"]:
    """Return float32 values of centred codes."""
    return (codes.float() - grid.zero_point) * grid.scale


def fake_quantize(X: Float[Tensor, "*rows channels"], grid: Grid) -> Float[Tensor, "*rows channels"]:
    """Round `X` to the grid and return float32 values: dequantize(quantize(X))."""
    qmin, qmax = code_range(grid.bits)
    codes = torch.div(X.float(), grid.scale).round_().add_(grid.zero_point).clamp_(qmin, qmax)
    return codes.sub_(grid.zero_point).mul_(grid.scale)
