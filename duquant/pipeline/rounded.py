"""What run time rounds in a layer, done so that gradients pass: the inputs of linears, keys and values."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from duquant.config import ActivationConfig
from duquant.quantizers.activation import round_activations
from duquant.quantizers.keys import KeySmoothing
from duquant.quantizers.kv import KVQuantizer


def rounded_rows(
    X: Float[Tensor, "tokens channels"], config: ActivationConfig, clip_ratio: Float[Tensor, "2"]
) -> Float[Tensor, "tokens channels"]:
    """Return transformed rows as they enter the linears, in the dtype of `X`; rounding passes gradients as they are."""
    exact = X.detach().float()
    return X + (round_activations(exact, config, clip_ratio) - exact).to(X.dtype)


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
        if self._R2 is not None:
            return self._rounded(keys), self._rounded(values @ self._R2) @ self._R2.T
        return self._rounded(keys, self._smoothing), self._rounded(values)

    @torch.no_grad()
    def _error(self, X: Tensor, smoothing: KeySmoothing | None) -> Tensor:
        assert self._quantizer is not None
        kept = X if smoothing is None else smoothing.smooth(X)
        found = self._quantizer.dequantize(self._quantizer.quantize(kept), X.dtype)
        error = (found if smoothing is None else smoothing.restore(found)) - X
        error[:, :, : self._quantizer.config.sink_tokens] = 0.0
        return error

    def _rounded(self, X: Tensor, smoothing: KeySmoothing | None = None) -> Tensor:
        return X if self._quantizer is None else X + self._error(X, smoothing)
