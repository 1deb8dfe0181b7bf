"""What run time rounds in a layer, done so that gradients pass: the inputs of linears, keys and values."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from duquant.config import ActivationConfig
from duquant.quantizers.activation import round_activations
from duquant.quantizers.keys import KeySmoothing
from duquant.quantizers.kv import KVQuantizer


def rounded_rows(
    X: Float[Tensor, "tokens channels"], config: ActivationConfig, clip_ratio: Float[Tensor, "2"]
) -> Float[Tensor, "tokens channels"]:
    """Return transformed rows as they enter the linears, in the dtype of `X`.

    Rounding passes the gradient of `X` as it is; the clip ratio has none.
    """
    rounded: Tensor = _Straight.apply(X, config, clip_ratio)  # type: ignore[no-untyped-call]  # torch's
    return rounded


class _Straight(torch.autograd.Function):
    """Rounding, whose gradient is that of the identity."""

    @staticmethod
    def forward(_ctx: Any, X: Tensor, config: ActivationConfig, clip_ratio: Tensor) -> Tensor:
        rounded = round_activations(X.float(), config, clip_ratio).to(X.dtype)
        return X.clone() if rounded is X else rounded

    @staticmethod
    @once_differentiable
    def backward(_ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient, None, None


class RoundedStates:
    """Stands where a KV cache would: attention sees keys and values as a packed cache gives them back.

    Args:
        quantizer: of the cache; None rounds nothing.
        R2: values are rounded in the basis that it gives them, (head_dim, head_dim).
        smoothing: of the keys.
    """

    def __init__(
        self,
        quantizer: KVQuantizer | None,
        *,
        R2: Float[Tensor, "head_dim head_dim"] | None = None,
        smoothing: KeySmoothing | None = None,
    ) -> None:
        self._quantizer = quantizer
        self._R2 = R2
        self._smoothing = smoothing

    def update(self, keys: Tensor, values: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return keys and values, (batch, heads, tokens, head_dim), rounded."""
        if self._quantizer is None:
            return keys, values
        keys = keys + _error(keys, self._quantizer, self._smoothing)
        if self._R2 is None:
            return keys, values + _error(values, self._quantizer)
        rotated = values @ self._R2
        return keys, (rotated + _error(rotated, self._quantizer)) @ self._R2.T


@torch.no_grad()
def _error(X: Tensor, quantizer: KVQuantizer, smoothing: KeySmoothing | None = None) -> Tensor:
    """Return what a packed cache adds to keys or values; nothing for the first tokens, which it does not pack."""
    kept = X if smoothing is None else smoothing.smooth(X)
    found = quantizer.dequantize(quantizer.quantize(kept), X.dtype)
    error = (found if smoothing is None else smoothing.restore(found)) - X
    error[:, :, : quantizer.config.sink_tokens] = 0.0
    return error
