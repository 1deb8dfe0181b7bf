"""The INT4 KV cache: a transformers Cache whose layers hold packed codes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from duquant.config import KVCacheConfig
from duquant.kernels import dequantize_kv, quantize_kv
from duquant.quantizers.keys import KeySmoothing
from duquant.quantizers.kv import KVQuantizer, PackedKV

_LEAST_ROOM = 32


class CachedStates:
    """Keys or values of one layer, (batch, heads, tokens, ...); the first `sink_tokens` are not packed.

    Codes are written into buffers with room to spare, so that a new token costs no copy of the old ones. With a
    `smoothing`, for keys, all of it is smoothed, the sinks too, and `read` restores it.
    """

    def __init__(self, quantizer: KVQuantizer, smoothing: KeySmoothing | None = None) -> None:
        self.quantizer = quantizer
        self.smoothing = smoothing
        self.sinks: Tensor | None = None
        self._buffers: PackedKV | None = None
        self._first = 0
        """Where the packed tokens begin in the buffers: those before are forgotten."""
        self._count = 0
        self._seen = 0
        """Tokens since the start of the sequence, forgotten ones among them."""

    def __len__(self) -> int:
        return (0 if self.sinks is None else self.sinks.shape[2]) + self._count

    @property
    def packed(self) -> PackedKV | None:
        """Return the packed tokens, views of the buffers; None when there are none."""
        if self._buffers is None or not self._count:
            return None
        return self._slice(self._buffers, self._first, self._count)

    def append(self, states: Float[Tensor, "batch heads new_tokens head_dim"]) -> None:
        """Add new tokens behind the others."""
        if self.smoothing is not None:
            states = self.smoothing.smooth(states)
        whole = max(0, self.quantizer.config.sink_tokens - self._seen)
        self._seen += states.shape[2]
        if whole:
            # A copy: a slice would keep the whole tensor alive.
            head = states[:, :, :whole].clone(memory_format=torch.contiguous_format)
            self.sinks = head if self.sinks is None else torch.cat((self.sinks, head), dim=2)
            states = states[:, :, whole:]
        new = states.shape[2]
        if new:
            buffers = self._with_room(states)
            quantize_kv(states, self.quantizer, self._slice(buffers, self._first + self._count, new))
            self._count += new

    def read(self, dtype: torch.dtype) -> Float[Tensor, "batch heads tokens head_dim"]:
        """Return all tokens, dequantized and restored."""
        parts = [] if self.sinks is None else [self.sinks.to(dtype)]
        if (packed := self.packed) is not None:
            parts.append(dequantize_kv(packed, self.quantizer, dtype))
        states = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        return states if self.smoothing is None else self.smoothing.restore(states)

    def change(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply a function of the batch axis to everything that is held."""
        if self.sinks is not None:
            self.sinks = function(self.sinks)
        if self._buffers is not None:
            self._buffers = PackedKV(*(function(part) for part in self._buffers))

    def drop_last(self, tokens: int) -> None:
        """Forget the last tokens, all of them when there are no more."""
        kept = max(0, len(self) - tokens)
        sinks = 0 if self.sinks is None else min(kept, self.sinks.shape[2])
        self._seen -= len(self) - kept
        self.sinks = None if self.sinks is None or not sinks else self.sinks[:, :, :sinks]
        self._count = kept - sinks

    def keep_last(self, tokens: int) -> None:
        """Forget all but the last tokens, the unpacked ones first: they are the oldest."""
        forgotten = max(0, len(self) - tokens)
        if self.sinks is not None:
            whole = min(forgotten, self.sinks.shape[2])
            self.sinks = self.sinks[:, :, whole:].clone() if whole < self.sinks.shape[2] else None
            forgotten -= whole
        self._first += forgotten
        self._count -= forgotten

    def size_bytes(self) -> int:
        """Return the bytes that sinks, codes and grids take."""
        held = [part for part in (self.sinks, *(self.packed or ())) if part is not None]
        return sum(part.numel() * part.element_size() for part in held)

    def _with_room(self, states: Tensor) -> PackedKV:
        """Return buffers that hold `states` behind the tokens there are; larger ones are made when needed."""
        batch, heads, new, _head_dim = states.shape
        old, needed = self._buffers, self._count + new
        if old is not None and self._first + needed <= old.packed.shape[2]:
            return old
        # The first tokens, a prompt's, take what they need; later ones come one by one, and room for them grows.
        room = needed if old is None else needed + max(_LEAST_ROOM, needed // 4)
        buffers = self.quantizer.empty(batch, heads, room, states.device)
        if old is not None:
            held = self._slice(old, self._first, self._count)
            for target, part in zip(self._slice(buffers, 0, self._count), held, strict=True):
                target.copy_(part)
        self._buffers, self._first = buffers, 0
        return buffers

    @staticmethod
    def _slice(buffers: PackedKV, first: int, count: int) -> PackedKV:
        return PackedKV(*(part[:, :, first : first + count] for part in buffers))


class DuQuantCacheLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped here
    """Keys and values of one layer, packed; `update` returns them dequantized.

    With `hands_out_packed` it returns the packed states themselves, for duquant.inference.attention to read.
    With a sliding `window` it holds, between updates, what the next token may still see: what is older is forgotten
    at the next update, once nothing reads it any more.
    """

    is_croppable = True

    def __init__(
        self,
        quantizer: KVQuantizer,
        *,
        hands_out_packed: bool = False,
        window: int | None = None,
        smoothing: KeySmoothing | None = None,
    ) -> None:
        super().__init__()
        self._quantizer = quantizer
        self._smoothing = smoothing
        self._hands_out_packed = hands_out_packed
        self._window = window
        self._seen = 0
        self._keys, self._values = CachedStates(quantizer, smoothing), CachedStates(quantizer)

    @property
    def is_sliding(self) -> bool:
        """Whether masks for this layer are those of a sliding window."""
        return self._window is not None

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
    ) -> tuple[Tensor | CachedStates, Tensor | CachedStates]:
        """Quantize and append the new tokens; return all keys and all values, dequantized, in the states' dtype."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._window is not None:
            for states in (self._keys, self._values):
                states.keep_last(self._window - 1)
        self._seen += key_states.shape[2]
        self._keys.append(key_states)
        self._values.append(value_states)
        if self._hands_out_packed:
            return self._keys, self._values
        return self._keys.read(key_states.dtype), self._values.read(value_states.dtype)

    def get_seq_length(self) -> int:
        """Return the number of tokens seen, forgotten ones among them."""
        return self._seen

    def get_max_length(self) -> int:
        """Return the window, or -1: the cache grows."""
        return -1 if self._window is None else self._window

    def get_max_cache_shape(self) -> int:
        """Return the same (its name before transformers 5.2)."""
        return self.get_max_length()

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Return (length, offset) of the keys that the next `query_length` queries see."""
        new = query_length.shape[0] if isinstance(query_length, Tensor) else int(query_length)
        held = self._held_after(self._seen)
        return held + new, self._seen - held

    def reset(self) -> None:
        """Forget all tokens."""
        self._keys, self._values = CachedStates(self._quantizer, self._smoothing), CachedStates(self._quantizer)
        self._seen = 0
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens; the count is negative, as in transformers' dynamic cache.

        Raises:
            ValueError: the count is positive, or goes back before the last update of a layer whose window is full.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, not {tokens_to_remove}")
        left = max(0, self._seen + tokens_to_remove)
        if self._held_after(left) > max(0, len(self._keys) + tokens_to_remove):
            raise ValueError(f"the sliding window has forgotten what came before the last {len(self._keys)} tokens")
        for states in (self._keys, self._values):
            states.drop_last(-tokens_to_remove)
        self._seen = left

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Pick batch rows for beam search."""
        self._change(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row."""
        self._change(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some batch rows."""
        self._change(lambda t: t[indices])

    def size_bytes(self) -> int:
        """Return the bytes held."""
        return self._keys.size_bytes() + self._values.size_bytes()

    def _held_after(self, seen: int) -> int:
        """Return how many of so many tokens the next one may see."""
        return seen if self._window is None else min(seen, self._window - 1)

    def _change(self, function: Callable[[Tensor], Tensor]) -> None:
        self._keys.change(function)
        self._values.change(function)


class DuQuantCache(Cache):  # type: ignore[misc]  # transformers is untyped here
    """A KV cache of packed codes for all layers of a model; pass it as `past_key_values`.

    Args:
        config: how keys and values are rounded.
        windows: the sliding window of each layer; None where a layer sees all tokens.
        head_dim: channels of one head.
        hands_out_packed: see DuQuantCacheLayer.
        smoothing: of the keys of each layer that has one, by its index.
    """

    def __init__(
        self,
        config: KVCacheConfig,
        *,
        windows: Sequence[int | None],
        head_dim: int,
        hands_out_packed: bool = False,
        smoothing: Mapping[int, KeySmoothing] | None = None,
    ) -> None:
        quantizer = KVQuantizer(config, head_dim)
        made = [
            DuQuantCacheLayer(
                quantizer,
                hands_out_packed=hands_out_packed,
                window=window,
                smoothing=None if smoothing is None else smoothing.get(layer),
            )
            for layer, window in enumerate(windows)
        ]
        super().__init__(layers=made)

    def size_bytes(self) -> int:
        """Return the bytes held."""
        return sum(layer.size_bytes() for layer in self.layers)
