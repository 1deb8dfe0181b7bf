"""How the weights of a site are rounded."""

import logging
from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from duquant.calibration.statistics import SiteStatistics
from duquant.config import WeightConfig
from duquant.errors import CalibrationError
from duquant.pipeline.folds import BLOCK_ELEMENTS
from duquant.pipeline.prepare import PreparedSite
from duquant.pipeline.site import smoothed_moment, usable_moment
from duquant.quantizers.gptq import GPTQSolver
from duquant.quantizers.outliers import OUTLIER_WEIGHTS
from duquant.quantizers.weight import ClipRatios, QuantizedWeight, quantize_weight

_LOG = logging.getLogger(__name__)


class NearestRounder:
    """To the nearest code, row by row: small blocks do."""

    block_elements = BLOCK_ELEMENTS
    damp = 0.0
    """It damps nothing."""

    def __init__(
        self,
        transformed: Float[Tensor, "sample channels"],
        config: WeightConfig,
        second_moment: Tensor | None = None,
        *,
        outliers: int = 0,
    ) -> None:
        self._importance = torch.linalg.vector_norm(transformed, dim=0).square_()  # up to a factor, without a copy
        self._config = config
        self._second_moment = second_moment
        self._outliers = outliers

    def quantize(self, W: Float[Tensor, "rows in_features"], linear: str, first: int) -> QuantizedWeight:
        """Round each row by itself."""
        del linear, first
        most = W.shape[1] - self._outliers
        quantized = quantize_weight(W[:, :most], self._config, self._importance[:most], self._second_moment)
        if not self._outliers:
            return quantized
        return replace(quantized, outliers=quantize_weight(W[:, most:], OUTLIER_WEIGHTS))


class GPTQRounder:
    """By GPTQ. Each block walks all columns, so blocks are large."""

    block_elements = 1 << 22

    def __init__(self, second_moment: Tensor, config: WeightConfig, *, outliers: int = 0) -> None:
        self._outliers = outliers
        self._solver = GPTQSolver.from_second_moment(second_moment, config.damp, descends=config.descent_passes > 0)
        self._config = config
        self.damp = self._solver.damp

    def quantize(self, W: Float[Tensor, "rows in_features"], linear: str, first: int) -> QuantizedWeight:
        """Round column by column."""
        del linear, first
        return self._solver.quantize(W, self._config, outliers=self._outliers)


class LearnedRounder:
    """To the nearest code between ends that were learned for each row."""

    block_elements = BLOCK_ELEMENTS
    damp = 0.0

    def __init__(self, clips: Mapping[str, ClipRatios], config: WeightConfig) -> None:
        self._clips = clips
        self._config = config

    def quantize(self, W: Float[Tensor, "rows in_features"], linear: str, first: int) -> QuantizedWeight:
        """Round each row with its own ratios."""
        return quantize_weight(W, self._config, ratios=self._clips[linear].rows(first, W.shape[0]))


Rounder = NearestRounder | GPTQRounder | LearnedRounder
"""`quantize(W, linear, first)` rounds rows of `linear`, from row `first` on; `block_elements` or so at once."""


def make_rounder(
    prepared: PreparedSite,
    statistics: SiteStatistics,
    config: WeightConfig,
    clips: Mapping[str, ClipRatios],
    *,
    layer: int,
    outliers: int = 0,
) -> Rounder:
    """Return what rounds a site's weights.

    Args:
        prepared: the site.
        statistics: of its inputs.
        config: which solver, which clip.
        clips: learned ones by linear, for config.clip="learned".
        layer: the layer's index, for messages.
        outliers: how many channels, the last ones, keep 8 bits.

    Raises:
        CalibrationError: there is no usable second moment, and one is needed.
    """
    if config.clip == "learned":
        return LearnedRounder(clips, config)
    if config.solver == "rtn" and config.clip != "output":
        return NearestRounder(prepared.transformed, config, outliers=outliers)
    name = prepared.site.name
    try:
        H = smoothed_moment(usable_moment(statistics), prepared.weights.folds.columns[name])
        H = prepared.transform.apply_both(H)
        if config.solver == "gptq":
            rounder = GPTQRounder(H, config, outliers=outliers)
            if rounder.damp > config.damp:
                _LOG.warning(
                    "layer %d site %s: the second moment is not positive definite with weight.damp %g, so it was "
                    "damped with %g, where GPTQ gains less; calibrate on more tokens",
                    *(layer, name, config.damp, rounder.damp),
                )
            return rounder
        return NearestRounder(prepared.transformed, config, H)
    except CalibrationError as err:
        raise CalibrationError(f"layer {layer} site {name}: {err}", layer=layer, site=name) from err
