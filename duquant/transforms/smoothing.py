"""Smoothing: moving outliers from activations to weights by one scale per channel."""

import torch
from jaxtyping import Float
from torch import Tensor

MIN_SCALE = 1e-2
_FLOOR = 1e-5


def smoothing_scale(
    act_size: Float[Tensor, " channels"],
    weight_size: Float[Tensor, " channels"],
    alpha: float,
) -> Float[Tensor, " channels"]:
    """Return smooth_scale = |X|^alpha / |W|^(1 - alpha) per channel, float32, at least 0.01.

    X is divided by it and every weight that reads X is multiplied by it. A dead channel (zero on either side) keeps 1.

    Args:
        act_size: of each channel over the calibration tokens: max|X| as in the papers, or its root mean square, which
            with alpha = 1/2 is the best scale for inputs that are rotated afterwards (see duquant.transforms.balance).
        weight_size: likewise over *all* linears that read X (the authors' code looks at q_proj and up_proj only).
        alpha: migration strength; 0 leaves the activations alone, 1 makes them all alike.

    Reference: SmoothQuant, arXiv 2211.10438v7, equation 4; DuQuant, arXiv 2406.01721v3, equation 2.
    """
    act_size, weight_size = act_size.float(), weight_size.float()
    scale = act_size.clamp_min(_FLOOR) ** alpha / weight_size.clamp_min(_FLOOR) ** (1 - alpha)
    dead = (act_size == 0) | (weight_size == 0)
    return torch.where(dead, 1.0, scale.clamp_min(MIN_SCALE))


def activation_scale(act_size: Float[Tensor, " channels"], alpha: float) -> Float[Tensor, " channels"]:
    """Return smooth_scale = |X|^alpha per channel, its largest and smallest balanced around 1, float32.

    A dead channel keeps 1.

    Args:
        act_size: mean magnitude of each channel over the calibration tokens.
        alpha: 0 leaves everything alone.

    Reference: AWQ, arXiv 2306.00978v5, equations 4 and 5, with the normalization of the authors' code.
    """
    scale = act_size.float().clamp_min(_FLOOR) ** alpha
    live = scale[act_size != 0]
    if live.numel():
        scale = scale / (live.max() * live.min()).sqrt()
    return torch.where(act_size == 0, 1.0, scale)


def share_over_heads(scale: Float[Tensor, " channels"], *, kv_heads: int, head_dim: int) -> Float[Tensor, " channels"]:
    """Return the scale made equal for all query heads that read one KV head (their maximum).

    The input channel (query head, d) of o_proj is a mixture of value rows (its KV head, d). One scale per KV channel
    therefore folds into v_proj exactly, also with grouped-query attention, where the authors' code divides online.
    """
    grouped = scale.view(kv_heads, -1, head_dim)  # (kv_heads, query heads of each, head_dim)
    return grouped.amax(1, keepdim=True).expand_as(grouped).reshape(-1)


def exact_fold(
    gain: Float[Tensor, " channels"], scale: Float[Tensor, " channels"], *, offset: float = 0.0
) -> tuple[Float[Tensor, " channels"], Float[Tensor, " channels"]]:
    """Return (folded gain in the gain's dtype, the scale that was really folded, float32).

    A norm multiplies by offset + gain. The quotient (offset + gain) / scale is stored in the gain's dtype (bfloat16,
    say), less the offset; the scale is then redefined as (offset + gain) / (offset + folded), so that weights
    multiplied by it cancel the folded gain exactly instead of up to rounding. A channel whose folded gain would be
    zero or not finite keeps the scale 1. With an offset of 1, quotients far below 1 are stored coarsely, in steps of
    up to 1/256 in bfloat16: the scale is then not quite the one that was asked for, and cancels nonetheless.
    """
    full = gain.float() + offset
    folded = (full / scale - offset).to(gain.dtype)
    kept = folded.float() + offset
    usable = (kept != 0) & torch.isfinite(kept)
    folded = torch.where(usable, folded, gain)
    real = torch.where(usable & (full != 0), full / kept, 1.0)
    return folded, real
