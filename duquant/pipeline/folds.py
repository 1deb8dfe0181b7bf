"""Smoothing of one layer: the scales of its sites, and where they are folded."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from duquant.calibration.statistics import SiteStatistics
from duquant.config import TransformConfig
from duquant.errors import CalibrationError
from duquant.models.architecture import Site
from duquant.transforms.smoothing import activation_scale, exact_fold, share_over_heads, smoothing_scale

STRENGTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Migration strengths that a search tries, beside no smoothing at all."""
BLOCK_ELEMENTS = 1 << 18
"""Elements of a weight that are looked at in float32 at once."""
_REFERENCE_CONSUMERS = ("q_proj", "up_proj")

SiteErrorOf = Callable[[Site, Tensor, "Folds"], float]
"""(site, its smoothing scale (in_features,), what else is folded) -> the error of the site's outputs."""


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
    error_of: SiteErrorOf | None = None,
) -> Folds:
    """Fold the norms' scales into `state`; return what has to happen to the linears.

    Sites that fold into the rows of a linear come first: the linear's own site then sees the weight it will have.

    Args:
        state: the layer's tensors; the norms' gains are replaced, and what reads a norm and stays in 16 bits.
        statistics: by site name.
        sites: those that are quantized.
        shape: head counts, for smoothing under grouped-query attention.
        config: migration strength and what sizes it compares; no strength folds nothing.
        error_of: what config.smooth_strength="search" makes small.

    Raises:
        CalibrationError: a scale is not finite, or the calibration kept no mean squares.
    """
    folds = Folds(columns={site.name: torch.ones_like(statistics[site.name].absmax) for site in sites})
    if config.fold_gains:
        for site in sites:
            if site.fold.kind == "norm":
                (norm,) = site.fold.into
                _fold(site, state[f"{norm}.weight"].float() + site.fold.gain_offset, state, shape, folds)
    if not config.is_smoothed:
        return folds
    for site in sorted(sites, key=lambda site: site.fold.kind == "norm"):
        act_size = _act_size(statistics[site.name], config, site)
        weight_size = None if config.smooth_statistic == "mean" else _weight_size(site, state, folds, config)
        if config.smooth_strength == "fixed":
            assert config.smooth_alpha is not None
            scale = _scale(act_size, weight_size, config.smooth_alpha)
        else:
            assert error_of is not None
            scale = _best_scale(site, act_size, weight_size, state, shape, folds, error_of)
        if not bool(torch.isfinite(scale).all()):
            sizes = f"inputs of up to {float(act_size.max()):.1e}"
            if weight_size is not None:
                sizes += f" and weights of up to {float(weight_size.max()):.1e}"
            raise CalibrationError(
                f"the smoothing scale of site {site.name} is NaN or Inf, for {sizes}", site=site.name
            )
        _fold(site, scale, state, shape, folds)
    return folds


def fold_learned(
    site: Site, scale: Float[Tensor, " channels"], state: dict[str, Tensor], shape: LayerShape, folds: Folds
) -> None:
    """Fold a further scale of a site, on top of what `folds` has."""
    before = folds.columns[site.name]
    rows = {linear: folds.rows[linear] for linear in site.fold.into if linear in folds.rows}
    _fold(site, scale, state, shape, folds)
    folds.columns[site.name] = before * folds.columns[site.name]
    for linear, earlier in rows.items():
        folds.rows[linear] = earlier * folds.rows[linear]


def _fold(site: Site, scale: Tensor, state: dict[str, Tensor], shape: LayerShape, folds: Folds) -> None:
    """Write into `state` and `folds` what dividing a site's inputs by `scale` takes."""
    columns, written = _exact(site, scale, state, shape)
    for name in site.fold.into:
        if site.fold.kind == "norm":
            state[f"{name}.weight"] = written
        else:
            folds.rows[name] = _whole_rows(written, site.fold.first_row, state[f"{name}.weight"].shape[0])
    for name in site.also_read_by:
        state[name] = state[name].float() * columns
    folds.columns[site.name] = columns


def _whole_rows(scale: Float[Tensor, " rows"], first: int, count: int) -> Float[Tensor, " out_features"]:
    """Return the scales of all rows of a linear; a fused one has rows that write something else."""
    rows = torch.ones(count, device=scale.device, dtype=scale.dtype)
    rows[first : first + scale.shape[0]] = scale
    return rows


def _exact(site: Site, scale: Tensor, state: Mapping[str, Tensor], shape: LayerShape) -> tuple[Tensor, Tensor]:
    """Return the scale that can really be folded, and what is written: the norm's gain, or the linear's row scales."""
    if site.fold.kind == "norm":
        (norm,) = site.fold.into
        gain = state[f"{norm}.weight"].to(scale.device, torch.bfloat16)
        folded, real = exact_fold(gain, scale, offset=site.fold.gain_offset)
        return real, folded
    if site.fold.kind == "kv_rows":
        scale = share_over_heads(scale, kv_heads=shape.kv_heads, head_dim=shape.head_dim)
        return scale, scale.view(shape.kv_heads, -1, shape.head_dim)[:, 0].reshape(-1)
    return scale, scale


def _best_scale(
    site: Site,
    act_size: Tensor,
    weight_size: Tensor | None,
    state: Mapping[str, Tensor],
    shape: LayerShape,
    folds: Folds,
    error_of: SiteErrorOf,
) -> Tensor:
    """Return the scale of the strength of least output error; all ones are a candidate and win ties."""
    best = torch.ones_like(act_size)
    least = error_of(site, best, folds)
    for strength in STRENGTHS:
        scale = _scale(act_size, weight_size, strength)
        error = error_of(site, _exact(site, scale, state, shape)[0], folds)
        if error < least:
            best, least = scale, error
    return best


def _scale(act_size: Tensor, weight_size: Tensor | None, strength: float) -> Tensor:
    if weight_size is None:
        return activation_scale(act_size, strength)
    return smoothing_scale(act_size, weight_size, strength)


def _weight_size(site: Site, state: Mapping[str, Tensor], folds: Folds, config: TransformConfig) -> Tensor:
    """Return the size of each column over the linears of the site, as the config measures it."""
    total = torch.zeros_like(folds.columns[site.name])
    linears = site.linears
    if config.smooth_consumers == "reference":
        linears = tuple(name for name in linears if name.rpartition(".")[2] in _REFERENCE_CONSUMERS) or linears
    for linear in linears:
        stored = state[f"{linear}.weight"]
        for block in row_blocks(stored, BLOCK_ELEMENTS):
            folded = folds.weight(linear, stored[block], block)
            if config.smooth_statistic == "absmax":
                total = torch.maximum(total, folded.abs_().amax(0))
            else:
                total += folded.square_().sum(0)
    if config.smooth_statistic == "absmax":
        return total
    return (total / sum(state[f"{linear}.weight"].shape[0] for linear in linears)).sqrt_()


def _act_size(statistics: SiteStatistics, config: TransformConfig, site: Site) -> Tensor:
    """Return the size of each input channel, as the config measures it."""
    if config.smooth_statistic == "absmax":
        return statistics.absmax
    if config.smooth_statistic == "mean":
        return statistics.rows.float().abs_().mean(0)
    if statistics.mean_square is None:
        raise CalibrationError(
            f"smoothing of site {site.name} needs mean squares, and the calibration kept none", site=site.name
        )
    return statistics.mean_square.sqrt()
