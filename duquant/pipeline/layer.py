"""quantize_layer: one decoder layer in, the tensors of its packed shard out."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from duquant.artifact.layout import KEY_SMOOTHING, smallest_index_type
from duquant.calibration.keys import KeyStatistics
from duquant.calibration.statistics import SiteStatistics
from duquant.config import Recipe
from duquant.errors import CalibrationError
from duquant.models.architecture import Architecture, Site
from duquant.pipeline.epochs import LearningReport
from duquant.pipeline.folds import LayerShape, fold_learned, smooth
from duquant.pipeline.learning import LayerSamples, learn
from duquant.pipeline.prepare import PreparedSite, prepare_site
from duquant.pipeline.rounding import Rounder, make_rounder
from duquant.pipeline.site import SiteError
from duquant.pipeline.strength import smoothing_error
from duquant.quantizers.keys import key_smoothing
from duquant.quantizers.packing import pack
from duquant.quantizers.weight import QuantizedWeight
from duquant.transforms.site import SiteTransform

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
    is_aligned: bool = False
    """Whether the transform maps the inputs' dominant direction onto the zero points."""
    unseen_experts: int = 0
    """Experts that no calibration token was sent to: they are rounded by what the others saw."""


@dataclass(frozen=True)
class QuantizedLayer:
    """The shard's tensors, by their names inside the layer, and a report by site."""

    tensors: dict[str, Tensor]
    report: dict[str, SiteReport] = field(default_factory=dict)
    quantized_weights: int = 0
    """Number of weights that are packed now."""
    learning: LearningReport | None = None
    """How learning went, for recipes that learn."""

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """Return the reports as plain numbers, by site; how learning went stands under `learning`."""
        found = {name: asdict(entry) for name, entry in self.report.items()}
        if self.learning is not None:
            found["learning"] = {name: float(value) for name, value in asdict(self.learning).items()}
        return found


@torch.no_grad()
def quantize_layer(
    tensors: Mapping[str, Tensor],
    statistics: Mapping[str, SiteStatistics],
    architecture: Architecture,
    shape: LayerShape,
    recipe: Recipe,
    *,
    layer: int,
    samples: LayerSamples | None = None,
    keys: KeyStatistics | None = None,
) -> QuantizedLayer:
    """Smooth, transform, round and pack one layer: a pure function of its arguments.

    Args:
        tensors: the layer's parameters by their names inside it, in their stored dtype.
        statistics: by site name, from the unquantized layer on the inputs that it is calibrated on.
        architecture: where sites and folds are.
        shape: head counts, for smoothing under grouped-query attention.
        recipe: what to do.
        layer: the layer's index; with recipe.seed it decides every random choice.
        samples: inputs of the layer, for recipes that learn.
        keys: statistics of its keys, for recipes that smooth them.

    Raises:
        CalibrationError: a smoothing scale, a loss or a packed value is not finite, or statistics are missing.
    """
    sites = architecture.kept_sites(recipe.skip_linears, layer)
    state = dict(tensors)
    error_of = smoothing_error(state, statistics, recipe, layer)
    try:
        folds = smooth(state, statistics, sites, shape, recipe.transform, error_of)
    except CalibrationError as err:
        raise CalibrationError(f"layer {layer}: {err}", layer=layer, **err.facts) from err

    def prepare() -> Iterator[PreparedSite]:
        return (prepare_site(site, state, statistics[site.name], folds, recipe, layer=layer) for site in sites)

    # One by one: float32 rows and rotations of all sites at once take room. Learning needs them together.
    prepared: Iterable[PreparedSite] = prepare()
    learned = None
    if recipe.learns_by_layer and sites:
        if samples is None:
            raise CalibrationError(f"layer {layer}: the recipe learns, and the calibration kept no inputs", layer=layer)
        prepared = list(prepared)
        learned = learn(prepared, tensors, state, folds, shape, samples, recipe, layer=layer)
        for site in sites:
            if site.name in learned.smooth:
                fold_learned(site, learned.smooth[site.name], state, shape, folds)
        if learned.smooth:
            prepared = prepare()
    output = _key_tensors(keys, recipe, layer)
    report: dict[str, SiteReport] = {}
    count = 0
    for each in prepared:
        site = each.site
        rounder = make_rounder(
            each,
            statistics[site.name],
            recipe.weight,
            learned.clips if learned else {},
            layer=layer,
            outliers=recipe.outlier_channels,
        )
        error = SiteError(each.transformed, each.clip_ratio, recipe.activation, outliers=recipe.outlier_channels)
        for linear in site.linears:
            try:
                quantized = _rounded(linear, each, rounder, error)
            except CalibrationError as err:
                raise CalibrationError(f"layer {layer} {linear}: {err}", layer=layer) from err
            count += state.pop(f"{linear}.weight").numel()
            output.update(_packed_tensors(linear, quantized))
        output.update(_site_tensors(site, each.transform, each.clip_ratio))
        report[site.name] = SiteReport(
            peak_before=each.peak_before,
            peak_after=each.peak_after,
            output_nmse=error.nmse(),
            act_clip_low=float(each.clip_ratio[0]),
            act_clip_high=float(each.clip_ratio[1]),
            damp=rounder.damp,
            is_aligned=each.is_aligned,
            unseen_experts=statistics[site.name].unseen_experts,
        )
    unseen = max((entry.unseen_experts for entry in report.values()), default=0)
    if unseen:
        log.warning("layer %d: no calibration token was sent to %d experts; more text reaches more", layer, unseen)
    # Norms, biases and linears that were left out keep 16 bits.
    output.update({name: folds.tensor(name, tensor).to(torch.bfloat16) for name, tensor in state.items()})
    return QuantizedLayer(output, report, quantized_weights=count, learning=learned.report if learned else None)


