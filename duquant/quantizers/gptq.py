"""GPTQ: rounds a weight column by column and lets the columns that follow make up for each error.

For inputs X with second moment H = E[x x^T] the output error of a row is (w - q) H (w - q)^T. Columns are visited by
falling diagonal of H; after each one the rest moves by its error times a row of the Cholesky factor of H's inverse.

Reference: GPTQ, arXiv 2210.17323v2, algorithm 1, with the order by diagonal of the authors' later code.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int8, Int64
from torch import Tensor

from duquant.config import WeightConfig
from duquant.errors import CalibrationError
from duquant.quantizers.affine import Grid, dequantize, quantize
from duquant.quantizers.descent import descend
from duquant.quantizers.moments import check_moment
from duquant.quantizers.outliers import OUTLIER_WEIGHTS
from duquant.quantizers.weight import QuantizedWeight, weight_grid

_COLUMNS = 128
"""Columns between two updates of all the rest."""
_DAMP_FACTOR = 10.0
_MAX_DAMP = 10.0


@dataclass(frozen=True)
class GPTQSolver:
    """What rounding needs to know of a site's inputs, computed once for all of its linears."""

    order: Int64[Tensor, " channels"]
    """Channels by falling second moment."""
    factor: Float[Tensor, "channels channels"]
    """Upper Cholesky factor of the damped second moment's inverse, rows and columns in `order`."""
    importance: Float[Tensor, " channels"]
    """Diagonal of the second moment, which weighs the clip search."""
    damp: float
    """What was added to the diagonal, over its mean; above the recipe's when that did not make it positive definite."""
    moment: Float[Tensor, "channels channels"] | None = None
    """The damped second moment itself, in `order`, for coordinate descent."""

    @classmethod
    def from_second_moment(
        cls, H: Float[Tensor, "channels channels"], damp: float, *, descends: bool = False
    ) -> "GPTQSolver":
        """Factorize a second moment.

        Args:
            H: X^T X of the transformed inputs up to a factor; symmetric up to rounding. Dead channels may be zero.
            damp: added to the diagonal, as a share of its mean; raised tenfold, up to ten times the mean, until the sum
                is positive definite.
            descends: whether there will be coordinate descent, for which the moment itself is kept.

        Raises:
            CalibrationError: H is not finite, its diagonal is negative, or no damping helps.
        """
        check_moment(H)
        importance = H.diagonal().clamp_min(0.0).clone()
        mean = float(importance.mean())
        if mean == 0.0:  # no input was ever anything but zero: every channel is as good as any other
            H, mean = torch.eye(H.shape[0], device=H.device, dtype=H.dtype), 1.0
            importance = H.diagonal().clone()
        order = torch.argsort(importance, descending=True, stable=True)
        H = ((H + H.T) / (2 * mean))[order][:, order]
        damps = _damps(damp)
        for damp in damps:
            factor = _inverse_factor(H, damp)
            if factor is not None:
                H.diagonal().add_(damp)
                moment = H if descends else None
                return cls(order=order, factor=factor, importance=importance, damp=damp, moment=moment)
        raise CalibrationError(
            "the second moment of the activations is not positive definite, not even with "
            f"{', '.join(f'{damp:g}' for damp in damps)} times its diagonal's mean added to the diagonal: no number of "
            "inputs gives such a moment; calibrate again"
        )

    def quantize(
        self, W: Float[Tensor, "out_features channels"], config: WeightConfig, *, outliers: int = 0
    ) -> QuantizedWeight:
        """Round `W` to the grids that `quantize_weight` would take, each column in view of the errors before it.

        With config.descent_passes columns are then taken again, in view of all errors.

        The last `outliers` channels take the grids of OUTLIER_WEIGHTS.

        Raises:
            ConfigError: no group size near the config's divides the number of channels.
        """
        channels = W.shape[1]
        most = channels - outliers
        grid = weight_grid(W[:, :most], config, self.importance[:most])  # grids are (out_features, groups, 1)
        behind = weight_grid(W[:, most:], OUTLIER_WEIGHTS) if outliers else None
        columns = _column_grids(grid, most) + ([] if behind is None else _column_grids(behind, outliers))
        column_grids = [columns[channel] for channel in self.order.tolist()]
        # Transposed, a column is one piece of memory: up to twice as fast.
        exact = W.float().T[self.order]
        W = exact.clone() if config.descent_passes else exact  # it changes below
        codes = torch.empty(W.shape, dtype=torch.int8, device=W.device)
        for first in range(0, channels, _COLUMNS):
            last = min(first + _COLUMNS, channels)
            errors = torch.empty(last - first, W.shape[1], device=W.device, dtype=torch.float32)
            for column, error in enumerate(errors, first):
                codes[column] = quantize(W[column], column_grids[column])
                missed = W[column] - dequantize(codes[column], column_grids[column])
                torch.div(missed, self.factor[column, column], out=error)
                # Only this block at once; what lies behind it is moved once a block, by one matrix product.
                W[column + 1 : last].addr_(self.factor[column, column + 1 : last], error, alpha=-1)
            W[last:].addmm_(self.factor[first:last, last:].T, errors, alpha=-1)
        if config.descent_passes:
            assert self.moment is not None
            del W
            descend(codes, exact, column_grids, self.moment, config.descent_passes)
        restored = torch.empty_like(codes)
        restored[self.order] = codes
        restored = restored.T.contiguous()
        rounded = _on_grid(restored[:, :most], grid)
        return rounded if behind is None else replace(rounded, outliers=_on_grid(restored[:, most:], behind))


def _damps(first: float) -> list[float]:
    """Return what is tried one after the other.

    >>> _damps(0.3)
    [0.3, 3.0, 10.0]
    """
    damps = [first]
    while damps[-1] < _MAX_DAMP:
        damps.append(min(damps[-1] * _DAMP_FACTOR, _MAX_DAMP))
    return damps


def _on_grid(codes: Int8[Tensor, "out_features channels"], grid: Grid) -> QuantizedWeight:
    return QuantizedWeight(codes, grid.scale.squeeze(-1), grid.zero_point.squeeze(-1), grid.bits)


def _column_grids(grid: Grid, channels: int) -> list[Grid]:
    """Return the grid of each channel, (out_features,); those of a group share one."""
    groups = grid.scale.shape[1]
    of_group = [
        Grid(grid.scale[:, group, 0].contiguous(), grid.zero_point[:, group, 0].contiguous(), grid.bits)
        for group in range(groups)
    ]
    return [each for each in of_group for _ in range(channels // groups)]


def _inverse_factor(H: Tensor, damp: float) -> Tensor | None:
    """Return U with U^T U = (H + damp I)^-1, or None when the sum is not positive definite in floating point."""
    damped = H + damp * torch.eye(H.shape[0], dtype=H.dtype, device=H.device)
    lower, info = torch.linalg.cholesky_ex(damped)
    if int(info) != 0:
        return None
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return factor if int(info) == 0 and bool(torch.isfinite(factor).all()) else None
