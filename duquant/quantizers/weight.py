"""Rounding of weights to per-channel or per-group grids, with fixed or searched clipping."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from duquant.config import WeightConfig
from duquant.errors import ConfigError
from duquant.quantizers.affine import Grid, dequantize, fake_quantize, make_grid, quantize
from duquant.quantizers.moments import OutputCost

CLIP_CANDIDATES = tuple(1.0 - 0.05 * step for step in range(11))
"""Ratios tried for both ends together, 1.0 down to 0.5: of each row of a weight, of all tokens of a site."""
END_FACTORS = (0.9, 1.1)
"""What each end by itself is then multiplied by, where a grid has two."""
_REFINEMENTS = (0.06, 0.03, 0.015)
_MIN_GROUP = 8


@dataclass(frozen=True)
class ClipRatios:
    """What each end of each row's or group's range is multiplied by; both are (out_features, groups, 1) float32.

    Learned ones are sigmoids, in (0, 1).
    """

    beta: Float[Tensor, "out_features groups 1"]
    """Of the low end."""
    gamma: Float[Tensor, "out_features groups 1"]
    """Of the high end."""

    def rows(self, first: int, count: int) -> "ClipRatios":
        """Return those of some rows."""
        return ClipRatios(self.beta[first : first + count], self.gamma[first : first + count])


@dataclass(frozen=True)
class QuantizedWeight:
    """Codes of one weight matrix with the grid of each row (per channel) or of each group of a row.

    `codes` is (out_features, in_features) int8; `scale` and `zero_point` are (out_features, groups) float32, the zero
    points whole numbers in [-2^(bits-1), 2^(bits-1) - 1]. Outlier channels, where there are, come after these.
    """

    codes: Int8[Tensor, "out_features in_features"]
    scale: Float[Tensor, "out_features groups"]
    zero_point: Float[Tensor, "out_features groups"]
    bits: int
    outliers: "QuantizedWeight | None" = None

    @classmethod
    def concatenate(cls, parts: Sequence["QuantizedWeight"]) -> "QuantizedWeight":
        """Join the rows of matrices that were rounded one after the other."""
        return cls(
            codes=torch.cat([part.codes for part in parts]),
            scale=torch.cat([part.scale for part in parts]),
            zero_point=torch.cat([part.zero_point for part in parts]),
            bits=parts[0].bits,
            outliers=cls.concatenate(outliers) if (outliers := [p.outliers for p in parts if p.outliers]) else None,
        )

    @property
    def is_finite(self) -> bool:
        """Whether all scales are finite."""
        return bool(torch.isfinite(self.scale).all()) and (self.outliers is None or self.outliers.is_finite)

    def dequantize(self) -> Float[Tensor, "out_features in_features"]:
        """Return the float32 weight that these codes stand for."""
        rows, groups = self.scale.shape
        grid = Grid(self.scale[..., None], self.zero_point[..., None], self.bits)
        values = dequantize(self.codes.view(rows, groups, -1), grid).view(rows, -1)
        return values if self.outliers is None else torch.cat((values, self.outliers.dequantize()), dim=1)


def resolve_group_size(width: int, requested: int | None) -> int:
    """Return the input channels of a group for a weight of that width: all of them when none are requested.

    The requested size when it divides the width, otherwise the largest divisor below it.

    Raises:
        ConfigError: that would be fewer than 8 channels.

    >>> resolve_group_size(4096, 128), resolve_group_size(576, 128), resolve_group_size(576, None)
    (128, 96, 576)
    """
    if requested is None:
        return width
    size = next(size for size in range(min(requested, width), 0, -1) if width % size == 0)
    if size < min(_MIN_GROUP, width):
        raise ConfigError(
            f"weight.group_size {requested} has no divisor of the width {width} from {_MIN_GROUP} to itself",
            field="weight.group_size",
        )
    return size


def quantize_weight(
    W: Float[Tensor, "out_features in_features"],
    config: WeightConfig,
    importance: Float[Tensor, " in_features"] | None = None,
    second_moment: Float[Tensor, "in_features in_features"] | None = None,
    ratios: ClipRatios | None = None,
) -> QuantizedWeight:
    """Round `W` to the nearest point of its grids.

    Args:
        W: the weight, after the site's transform.
        config: bits, granularity and clipping.
        importance: mean square of each (transformed) input channel, up to a factor; weighs a searched clip's error.
        second_moment: of the (transformed) inputs, up to a factor, for config.clip="output".
        ratios: for config.clip="learned".

    Raises:
        ConfigError: no group size near the config's divides in_features.
        CalibrationError: config.clip is "output", and second_moment is not one of any inputs.
    """
    grid = weight_grid(W, config, importance, second_moment, ratios)
    rows, channels = W.shape
    codes = quantize(W.float().view(rows, grid.scale.shape[1], -1), grid).view(rows, channels)
    return QuantizedWeight(codes, grid.scale.squeeze(-1), grid.zero_point.squeeze(-1), config.bits)


def weight_grid(
    W: Float[Tensor, "out_features in_features"],
    config: WeightConfig,
    importance: Float[Tensor, " in_features"] | None = None,
    second_moment: Float[Tensor, "in_features in_features"] | None = None,
    ratios: ClipRatios | None = None,
) -> Grid:
    """Return the grid of each row or group of `W`, clipped as the config says: tensors of (out_features, groups, 1).

    Raises:
        ConfigError: no group size near the config's divides in_features.
        CalibrationError: config.clip is "output", and second_moment is not one of any inputs.
    """
    rows, channels = W.shape
    group_size = resolve_group_size(channels, config.group_size)
    grouped = W.float().view(rows, -1, group_size)  # (out_features, groups, group_size)
    low, high = full_range(grouped)
    if config.clip == "fixed":
        low, high = low * config.clip_ratio, high * config.clip_ratio
    elif config.clip == "learned":
        assert ratios is not None
        low, high = low * ratios.beta, high * ratios.gamma
    elif config.clip == "search":
        weights = None if importance is None else importance.float().view(1, -1, group_size)
        low, high = _search_clip(grouped, low, high, config, lambda error: _squares(error, weights))
    elif config.clip == "output":
        assert second_moment is not None
        assert config.group_size is None
        cost = OutputCost(second_moment)
        low, high = _search_clip(grouped, low, high, config, cost)
        low, high = _refine_clip(grouped, low, high, config, cost)
        cost.check()
    return make_grid(low, high, bits=config.bits, symmetric=config.symmetric)


def full_range(grouped: Float[Tensor, "*rows channels"]) -> tuple[Float[Tensor, "*rows 1"], Float[Tensor, "*rows 1"]]:
    """Return each row's (low, high).

    It always holds zero, so that the zero point is itself a code and packs into the same bits.
    """
    return grouped.amin(-1, keepdim=True).clamp_max(0.0), grouped.amax(-1, keepdim=True).clamp_min(0.0)


def _squares(error: Tensor, weights: Tensor | None) -> Tensor:
    error.square_()
    if weights is not None:
        error.mul_(weights)
    return error.sum(-1, keepdim=True)


class _Best:
    """The (low, high) of least error of each row or group so far."""

    def __init__(
        self, grouped: Tensor, low: Tensor, high: Tensor, config: WeightConfig, cost: Callable[[Tensor], Tensor]
    ) -> None:
        self._grouped, self._config, self._cost = grouped, config, cost
        self.low, self.high = low.clone(), high.clone()
        self._error = torch.full_like(low, torch.inf)

    def consider(self, low: Tensor, high: Tensor) -> None:
        """Take this range where it errs less."""
        grid = make_grid(low, high, bits=self._config.bits, symmetric=self._config.symmetric)
        total = self._cost(fake_quantize(self._grouped, grid).sub_(self._grouped))
        better = total < self._error
        self._error.copy_(torch.where(better, total, self._error))
        self.low.copy_(torch.where(better, low, self.low))
        self.high.copy_(torch.where(better, high, self.high))


def _search_clip(
    grouped: Tensor, low: Tensor, high: Tensor, config: WeightConfig, cost: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the (low, high) of least cost: first both ends together, then each end by itself."""
    best = _Best(grouped, low, high, config, cost)
    for ratio in CLIP_CANDIDATES:
        best.consider(low * ratio, high * ratio)
    if not config.symmetric:
        together_low, together_high = best.low.clone(), best.high.clone()
        for factor in END_FACTORS:
            best.consider(torch.maximum(together_low * factor, low), together_high)
            best.consider(together_low, torch.minimum(together_high * factor, high))
    return best.low, best.high


def _refine_clip(
    grouped: Tensor, low: Tensor, high: Tensor, config: WeightConfig, cost: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return a (low, high) near the given one, of less cost: smaller and smaller steps, each end by itself.

    An end may go beyond the row's by the product of all steps up, a factor of 1.11: a grid of steps that are a little
    wider may fit the other weights better.
    """
    best = _Best(grouped, low, high, config, cost)
    best.consider(low, high)
    for step in _REFINEMENTS:
        for factor in (1.0 - step, 1.0 + step):
            if config.symmetric:
                best.consider(best.low * factor, best.high * factor)
            else:
                best.consider(best.low * factor, best.high.clone())
                best.consider(best.low.clone(), best.high * factor)
    return best.low, best.high
