"""Smoothing of keys: attention does not see it, and rounding loses less behind it."""

import pytest
import torch
from torch import Tensor

from duquant.config import KVCacheConfig
from duquant.quantizers.keys import KeySmoothing, key_smoothing
from duquant.quantizers.kv import KVQuantizer

KV_HEADS, GROUP, TOKENS, HEAD_DIM = 2, 3, 40, 16


def states(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Queries and keys as models have them: keys share a large mean, and a few channels of either are large."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(1, KV_HEADS * GROUP, TOKENS, HEAD_DIM, generator=generator)
    keys = torch.randn(1, KV_HEADS, TOKENS, HEAD_DIM, generator=generator)
    queries[..., 5] *= 8
    keys[..., 3] *= 6
    keys += 5 * torch.randn(1, KV_HEADS, 1, HEAD_DIM, generator=generator)
    return queries, keys


def smoothing_of(queries: Tensor, keys: Tensor) -> KeySmoothing:
    squares = queries.square().mean((0, 2)).view(KV_HEADS, GROUP, HEAD_DIM).mean(1)
    return key_smoothing(keys.mean((0, 2)), keys.square().mean((0, 2)), squares)


def attention(queries: Tensor, keys: Tensor) -> Tensor:
    return (queries @ keys.repeat_interleave(GROUP, dim=1).mT / HEAD_DIM**0.5).softmax(-1)


def test_attention_to_smoothed_keys_is_the_same() -> None:
    queries, keys = (X.double() for X in states())
    smoothing = smoothing_of(queries, keys)
    found = attention(smoothing.of_queries(queries), smoothing.smooth(keys))
    torch.testing.assert_close(found, attention(queries, keys))
    torch.testing.assert_close(smoothing.restore(smoothing.smooth(keys)), keys)


def rounded_error(queries: Tensor, keys: Tensor, smoothing: KeySmoothing | None) -> float:
    """Squared error of attention with keys at 4 bits."""
    quantizer = KVQuantizer(KVCacheConfig(bits=4, rotate=True), HEAD_DIM)
    inner = keys if smoothing is None else smoothing.smooth(keys)
    back = quantizer.dequantize(quantizer.quantize(inner), torch.float32)
    back = back if smoothing is None else smoothing.restore(back)
    return float((attention(queries, back) - attention(queries, keys)).square().sum())


@pytest.mark.parametrize("seed", range(5))
def test_rounding_loses_less_behind_it(seed: int) -> None:
    queries, keys = states(seed)
    assert rounded_error(queries, keys, smoothing_of(queries, keys)) < 0.5 * rounded_error(queries, keys, None)


def test_the_scale_is_where_the_product_of_errors_is_least() -> None:
    queries, keys = (X.double() for X in states())
    smoothing = smoothing_of(queries, keys)
    V = (keys - keys.mean((0, 2))[:, None]).square().mean((0, 2))
    Q = queries.square().mean((0, 2)).view(KV_HEADS, GROUP, HEAD_DIM).mean(1)

    def product(scale: Tensor) -> Tensor:
        return (V / scale**2).sum(-1) * (Q * scale**2).sum(-1)

    least = product(smoothing.smooth_scale.double())
    generator = torch.Generator().manual_seed(7)
    for _ in range(20):
        other = smoothing.smooth_scale.double() * (0.3 * torch.randn(KV_HEADS, HEAD_DIM, generator=generator)).exp()
        assert bool((product(other) > least).all())


@pytest.mark.parametrize("dead", ["channel of keys", "channel of queries", "head", "constant keys"])
def test_what_is_dead_stays_finite(dead: str) -> None:
    queries, keys = states()
    if dead == "channel of keys":
        keys[:, 0, :, 2] = 0.0
    elif dead == "channel of queries":
        queries[:, :GROUP, :, 2] = 0.0
    elif dead == "head":
        queries[:, :GROUP] = keys[:, 0] = 0.0
    else:
        keys[:] = 3.0
    smoothing = smoothing_of(queries, keys)
    for tensor in (smoothing.center, smoothing.smooth_scale):
        assert bool(torch.isfinite(tensor).all())
    assert float(smoothing.smooth_scale.min()) > 0.0
    torch.testing.assert_close(smoothing.restore(smoothing.smooth(keys)), keys, rtol=1e-4, atol=1e-4)


def test_states_keep_their_dtype() -> None:
    queries, keys = states()
    smoothing = smoothing_of(queries, keys)
    assert smoothing.smooth(keys.bfloat16()).dtype == torch.bfloat16
    assert smoothing.restore(keys.bfloat16()).dtype == torch.bfloat16
    assert smoothing.of_queries(queries.bfloat16()).dtype == torch.bfloat16
