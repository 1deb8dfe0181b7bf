"""The INT4 KV cache: a transformers Cache whose layers hold packed codes."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from duquant.config import KVCacheConfig
from duquant.quantizers.kv import KVQuantizer, PackedKV


class DuQuantCacheLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped here
    """Keys and values of one layer, (batch, heads, tokens, ...), packed; `update` returns them dequantized."""

    is_sliding = False
    is_croppable = True

    def __init__(self, quantizer: KVQuantizer) -> None:
        super().__init__()
        self._quantizer = quantizer
        self._keys: PackedKV | None = None
        self._values: PackedKV | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Remember dtype and device of the first states."""
        del value_states
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self,
        key_states: Float[Tensor, "batch heads new_tokens head_dim"],
        value_states: Float[Tensor, "batch heads new_tokens head_dim"],
        *_args: Any,
        **_kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Quantize and append the new tokens; return all keys and all values, dequantized, in the states' dtype."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._keys = _append(self._keys, self._quantizer.quantize(key_states))
        self._values = _append(self._values, self._quantizer.quantize(value_states))
        return (
            self._quantizer.dequantize(self._keys, key_states.dtype),
            self._quantizer.dequantize(self._values, value_states.dtype),
        )

    def get_seq_length(self) -> int:
        """Return the number of cached tokens."""
        return 0 if self._keys is None else self._keys.packed.shape[2]

    def get_max_length(self) -> int:
        """Return -1: the cache grows."""
        return -1

    def get_max_cache_shape(self) -> int:
        """Return -1: the cache grows (the name before transformers 5.2)."""
        return -1

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Return (length, offset) of the keys that the next `query_length` queries see."""
        new = query_length.shape[0] if isinstance(query_length, Tensor) else int(query_length)
        return self.get_seq_length() + new, 0

    def reset(self) -> None:
        """Forget all tokens."""
        self._keys = self._values = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens; the count is negative, as in transformers' dynamic cache."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, not {tokens_to_remove}")
        if tokens_to_remove < 0:
            self._map(lambda t: t[:, :, :tokens_to_remove])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Pick batch rows for beam search."""
        self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row."""
        self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some batch rows."""
        self._map(lambda t: t[indices])

    def size_bytes(self) -> int:
        """Return the bytes that the packed codes and their grids take."""
        parts = [t for kv in (self._keys, self._values) if kv is not None for t in kv]
        return sum(t.numel() * t.element_size() for t in parts)

    def _map(self, change: Any) -> None:
        if self._keys is not None and self._values is not None:
            self._keys = PackedKV(*(change(t) for t in self._keys))
            self._values = PackedKV(*(change(t) for t in self._values))


class DuQuantCache(Cache):  # type: ignore[misc]  # transformers is untyped here
    """A KV cache of packed codes for all layers of a model; pass it as `past_key_values`."""

    def __init__(self, config: KVCacheConfig, *, layers: int, head_dim: int) -> None:
        quantizer = KVQuantizer(config, head_dim)
        super().__init__(layers=[DuQuantCacheLayer(quantizer) for _ in range(layers)])

    def size_bytes(self) -> int:
        """Return the bytes held."""
        return sum(layer.size_bytes() for layer in self.layers)


def _append(old: PackedKV | None, new: PackedKV) -> PackedKV:
    if old is None:
        return new
    return PackedKV(*(torch.cat(pair, dim=2) for pair in zip(old, new, strict=True)))
