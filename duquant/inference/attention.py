"""Attention over the packed cache, plugged into transformers as an attention implementation of its own."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from duquant.inference.cache import CachedStates
from duquant.kernels import int4_kv_attention

IMPLEMENTATION = "duquant"
"""The name in `config._attn_implementation`. A cache then hands out its states packed."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | CachedStates,
    value: Tensor | CachedStates,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend as transformers' `sdpa`; with one new token, straight from the cache's codes.

    Returns: the output, (batch, tokens, heads, head_dim), and no weights.
    """
    if isinstance(key, CachedStates):
        assert isinstance(value, CachedStates)
        output = _from_codes(query, key, value, attention_mask, kwargs.get("scaling"))
        if output is not None:
            return output.transpose(1, 2), None
        key, value = key.read(query.dtype), value.read(query.dtype)
    result: tuple[Tensor, Tensor | None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return result


def _from_codes(
    query: Tensor, keys: CachedStates, values: CachedStates, mask: Tensor | None, scaling: float | None
) -> Tensor | None:
    packed_keys, packed_values = keys.packed, values.packed
    is_one_token = query.shape[2] == 1 and (mask is None or mask.shape[1] == 1)
    if not is_one_token or scaling is None or packed_keys is None or packed_values is None:
        return None
    if keys.quantizer.config.bits != 4 or (torch.is_grad_enabled() and query.requires_grad):
        return None
    if keys.smoothing is not None:
        query = keys.smoothing.of_queries(query)
    sinks = None if keys.sinks is None or values.sinks is None else (keys.sinks, values.sinks)
    return int4_kv_attention(query, packed_keys, packed_values, keys.quantizer, scaling=scaling, mask=mask, sinks=sinks)


AttentionInterface.register(IMPLEMENTATION, packed_attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
