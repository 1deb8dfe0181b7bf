"""Smoothing of cached keys: a centre and a scale for each channel of a head, which attention does not notice.

    scores = q kᵀ = (q s) ((k - c) / s)ᵀ + q cᵀ

q cᵀ is the same for every key that a query looks at, so softmax cancels it. Only (k - c) / s is rounded: c takes off
what all keys have in common, s evens out what is left against what queries make of its errors. Taking the mean off keys
is SageAttention's (arXiv 2410.02367; there of the keys at hand, here of the calibration text, so that a cache can grow
token by token); the scale is smoothing as in duquant.transforms.balance with a diagonal map.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

_DAMP = 0.01


@dataclass(frozen=True)
class KeySmoothing:
    """What keys of one layer are rounded as; all heads' channels, float32."""

    center: Float[Tensor, "kv_heads head_dim"]
    smooth_scale: Float[Tensor, "kv_heads head_dim"]

    def smooth(self, keys: Float[Tensor, "batch kv_heads tokens head_dim"]) -> Tensor:
        """Return (keys - center) / smooth_scale in the dtype of `keys`."""
        return ((keys - self.center[:, None]) / self.smooth_scale[:, None]).to(keys.dtype)

    def restore(self, smoothed: Float[Tensor, "batch kv_heads tokens head_dim"]) -> Tensor:
        """Return the keys that `smooth` was given, up to rounding, in the dtype of `smoothed`."""
        return (smoothed * self.smooth_scale[:, None] + self.center[:, None]).to(smoothed.dtype)

    def of_queries(self, queries: Float[Tensor, "batch heads tokens head_dim"]) -> Tensor:
        """Return queries that make of smoothed keys the scores of the keys, up to a constant for each query."""
        kv_heads, head_dim = self.smooth_scale.shape
        by_key_head = queries.reshape(queries.shape[0], kv_heads, -1, queries.shape[2], head_dim)
        return (by_key_head * self.smooth_scale[:, None, None]).to(queries.dtype).view(queries.shape)


def key_smoothing(
    key_mean: Float[Tensor, "kv_heads head_dim"],
    key_square: Float[Tensor, "kv_heads head_dim"],
    query_square: Float[Tensor, "kv_heads head_dim"],
) -> KeySmoothing:
    """Return the smoothing of least expected error in the scores.

    A rounded key errs alike in all channels of its rotated head, in proportion to its norm. With V the channels'
    variances scores err in proportion to (sum V_j / s_j^2) (sum Q_j s_j^2), least at s_j^4 = V_j / Q_j.

    Args:
        key_mean: mean of the keys.
        key_square: mean of their squares.
        query_square: mean of the squares of the queries that look at them, up to a factor for each head.
    """
    variance = (key_square.double() - key_mean.double().square()).clamp_min(0.0)
    smooth_scale = (_damped(variance) / _damped(query_square.double())).pow(0.25)
    return KeySmoothing(center=key_mean.float(), smooth_scale=smooth_scale.float())


def _damped(squares: Tensor) -> Tensor:
    """Add a share of each head's mean, so that dead channels stay bounded, and dead heads too."""
    mean = squares.mean(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    # A common factor of a head scales all its channels alike, which no grid minds.
    return squares / mean + _DAMP
