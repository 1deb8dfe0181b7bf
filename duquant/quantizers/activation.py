"""Rounding of activations: the clip ratios of a site, fixed or searched by the error they cause in its outputs."""

import torch
from jaxtyping import Float
from torch import Tensor

from duquant.config import ActivationConfig
from duquant.quantizers.affine import fake_quantize, row_grid
from duquant.quantizers.outliers import OUTLIER_ACTIVATIONS
from duquant.quantizers.weight import CLIP_CANDIDATES, END_FACTORS, resolve_group_size


def round_activations(
    X: Float[Tensor, "tokens channels"],
    config: ActivationConfig,
    clip_ratio: Float[Tensor, "2"],
    *,
    outliers: int = 0,
) -> Float[Tensor, "tokens channels"]:
    """Return `X` as it is at run time: rounded to the grids of each token, or untouched at 16 bits.

    The last `outliers` channels are rounded by themselves; see duquant.quantizers.outliers.
    """
    if config.bits == 16:
        return X
    if outliers:
        most = round_activations(X[:, :-outliers], config, clip_ratio)
        last = round_activations(X[:, -outliers:], OUTLIER_ACTIVATIONS, torch.ones_like(clip_ratio))
        return torch.cat((most, last), dim=1)
    if config.group_size is not None:
        grouped = X.reshape(X.shape[0], -1, resolve_group_size(X.shape[1], config.group_size))
        grid = row_grid(grouped, bits=config.bits, symmetric=config.symmetric, clip_ratio=clip_ratio)
        return fake_quantize(grouped, grid).view(X.shape)
    return fake_quantize(X, row_grid(X, bits=config.bits, symmetric=config.symmetric, clip_ratio=clip_ratio))


def search_clip(
    X: Float[Tensor, "tokens channels"], weight_moment: Float[Tensor, "channels channels"], config: ActivationConfig
) -> Float[Tensor, "2"]:
    """Return the clip ratios (low end, high end) of least squared error in the outputs of a site's linears.

    First both ends together, then, where the grid has two ends of its own, each by itself.

    Args:
        X: a sample of the site's transformed inputs.
        weight_moment: sum of W^T W over the site's transformed weights, so that an error e of an input costs
            e (W^T W) e^T at the outputs.
        config: bits and symmetry.
    """
    best = torch.ones(2, device=X.device, dtype=torch.float32)
    if config.bits == 16:
        return best
    least = torch.inf
    for ratio in CLIP_CANDIDATES:
        candidate = torch.full_like(best, ratio)
        cost = _cost(X, weight_moment, config, candidate)
        if cost < least:
            best, least = candidate, cost
    if config.symmetric:
        return best
    together = best
    for end in (0, 1):
        for factor in END_FACTORS:
            candidate = best.clone()
            candidate[end] = (together[end] * factor).clamp_max(1.0)
            cost = _cost(X, weight_moment, config, candidate)
            if cost < least:
                best, least = candidate, cost
    return best


def _cost(X: Tensor, weight_moment: Tensor, config: ActivationConfig, clip_ratio: Tensor) -> float:
    error = round_activations(X, config, clip_ratio).sub_(X)
    return float((error @ weight_moment).mul_(error).sum())
