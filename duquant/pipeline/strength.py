"""The output error of a site under a smoothing scale: what the search of its strength makes small."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from duquant.calibration.statistics import SiteStatistics
from duquant.config import Recipe, TransformConfig
from duquant.models.architecture import Site
from duquant.pipeline.candidates import candidate_error
from duquant.pipeline.folds import Folds, SiteErrorOf
from duquant.pipeline.site import SiteWeights, site_seed
from duquant.transforms.site import search_transform


def smoothing_error(
    state: Mapping[str, Tensor], statistics: Mapping[str, SiteStatistics], recipe: Recipe, layer: int
) -> SiteErrorOf:
    """Return the function that `smooth` asks for a site's output error, all linears of the site together.

    Ten candidates at every site have to be cheap: weights are rounded as `candidate_error` does, and a greedy or a
    balanced transform is stood in for by Hadamard blocks of the same sides. The candidates differ in the scale alone.
    """
    transform_config = _stand_in(recipe.transform)

    def error_of(site: Site, columns: Tensor, folds: Folds) -> float:
        rows = statistics[site.name].rows.float().div_(columns)
        generator = torch.Generator().manual_seed(site_seed(recipe.seed, layer, site.name))
        transform = search_transform(rows, transform_config, generator)
        smoothed = Folds(columns={site.name: columns}, rows=folds.rows)
        weights = SiteWeights(site, state, smoothed, transform.for_weights())
        return candidate_error(transform.apply(rows), weights, recipe)

    return error_of


def _stand_in(config: TransformConfig) -> TransformConfig:
    if config.rotation in ("none", "hadamard"):
        return config
    return replace(config, rotation="hadamard", shared_rotation=True, rotation_dtype="float32")
