"""Smoothing of one layer: the scales of its sites, and where they are folded."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from duquant.calibration.statistics import SiteStatistics
from duquant.config import TransformConfig
from duquant.errors import CalibrationError
from duquant.models.architecture import Site
from duquant.transforms.smoothing import exact_fold, share_over_heads, smoothing_scale

_BLOCK_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class LayerShape:
    """The sizes of a layer that its tensors do not tell."""

    kv_heads: int
    head_dim: int


def row_blocks(W: Tensor, elements: int) -> Iterator[slice]:
    """Yield slices of rows of about so many elements, so that float32 copies of a big weight never exist as a whole."""
    step = max(1, elements // W.shape[1])
    return (slice(first, first + step) for first in range(0, W.shape[0], step))


@dataclass(frozen=True)
class Folds:
    """Where smoothing scales go: `columns` multiply what a site's linears read, `rows` divide what a linear writes."""

    columns: dict[str, Tensor] = field(default_factory=dict)
    """By site name, (in_features,)."""
    rows: dict[str, Tensor] = field(default_factory=dict)
    """By linear name, (out_features,)."""

    def weight(self, linear: str, W: Tensor, block: slice) -> Tensor:
        """Return a float32 copy of a block of rows of a linear's weight, divided by their scales."""
        folded = W.float() if W.dtype != torch.float32 else W.clone()
        return folded.div_(self.rows[linear][block, None]) if linear in self.rows else folded

    def tensor(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor that stays in 16 bits, with its rows divided where its linear is folded into."""
        linear = name.rpartition(".")[0]
        if linear not in self.rows:
            return tensor
        rows = self.rows[linear]
        return tensor.float() / (rows[:, None] if tensor.dim() == 2 else rows)


def smooth(
    state: dict[str, Tensor],
    statistics: Mapping[str, SiteStatistics],
    sites: tuple[Site, ...],
    shape: LayerShape,
    config: TransformConfig,
) -> Folds:
    """Fold the norms' scales into `state`; return what has to happen to the linears.

    Sites that fold into the rows of a linear come first: the linear's own site then sees the weight it will have.

    Args:
        state: the layer's tensors; the norms' gains are replaced, and so is what reads a norm and is not quantized.
        statistics: by site name.
        sites: those that are quantized.
        shape: head counts, for smoothing under grouped-query attention.
        config: migration strength and what sizes it compares; no strength folds nothing.

    Raises:
        CalibrationError: a scale is not finite, or the calibration kept no mean squares.
    """
    folds = Folds(columns={site.name: torch.ones_like(statistics[site.name].absmax) for site in sites})
    if config.smooth_alpha is None:
        return folds
    for site in sorted(sites, key=lambda site: site.fold.kind == "norm"):
        act_size = _act_size(statistics[site.name], config, site)
        weight_size = torch.zeros_like(act_size)
        for linear in site.linears:
            stored = state[f"{linear}.weight"]
            for block in row_blocks(stored, _BLOCK_ELEMENTS):
                folded = folds.weight(linear, stored[block], block)
                if config.smooth_statistic == "absmax":
                    weight_size = torch.maximum(weight_size, folded.abs_().amax(0))
                else:
                    weight_size += folded.square_().sum(0)
        if config.smooth_statistic == "rms":
            weight_size = (weight_size / sum(state[f"{linear}.weight"].shape[0] for linear in site.linears)).sqrt_()
        scale = smoothing_scale(act_size, weight_size, config.smooth_alpha)
        if site.fold.kind == "norm":
            (norm,) = site.fold.into
            gain = state[f"{norm}.weight"].to(scale.device, torch.bfloat16)
            state[f"{norm}.weight"], scale = exact_fold(gain, scale, offset=site.fold.gain_offset)
        elif site.fold.kind == "kv_rows":
            scale = share_over_heads(scale, kv_heads=shape.kv_heads, head_dim=shape.head_dim)
            _fold_rows(folds, state, site, scale.view(shape.kv_heads, -1, shape.head_dim)[:, 0].reshape(-1))
        else:
            _fold_rows(folds, state, site, scale)
        if not bool(torch.isfinite(scale).all()):
            raise CalibrationError(f"the smoothing scale of site {site.name} is NaN or Inf", site=site.name)
        folds.columns[site.name] = scale
        for name in site.also_read_by:
            state[name] = state[name].float() * scale
    return folds


def _fold_rows(folds: Folds, state: Mapping[str, Tensor], site: Site, scale: Tensor) -> None:
    """Divide the rows that write a site's channels; others of a fused linear stay."""
    first = site.fold.first_row
    for linear in site.fold.into:
        rows = torch.ones(state[f"{linear}.weight"].shape[0], device=scale.device)
        rows[first : first + scale.shape[0]] = scale
        folds.rows[linear] = rows


def _act_size(statistics: SiteStatistics, config: TransformConfig, site: Site) -> Tensor:
    """Return the size of each input channel, as the config measures it."""
    if config.smooth_statistic == "absmax":
        return statistics.absmax
    if statistics.mean_square is None:
        raise CalibrationError(
            f"smoothing of site {site.name} needs mean squares, and the calibration kept none", site=site.name
        )
    return statistics.mean_square.sqrt()
