"""quantize_layer: one decoder layer in, the tensors of its packed shard out."""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from duquant.artifact.layout import smallest_index_type
from duquant.calibration.statistics import SiteStatistics
from duquant.config import Recipe
from duquant.errors import CalibrationError
from duquant.models.architecture import Architecture, Site
from duquant.pipeline.folds import LayerShape, smooth
from duquant.pipeline.site import SiteError, SiteWeights, activation_clip, make_rounder, site_moments
from duquant.quantizers.packing import pack
from duquant.quantizers.weight import QuantizedWeight
from duquant.transforms.site import SiteTransform, search_transform

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SiteReport:
    """How one site fared on the sampled rows."""

    peak_before: float
    """max|X| after smoothing, before the transform."""
    peak_after: float
    """max|T(X)|."""
    output_nmse: float
    """Squared error of the quantized linears' outputs over their power, all linears of the site together."""
    act_clip_low: float
    act_clip_high: float
    """What the low and the high end of a token's range are multiplied by."""
    damp: float
    """What gptq's second moment was damped by; 0 without gptq."""
    unseen_experts: int = 0
    """Experts that no calibration token was sent to: they are rounded by what the others saw."""


@dataclass(frozen=True)
class QuantizedLayer:
    """The shard's tensors, by their names inside the layer, and a report by site."""

    tensors: dict[str, Tensor]
    report: dict[str, SiteReport] = field(default_factory=dict)
    quantized_weights: int = 0
    """Number of weights that are packed now."""


def site_seed(seed: int, layer: int, site: str) -> int:
    """Return the seed of one site of one layer: the same on any worker, in any order."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{layer}/{site}".encode()).digest()[:6], "big")


@torch.no_grad()
def quantize_layer(
    tensors: Mapping[str, Tensor],
    statistics: Mapping[str, SiteStatistics],
    architecture: Architecture,
    shape: LayerShape,
    recipe: Recipe,
    *,
    layer: int,
) -> QuantizedLayer:
    """Smooth, transform, round and pack one layer: a pure function of its arguments.

    Args:
        tensors: the layer's parameters by their names inside it, in their stored dtype.
        statistics: by site name, from the unquantized model.
        architecture: where sites and folds are.
        shape: head counts, for smoothing under grouped-query attention.
        recipe: what to do.
        layer: the layer's index; with recipe.seed it decides every random choice.

    Raises:
        CalibrationError: a smoothing scale or a packed value is not finite.
    """
    sites = architecture.kept_sites(recipe.skip_linears, layer)
    state = dict(tensors)
    folds = smooth(state, statistics, sites, shape, recipe.transform)
    output: dict[str, Tensor] = {}
    report: dict[str, SiteReport] = {}
    count = 0
    for site in sites:
        columns = folds.columns[site.name]
        rows = statistics[site.name].rows.float().div_(columns)
        peak_before = _peak(rows)
        generator = torch.Generator().manual_seed(site_seed(recipe.seed, layer, site.name))
        weights = SiteWeights(site, state, folds, SiteTransform())
        try:
            moments = site_moments(statistics[site.name], columns, weights) if recipe.transform.is_balanced else None
            transform = search_transform(rows, recipe.transform, generator, moments)
        except CalibrationError as err:
            raise CalibrationError(f"layer {layer} site {site.name}: {err}", layer=layer, site=site.name) from err
        del moments
        transformed = transform.apply(rows)
        del rows
        weights = SiteWeights(site, state, folds, transform.for_weights())
        clip_ratio = activation_clip(transformed, weights, recipe.activation)
        try:
            rounder = make_rounder(statistics[site.name], transformed, columns, transform, recipe.weight)
        except CalibrationError as err:
            raise CalibrationError(f"layer {layer} site {site.name}: {err}", layer=layer, site=site.name) from err
        error = SiteError(transformed, clip_ratio, recipe.activation)
        for linear in site.linears:
            parts = []
            for W in weights.blocks(linear, rounder.block_elements):
                parts.append(rounder.quantize(W))
                error.add(W, parts[-1])
            count += state.pop(f"{linear}.weight").numel()
            quantized = QuantizedWeight.concatenate(parts)
            if not bool(torch.isfinite(quantized.scale).all()):
                raise CalibrationError(f"layer {layer} {linear}: the weight's scale is NaN or Inf", layer=layer)
            output.update(_packed_tensors(linear, quantized))
        output.update(_site_tensors(site, transform, clip_ratio))
        report[site.name] = SiteReport(
            peak_before=peak_before,
            peak_after=_peak(transformed),
            output_nmse=error.nmse(),
            act_clip_low=float(clip_ratio[0]),
            act_clip_high=float(clip_ratio[1]),
            damp=rounder.damp,
            unseen_experts=statistics[site.name].unseen_experts,
        )
    unseen = max((entry.unseen_experts for entry in report.values()), default=0)
    if unseen:
        log.warning("layer %d: no calibration token was sent to %d experts; more text reaches more", layer, unseen)
    # Norms, biases and linears that were left out keep 16 bits.
    output.update({name: folds.tensor(name, tensor).to(torch.bfloat16) for name, tensor in state.items()})
    return QuantizedLayer(tensors=output, report=report, quantized_weights=count)


def _peak(X: Tensor) -> float:
    low, high = torch.aminmax(X)
    return float(torch.maximum(-low, high))


def _packed_tensors(linear: str, quantized: QuantizedWeight) -> dict[str, Tensor]:
    """Return a linear's tensors in compressed-tensors' pack-quantized form."""
    tensors = {
        f"{linear}.weight_packed": pack(quantized.codes, bits=quantized.bits),
        f"{linear}.weight_scale": quantized.scale,
        f"{linear}.weight_shape": torch.tensor(quantized.codes.shape, dtype=torch.int64),
    }
    # Packed along the rows, as that format has it.
    zero_point = pack(quantized.zero_point.to(torch.int8).T.contiguous(), bits=quantized.bits).T
    tensors[f"{linear}.weight_zero_point"] = zero_point.contiguous()
    return tensors


def _site_tensors(site: Site, transform: SiteTransform, clip_ratio: Tensor) -> dict[str, Tensor]:
    """Return a site's online parts: rotations in float32, permutation, activation clip ratios (low end, high end)."""
    tensors = {f"{site.module}.act_clip_ratio": clip_ratio}
    if transform.R1 is not None:
        tensors[f"{site.module}.R1"] = transform.R1.float()
    if transform.perm is not None:
        tensors[f"{site.module}.perm"] = smallest_index_type(transform.perm)
    if transform.R2 is not None:
        tensors[f"{site.module}.R2"] = transform.R2.float()
    return tensors
