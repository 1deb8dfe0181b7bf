"""GPU attention over a packed cache against the reference, which dequantizes it."""

import pytest
import torch

from duquant.config import KVCacheConfig
from duquant.errors import KernelUnavailableError
from duquant.kernels.gpu.attention import int4_kv_attention
from duquant.kernels.reference import ReferenceBackend
from duquant.quantizers.kv import KVQuantizer, PackedKV

REFERENCE = ReferenceBackend()
# Queries and weights are rounded to float16 (2^-11 each); a softmax of scores below about 4 passes errors on fourfold.
TOLERANCE = 8 * 2**-11


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def compare(
    Q: torch.Tensor,
    keys: PackedKV,
    values: PackedKV,
    quantizer: KVQuantizer,
    mask: torch.Tensor | None = None,
    sinks: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    arguments = {"scaling": Q.shape[-1] ** -0.5, "mask": mask, "sinks": sinks}
    expected = REFERENCE.int4_kv_attention(Q, keys, values, quantizer, **arguments)
    result = int4_kv_attention(Q, keys, values, quantizer, **arguments)
    assert result.dtype == Q.dtype
    error = (result.float() - expected.float()).norm() / expected.float().norm()
    assert float(error) <= TOLERANCE


@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "queries", "tokens", "head_dim"),
    [
        (2, 2, 2, 1, 70, 16),  # more than one tile
        (1, 4, 2, 3, 65, 24),  # shared keys, several queries, a head that is no power of two
        (1, 2, 1, 18, 18, 16),  # a prompt: more rows than one tile of queries holds
        (1, 1, 1, 1, 1, 64),
    ],
)
@pytest.mark.parametrize("rotate", [True, False], ids=["rotated", "plain"])
def test_attention_equals_the_reference(
    batch: int, heads: int, kv_heads: int, queries: int, tokens: int, head_dim: int, rotate: bool, device: torch.device
) -> None:
    quantizer = KVQuantizer(KVCacheConfig(bits=4, rotate=rotate), head_dim)
    keys = quantizer.quantize(normal(batch, kv_heads, tokens, head_dim, seed=1).to(device))
    values = quantizer.quantize((normal(batch, kv_heads, tokens, head_dim, seed=2) + 0.5).to(device))
    compare(normal(batch, heads, queries, head_dim, seed=3).to(device), keys, values, quantizer)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_hide_tokens(kind: str, device: torch.device) -> None:
    quantizer = KVQuantizer(KVCacheConfig(bits=4), 16)
    keys = quantizer.quantize(normal(2, 1, 40, 16, seed=1).to(device))
    values = quantizer.quantize(normal(2, 1, 40, 16, seed=2).to(device))
    visible = normal(2, 1, 2, 40, seed=4) > -0.5
    visible[..., 0] = True
    mask = visible if kind == "bool" else torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))
    compare(normal(2, 2, 2, 16, seed=3).to(device), keys, values, quantizer, mask.to(device))


@pytest.mark.parametrize("rotate", [True, False], ids=["rotated", "plain"])
@pytest.mark.parametrize("kind", ["none", "bool", "float"])
def test_tokens_that_are_not_packed_come_first(rotate: bool, kind: str, device: torch.device) -> None:
    quantizer = KVQuantizer(KVCacheConfig(bits=4, rotate=rotate), 24)
    keys = quantizer.quantize(normal(2, 1, 70, 24, seed=1).to(device))
    values = quantizer.quantize(normal(2, 1, 70, 24, seed=2).to(device))
    sinks = (4 * normal(2, 1, 3, 24, seed=5).to(device), normal(2, 1, 3, 24, seed=6).bfloat16().to(device))
    visible = normal(2, 1, 2, 73, seed=4) > -0.5
    visible[..., 1] = True
    added = torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))
    mask = {"none": None, "bool": visible.to(device), "float": added.to(device)}[kind]
    compare(normal(2, 2, 2, 24, seed=3).to(device), keys, values, quantizer, mask, sinks)


def test_a_cache_of_any_strides_and_half_precision_queries(device: torch.device) -> None:
    quantizer = KVQuantizer(KVCacheConfig(bits=4), 16)
    spare = quantizer.quantize(normal(1, 30, 2, 16, seed=1).to(device))
    part = PackedKV(*(each.transpose(1, 2)[:, :, :20] for each in spare))  # (batch, heads, tokens, ...), tokens apart
    compare(normal(1, 2, 1, 16, seed=3).half().to(device), part, part, quantizer)


def test_large_queries_do_not_overflow(device: torch.device) -> None:
    quantizer = KVQuantizer(KVCacheConfig(bits=4, rotate=False), 16)
    keys = quantizer.quantize((1e-6 * normal(1, 1, 10, 16, seed=1)).to(device))
    values = quantizer.quantize(normal(1, 1, 10, 16, seed=2).to(device))
    compare(1e5 * normal(1, 1, 1, 16, seed=3).to(device), keys, values, quantizer)


@pytest.mark.parametrize(("bits", "head_dim"), [(8, 16), (4, 512)])
def test_what_the_kernels_cannot_do_is_said(bits: int, head_dim: int, device: torch.device) -> None:
    quantizer = KVQuantizer(KVCacheConfig(bits=bits, rotate=False), head_dim)
    keys = quantizer.quantize(torch.ones(1, 1, 2, head_dim, device=device))
    Q = torch.ones(1, 1, 1, head_dim, device=device)
    with pytest.raises(KernelUnavailableError, match=r"8-bit|512"):
        int4_kv_attention(Q, keys, keys, quantizer, scaling=1.0, mask=None)