def _rounded(linear: str, prepared: PreparedSite, rounder: Rounder, error: SiteError) -> QuantizedWeight:
    """Return a linear's rounded weight; `error` is told of it."""
    parts: list[QuantizedWeight] = []
    first = 0
    for W in prepared.weights.blocks(linear, rounder.block_elements):
        parts.append(rounder.quantize(W, linear, first))
        error.add(W, parts[-1])
        first += W.shape[0]
    quantized = QuantizedWeight.concatenate(parts)
    if not quantized.is_finite:
        raise CalibrationError("the weight's scale is NaN or Inf")
    return quantized


def _key_tensors(statistics: KeyStatistics | None, recipe: Recipe, layer: int) -> dict[str, Tensor]:
    """Return what the cache does to keys before it rounds them, for recipes that smooth them."""
    if not recipe.kv_cache.smooth_keys:
        return {}
    if statistics is None:
        raise CalibrationError(
            f"layer {layer}: the recipe smooths keys, and the calibration kept no statistics of them", layer=layer
        )
    smoothing = key_smoothing(*statistics.means())
    return {f"{KEY_SMOOTHING}.{name}": getattr(smoothing, name) for name in ("center", "smooth_scale")}


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
    if quantized.outliers is not None:  # symmetric: all their zero points are 0
        tensors[f"{linear}.outlier_packed"] = pack(quantized.outliers.codes, bits=quantized.outliers.bits)
        tensors[f"{linear}.outlier_scale"] = quantized.outliers.scale
    return tensors


def _site_tensors(site: Site, transform: SiteTransform, clip_ratio: Tensor) -> dict[str, Tensor]:
    """Return a site's online parts: rotations, permutation, activation clip ratios (low end, high end)."""
    tensors = {f"{site.module}.act_clip_ratio": clip_ratio}
    if transform.R1 is not None:
        tensors[f"{site.module}.R1"] = transform.R1
    if transform.perm is not None:
        tensors[f"{site.module}.perm"] = smallest_index_type(transform.perm)
    if transform.R2 is not None:
        tensors[f"{site.module}.R2"] = transform.R2
    return tensors
