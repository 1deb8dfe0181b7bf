"""What one timed call is: a decoder layer or the whole model, over a prompt or over one new token of each sequence."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from duquant.evaluation.contenders import dense_cache
from duquant.models.attention import head_dim_of

Call = Callable[[], object]


@dataclass(frozen=True)
class Load:
    """How much is done in one call."""

    phase: str
    """prefill: one sequence of `tokens` into an empty cache; decode: one token for each of `batch` sequences."""
    batch: int
    tokens: int
    """Tokens that enter the model in one call, of all sequences together."""
    context: int
    """Tokens of each sequence that are in the cache before."""

    def __str__(self) -> str:
        """Name it in a few words."""
        return f"prefill of {self.tokens} tokens" if self.phase == "prefill" else f"decode of batch {self.batch}"


class _Captured(BaseException):
    """The layer's arguments are known; the rest of the forward pass is not needed."""


def model_call(model: Any, load: Load) -> Call:
    """Return a call of the whole model, with the logits of each sequence's last token."""
    ids = _ids(model, load)
    if load.phase == "prefill":
        return lambda: model(ids, past_key_values=_new_cache(model, load), use_cache=True, logits_to_keep=1)
    cache = _filled_cache(model, load, layers=len(model.model.layers))

    def step() -> None:
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        # The next call finds the same cache: contexts do not grow while they are timed.
        for layer in cache.layers:
            layer.crop(-1)

    return step


def layer_call(model: Any, load: Load) -> Call:
    """Return a call of the first decoder layer, with the inputs that the model itself gives it for random tokens."""
    cache = _new_cache(model, load) if load.phase == "prefill" else _filled_cache(model, load, layers=1)
    layer = model.model.layers[0]
    args, kwargs = _inputs_of(model, layer, _ids(model, load), cache)
    if load.phase == "prefill":
        return lambda: layer(*args, **{**kwargs, "past_key_values": _new_cache(model, load)})

    def step() -> None:
        layer(*args, **kwargs)
        cache.layers[0].crop(-1)

    return step


def cache_bytes(model: Any, load: Load, *, layers: int) -> int:
    """Return the bytes of keys and values of a decode, in the cache that the model uses."""
    quantized = getattr(model, "duquant_new_cache", None)
    heads, head_dim = _heads(model)
    if quantized is None:
        return 2 * 2 * load.batch * heads * load.context * head_dim * layers
    cache = quantized()
    cache.update(*_states(model, 1, load.context), 0)
    return int(cache.layers[0].size_bytes()) * load.batch * layers


def _heads(model: Any) -> tuple[int, int]:
    """Return the number of key heads, and the channels of one."""
    return int(model.config.num_key_value_heads), head_dim_of(model.config)


def _ids(model: Any, load: Load) -> Tensor:
    shape = (1, load.tokens) if load.phase == "prefill" else (load.batch, 1)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, model.config.vocab_size, shape, generator=generator).to(model.device)


def _new_cache(model: Any, load: Load) -> Any:
    """Return an empty cache: the artifact's own, or a 16-bit one with room."""
    make = getattr(model, "duquant_new_cache", None)
    room = load.context + load.tokens // load.batch
    return dense_cache(len(model.model.layers), room) if make is None else make()


def _filled_cache(model: Any, load: Load, *, layers: int) -> Any:
    cache = _new_cache(model, load)
    states = _states(model, load.batch, load.context)
    for layer in range(layers):
        cache.update(*states, layer)
    return cache


def _states(model: Any, batch: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Return random keys and values of one layer, (batch, heads, tokens, head_dim), bfloat16."""
    heads, head_dim = _heads(model)
    generator = torch.Generator(device=model.device).manual_seed(1)
    keys, values = (
        torch.randn(batch, heads, tokens, head_dim, generator=generator, device=model.device).bfloat16()
        for _ in range(2)
    )
    return keys, values


def _inputs_of(model: Any, layer: torch.nn.Module, ids: Tensor, cache: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what the model calls a layer with."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def keep(_module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise _Captured

    hook = layer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        model.model(input_ids=ids, past_key_values=cache, use_cache=True)
    except _Captured:
        pass
    finally:
        hook.remove()
    return seen[0]
