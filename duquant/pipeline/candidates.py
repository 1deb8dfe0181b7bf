"""What a choice of smoothing or transform costs at the outputs of a site, cheaply: candidates are compared by it."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from duquant.config import Recipe
from duquant.pipeline.folds import BLOCK_ELEMENTS
from duquant.pipeline.site import SiteError, SiteWeights
from duquant.quantizers.weight import quantize_weight


def candidate_error(transformed: Float[Tensor, "sample channels"], weights: SiteWeights, recipe: Recipe) -> float:
    """Return the output error of a site's linears over their power, weights rounded to nearest with a fixed clip.

    Args:
        transformed: sampled rows of the site, smoothed and transformed.
        weights: of the site, smoothed and transformed.
        recipe: how both are rounded, but for what would have to be searched or solved.
    """
    weight_config = recipe.weight
    if weight_config.clip != "fixed":
        weight_config = replace(weight_config, clip="none")
    ratio = recipe.activation.clip_ratio
    clip_ratio = torch.full((2,), ratio, device=transformed.device, dtype=torch.float32)
    error = SiteError(transformed, clip_ratio, recipe.activation)
    for linear in weights.site.linears:
        for W in weights.blocks(linear, BLOCK_ELEMENTS):
            error.add(W, quantize_weight(W, weight_config))
    return error.nmse()
