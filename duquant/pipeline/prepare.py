"""What is decided at a site before its weights are rounded: the transform and the activations' clip ratios."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from duquant.calibration.statistics import SiteStatistics
from duquant.config import Recipe
from duquant.errors import CalibrationError
from duquant.models.architecture import Site
from duquant.pipeline.candidates import candidate_error
from duquant.pipeline.folds import Folds
from duquant.pipeline.site import SiteWeights, activation_clip, site_moments, site_seed
from duquant.quantizers.outliers import by_energy
from duquant.transforms.alignment import align
from duquant.transforms.site import SiteTransform, search_transform


@dataclass(frozen=True)
class PreparedSite:
    """A site whose weights can be rounded."""

    site: Site
    transform: SiteTransform
    weights: SiteWeights
    """Smoothed and transformed."""
    transformed: Float[Tensor, "sample channels"]
    """The sampled rows, smoothed and transformed."""
    clip_ratio: Float[Tensor, "2"]
    """Of the activations: low end, high end."""
    peak_before: float
    """max|X| after smoothing, before the transform."""
    is_aligned: bool = False
    """Whether the transform maps the inputs' dominant direction onto the zero points."""

    @property
    def peak_after(self) -> float:
        """Return max|T(X)|."""
        return _peak(self.transformed)


def prepare_site(
    site: Site,
    state: Mapping[str, Tensor],
    statistics: SiteStatistics,
    folds: Folds,
    recipe: Recipe,
    *,
    layer: int,
) -> PreparedSite:
    """Choose the transform and the activation clip of a site.

    Args:
        site: which.
        state: the layer's tensors.
        statistics: of the site.
        folds: the smoothing of the layer.
        recipe: what to do.
        layer: the layer's index, for the seed and for messages.

    Raises:
        CalibrationError: there are no second moments where the recipe needs them, or no inputs give them.
    """
    columns = folds.columns[site.name]
    rows = statistics.rows.float().div_(columns)
    peak_before = _peak(rows)
    generator = torch.Generator().manual_seed(site_seed(recipe.seed, layer, site.name))
    weights = SiteWeights(site, state, folds, SiteTransform())
    try:
        moments = site_moments(statistics, columns, weights) if recipe.transform.is_balanced else None
        found = search_transform(rows, recipe.transform.online_at(site.name), generator, moments)
        if recipe.outlier_channels:
            found = SiteTransform(perm=by_energy(rows))
    except CalibrationError as err:
        raise CalibrationError(f"layer {layer} site {site.name}: {err}", layer=layer, site=site.name) from err
    del moments
    transform = _aligned(found, rows, weights, recipe)
    transformed = transform.apply(rows)
    del rows
    weights = replace(weights, transform=transform.for_weights())
    return PreparedSite(
        site=site,
        transform=transform,
        weights=weights,
        transformed=transformed,
        clip_ratio=activation_clip(transformed, weights, recipe.activation),
        peak_before=peak_before,
        is_aligned=transform is not found,
    )


def _aligned(
    transform: SiteTransform, rows: Float[Tensor, "sample channels"], weights: SiteWeights, recipe: Recipe
) -> SiteTransform:
    """Return the transform, aligned where the recipe wants that; `weights` are smoothed and not transformed."""
    if recipe.transform.alignment == "none":
        return transform
    aligned = align(transform, rows)
    if recipe.transform.alignment == "always":
        return aligned
    before, after = (
        candidate_error(each.apply(rows), replace(weights, transform=each.for_weights()), recipe)
        for each in (transform, aligned)
    )
    return aligned if after < before else transform


def _peak(X: Tensor) -> float:
    low, high = torch.aminmax(X)
    return float(torch.maximum(-low, high))
