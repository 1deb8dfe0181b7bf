"""The reference backend: plain torch, any device, exact integer accumulation. The definition that others must equal."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8, Int32
from torch import Tensor

from duquant.config import ActivationConfig
from duquant.errors import ShapeError
from duquant.quantizers.affine import quantize, row_grid
from duquant.quantizers.packing import unpack
from duquant.transforms.site import SiteTransform

_FLOAT32_EXACT = 2**24


@dataclass(frozen=True)
class QuantizedActivation:
    """Rows of a site's input after its transform: centred codes, one grid per row, and the codes' row sums."""

    codes: Int8[Tensor, "tokens in_features"]
    scale: Float[Tensor, "tokens 1"]
    zero_point: Float[Tensor, "tokens 1"]
    row_sum: Float[Tensor, "tokens 1"]


@dataclass(frozen=True)
class PackedWeight:
    """A packed linear weight as it lies in the artifact (see duquant.quantizers.packing)."""

    packed: Int32[Tensor, "out_features words"]
    scale: Float[Tensor, "out_features groups"]
    zero_point: Float[Tensor, "out_features groups"]
    in_features: int
    bits: int


def transform_quantize(
    X: Float[Tensor, "tokens in_features"],
    transform: SiteTransform,
    config: ActivationConfig,
    clip_ratio: Float[Tensor, "2"],
) -> QuantizedActivation:
    """Apply R1, P, R2 in float32 and round every row to its own grid."""
    transformed = transform.apply(X.float())
    grid = row_grid(transformed, bits=config.bits, symmetric=config.symmetric, clip_ratio=clip_ratio)
    codes = quantize(transformed, grid)
    row_sum = codes.sum(-1, keepdim=True, dtype=torch.int32).float()
    return QuantizedActivation(codes, grid.scale, grid.zero_point, row_sum)


def int4_linear(X: QuantizedActivation, W: PackedWeight) -> Float[Tensor, "tokens out_features"]:
    """Return X W.T in float32 from integer codes.

    With x = s_x (q_x - z_x) and w = s_w (q_w - z_w) per group:
    x.w = s_x s_w [ (q_x.q_w - z_w sum(q_x)) - z_x (sum(q_w) - K z_w) ]. Both brackets are whole numbers. The products
    accumulate in int32; for 4-bit codes they stay below 2^24 and are exact in float32, too.

    Raises:
        ShapeError: the activation and the weight have different widths, or the pack is corrupt.
    """
    if X.codes.shape[1] != W.in_features:
        raise ShapeError(f"the activation has {X.codes.shape[1]} channels, the weight {W.in_features}")
    codes = unpack(W.packed, W.in_features, bits=W.bits)
    groups = W.scale.shape[1]
    width = W.in_features // groups
    result: Tensor | None = None
    for group in range(groups):
        columns = slice(group * width, (group + 1) * width)
        q_x, q_w = X.codes[:, columns], codes[:, columns]
        z_w, s_w = W.zero_point[:, group], W.scale[:, group]
        row_sum = X.row_sum if groups == 1 else q_x.sum(-1, keepdim=True, dtype=torch.int32).float()
        weight_sum = q_w.sum(-1, dtype=torch.int32).float() - width * z_w
        # Both corrections are one product of rank two, added where the whole numbers are: one pass over the output.
        term = _int_matmul(q_x, q_w).addmm_(
            torch.cat((row_sum, X.zero_point), dim=1), torch.stack((z_w, weight_sum)), alpha=-1
        )
        term.mul_(s_w)
        result = term if result is None else result.add_(term)
    assert result is not None
    return result.mul_(X.scale)


def _int_matmul(A: Int8[Tensor, "m k"], B: Int8[Tensor, "n k"]) -> Float[Tensor, "m n"]:
    """Return A B.T exactly, as float32 (a whole number below 2^24 in magnitude)."""
    if A.device.type == "cpu":
        return torch._int_mm(A, B.T).float()
    # CUDA's integer product wants padded shapes; float products of whole numbers are exact while the sum stays small.
    exact = torch.float32 if A.shape[1] * 128 * 128 < _FLOAT32_EXACT else torch.float64
    return (A.to(exact) @ B.to(exact).T).float()


def fake_linear(X: Float[Tensor, "tokens in_features"], W: PackedWeight) -> Float[Tensor, "tokens out_features"]:
    """Return X W.T for activations left in 16 bits: the weight is dequantized for this one product."""
    codes = unpack(W.packed, W.in_features, bits=W.bits)
    grouped = codes.view(codes.shape[0], W.scale.shape[1], -1).float()
    values = (grouped - W.zero_point[..., None]) * W.scale[..., None]
    return X.float() @ values.view(codes.shape).T
