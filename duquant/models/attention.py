"""An attention implementation for transformers that shows what it attends with: `sdpa`, with someone watching."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

OBSERVABLE = "duquant_observable"
"""The name in `config._attn_implementation`."""
_OBSERVER = "_duquant_observer"

AttentionObserver = Callable[[Tensor, Tensor], None]
"""Called with queries (batch, heads, tokens, head_dim) and keys (batch, kv_heads, tokens, head_dim), both after the
rotary embedding and after norms of their own."""


def _observable_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    observer: AttentionObserver | None = module.__dict__.get(_OBSERVER)
    if observer is not None:
        observer(query, key)
    result: tuple[Tensor, Tensor | None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return result


def head_dim_of(config: Any) -> int:
    """Return the channels of one head by a transformers config; not every family's says it."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


@contextmanager
def observed(layer: nn.Module, observer: AttentionObserver) -> Iterator[None]:
    """Let `observer` see queries and keys of every forward pass of a skeleton's decoder layer in the `with` block."""
    attention = layer.get_submodule("self_attn")
    attention.__dict__[_OBSERVER] = observer
    try:
        yield
    finally:
        del attention.__dict__[_OBSERVER]


AttentionInterface.register(OBSERVABLE, _observable_attention)
AttentionMaskInterface.register(OBSERVABLE, sdpa_mask)
