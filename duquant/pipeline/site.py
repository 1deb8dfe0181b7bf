"""One site: its transformed weights a few rows at a time, its moments, and what rounding costs at its outputs."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from duquant.calibration.statistics import SiteStatistics
from duquant.config import ActivationConfig
from duquant.errors import CalibrationError
from duquant.models.architecture import Site
from duquant.pipeline.folds import BLOCK_ELEMENTS, Folds, row_blocks
from duquant.quantizers.activation import round_activations, search_clip
from duquant.quantizers.moments import check_moment
from duquant.quantizers.weight import QuantizedWeight
from duquant.transforms.site import Moments, SiteTransform

_ROW_STRIDE = 4


@dataclass(frozen=True)
class SiteWeights:
    """The weights of a site's linears, smoothed and transformed, made anew for every use: float32 takes much room."""

    site: Site
    state: Mapping[str, Tensor]
    """The layer's stored tensors, by their names inside it."""
    folds: Folds
    transform: SiteTransform
    """What the weights take, not the activations."""

    def blocks(self, linear: str, elements: int) -> Iterator[Float[Tensor, "rows in_features"]]:
        """Yield float32 blocks of rows of about so many elements."""
        stored = self.state[f"{linear}.weight"]
        for block in row_blocks(stored, elements):
            smoothed = self.folds.weight(linear, stored[block], block).mul_(self.folds.columns[self.site.name])
            yield self.transform.apply(smoothed)

    def moment(self, elements: int) -> Float[Tensor, "in_features in_features"]:
        """Return the sum of W^T W over all linears."""
        channels = self.folds.columns[self.site.name]
        total = torch.zeros(len(channels), len(channels), device=channels.device, dtype=torch.float32)
        for linear in self.site.linears:
            for W in self.blocks(linear, elements):
                total.addmm_(W.T, W)
        return total


def smoothed_moment(
    second_moment: Float[Tensor, "channels channels"], columns: Float[Tensor, " channels"]
) -> Float[Tensor, "channels channels"]:
    """Return the second moment of inputs that are divided by `columns`."""
    return second_moment / (columns[:, None] * columns)


def site_moments(statistics: SiteStatistics, columns: Float[Tensor, " channels"], weights: SiteWeights) -> Moments:
    """Return what a balanced transform is computed from; `weights` are not transformed yet.

    Raises:
        CalibrationError: there are no second moments, or no inputs give them.
    """
    return Moments(smoothed_moment(usable_moment(statistics), columns), weights.moment(BLOCK_ELEMENTS))


def usable_moment(statistics: SiteStatistics) -> Float[Tensor, "channels channels"]:
    """Return the second moment of a site's inputs.

    Raises:
        CalibrationError: the calibration kept none, or one that no inputs give.
    """
    if statistics.second_moment is None:
        raise CalibrationError("the recipe needs second moments, and the calibration kept none")
    check_moment(statistics.second_moment)
    return statistics.second_moment


def site_seed(seed: int, layer: int, site: str) -> int:
    """Return the seed of one site of one layer: the same on any worker, in any order."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{layer}/{site}".encode()).digest()[:6], "big")


def activation_clip(
    transformed: Float[Tensor, "sample channels"], weights: SiteWeights, config: ActivationConfig
) -> Float[Tensor, "2"]:
    """Return a site's clip ratios (low end, high end)."""
    if config.clip == "fixed":
        return torch.full((2,), config.clip_ratio, device=transformed.device, dtype=torch.float32)
    return search_clip(transformed, weights.moment(BLOCK_ELEMENTS), config)


class SiteError:
    """Sums the output error of a site's linears on the sampled rows, activations rounded as at run time."""

    def __init__(
        self,
        transformed: Float[Tensor, "sample channels"],
        clip_ratio: Float[Tensor, "2"],
        config: ActivationConfig,
        *,
        outliers: int = 0,
    ) -> None:
        # A quarter of the rows tells the error well enough, at a quarter of the products.
        self._X = transformed[::_ROW_STRIDE]
        self._rounded = round_activations(self._X, config, clip_ratio, outliers=outliers)
        self._error = 0.0
        self._power = 0.0

    def add(self, W: Float[Tensor, "rows in_features"], quantized: QuantizedWeight) -> None:
        """Add some rows of a weight."""
        exact = self._X @ W.T
        self._error += float((self._rounded @ quantized.dequantize().T - exact).square().sum())
        self._power += float(exact.square().sum())

    def nmse(self) -> float:
        """Return the squared error over the outputs' power."""
        return self._error / self._power if self._power else 0.0
