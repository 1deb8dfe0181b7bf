"""Rounding of weights to per-channel or per-group grids, with fixed or searched clipping."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from duquant.config import WeightConfig
from duquant.errors import ConfigError
from duquant.quantizers.affine import Grid, dequantize, fake_quantize, make_grid, quantize

CLIP_CANDIDATES = tuple(1.0 - 0.05 * step for step in range(11))
"""Clip ratios tried for each row, 1.0 down to 0.5."""


@dataclass(frozen=True)
class QuantizedWeight:
    """Codes of one weight matrix with the grid of each row (per channel) or of each group of a row.

    `codes` is (out_features, in_features) int8; `scale` and `zero_point` are (out_features, groups) float32, the zero
    points whole numbers in [-2^(bits-1), 2^(bits-1) - 1].
    """

    codes: Int8[Tensor, "out_features in_features"]
    scale: Float[Tensor, "out_features groups"]
    zero_point: Float[Tensor, "out_features groups"]
    bits: int

    @classmethod
    def concatenate(cls, parts: Sequence["QuantizedWeight"]) -> "QuantizedWeight":
        """Join the rows of matrices that were rounded one after the other."""
        return cls(
            codes=torch.cat([part.codes for part in parts]),
            scale=torch.cat([part.scale for part in parts]),
            zero_point=torch.cat([part.zero_point for part in parts]),
            bits=parts[0].bits,
        )

    def dequantize(self) -> Float[Tensor, "out_features in_features"]:
        """Return the float32 weight that these codes stand for."""
        rows, groups = self.scale.shape
        grid = Grid(self.scale[..., None], self.zero_point[..., None], self.bits)
        return dequantize(self.codes.view(rows, groups, -1), grid).view(rows, -1)


def quantize_weight(
    W: Float[Tensor, "out_features in_features"],
    config: WeightConfig,
    importance: Float[Tensor, " in_features"] | None = None,
) -> QuantizedWeight:
    """Round `W` to the nearest point of its grids.

    Args:
        W: the weight, after the site's transform.
        config: bits, granularity and clipping.
        importance: mean square of each (transformed) input channel, up to a factor; weighs a searched clip's error.

    Raises:
        ConfigError: group_size does not divide in_features.
    """
    grid = weight_grid(W, config, importance)
    rows, channels = W.shape
    codes = quantize(W.float().view(rows, grid.scale.shape[1], -1), grid).view(rows, channels)
    return QuantizedWeight(codes, grid.scale.squeeze(-1), grid.zero_point.squeeze(-1), config.bits)


def weight_grid(
    W: Float[Tensor, "out_features in_features"],
    config: WeightConfig,
    importance: Float[Tensor, " in_features"] | None = None,
) -> Grid:
    """Return the grid of each row or group of `W`, clipped as the config says: tensors of (out_features, groups, 1).

    Raises:
        ConfigError: group_size does not divide in_features.
    """
    rows, channels = W.shape
    group_size = config.group_size or channels
    if channels % group_size:
        raise ConfigError(f"weight.group_size {group_size} does not divide {channels} input channels")
    grouped = W.float().view(rows, -1, group_size)  # (out_features, groups, group_size)
    # The range always holds zero, so that the zero point is itself a code and packs into the same bits.
    low = grouped.amin(-1, keepdim=True).clamp_max(0.0)
    high = grouped.amax(-1, keepdim=True).clamp_min(0.0)
    if config.clip == "fixed":
        low, high = low * config.clip_ratio, high * config.clip_ratio
    elif config.clip == "search":
        weights = None if importance is None else importance.float().view(1, -1, group_size)
        low, high = _search_clip(grouped, low, high, weights, config)
    return make_grid(low, high, bits=config.bits, symmetric=config.symmetric)


def _search_clip(
    grouped: Tensor, low: Tensor, high: Tensor, importance: Tensor | None, config: WeightConfig
) -> tuple[Tensor, Tensor]:
    """Return the (low, high) of least weighted squared error: first both ends together, then each end by itself."""
    best_low, best_high = low.clone(), high.clone()
    best_error = torch.full_like(low, torch.inf)

    def consider(candidate_low: Tensor, candidate_high: Tensor) -> None:
        grid = make_grid(candidate_low, candidate_high, bits=config.bits, symmetric=config.symmetric)
        error = fake_quantize(grouped, grid).sub_(grouped).square_()
        if importance is not None:
            error.mul_(importance)
        total = error.sum(-1, keepdim=True)
        better = total < best_error
        best_error.copy_(torch.where(better, total, best_error))
        best_low.copy_(torch.where(better, candidate_low, best_low))
        best_high.copy_(torch.where(better, candidate_high, best_high))

    for ratio in CLIP_CANDIDATES:
        consider(low * ratio, high * ratio)
    if not config.symmetric:
        together_low, together_high = best_low.clone(), best_high.clone()
        for factor in (0.9, 1.1):
            consider(torch.maximum(together_low * factor, low), together_high)
            consider(together_low, torch.minimum(together_high * factor, high))
    return best_low, best_high
