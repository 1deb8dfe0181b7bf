"""The CPU's kernels for the packed KV cache, against KVQuantizer and the reference's attention."""

import pytest
import torch

from duquant.config import KVCacheConfig
from duquant.errors import KernelUnavailableError, ShapeError
from duquant.kernels import dequantize_kv, int4_kv_attention, quantize_kv
from duquant.kernels.cpu import CpuBackend
from duquant.kernels.reference import ReferenceBackend
from duquant.quantizers.kv import KVQuantizer, PackedKV

EPS = torch.finfo(torch.float32).eps


def states(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def buffered(quantizer: KVQuantizer, X: torch.Tensor, room: int = 3) -> PackedKV:
    """`X` rounded by the kernel into the middle of larger buffers."""
    batch, heads, tokens, _ = X.shape
    buffers = quantizer.empty(batch, heads, tokens + 2 * room, X.device)
    out = PackedKV(*(part[:, :, room : room + tokens] for part in buffers))
    CpuBackend().quantize_kv(X, quantizer, out)
    return out


@pytest.mark.parametrize("head_dim", [16, 33, 64, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_codes_and_grids_are_those_of_the_quantizer(isa: str, head_dim: int, dtype: torch.dtype) -> None:
    X = states(2, 3, 9, head_dim).to(dtype)
    quantizer = KVQuantizer(KVCacheConfig(clip_ratio=0.95), head_dim)
    assert all(torch.equal(a, b) for a, b in zip(buffered(quantizer, X), quantizer.quantize(X), strict=True))


@pytest.mark.parametrize("rows", [torch.zeros(1, 1, 2, 64), torch.full((1, 1, 2, 64), 3.25), states(1, 1, 4, 64) * 1e6])
def test_constant_and_huge_rows_are_those_of_the_quantizer(isa: str, rows: torch.Tensor) -> None:
    quantizer = KVQuantizer(KVCacheConfig(), 64)
    assert all(torch.equal(a, b) for a, b in zip(buffered(quantizer, rows), quantizer.quantize(rows), strict=True))


def test_small_scales_are_float16_subnormals_as_torch_has_them(isa: str) -> None:
    rows = states(1, 1, 64, 16) * torch.logspace(-9, 0, 64)[:, None]
    quantizer = KVQuantizer(KVCacheConfig(), 16)
    assert all(torch.equal(a, b) for a, b in zip(buffered(quantizer, rows), quantizer.quantize(rows), strict=True))


@pytest.mark.parametrize("head_dim", [64, 80])
def test_rotated_codes_differ_only_next_to_a_rounding_boundary(isa: str, head_dim: int) -> None:
    X = states(2, 3, 33, head_dim)
    quantizer = KVQuantizer(KVCacheConfig(rotate=True), head_dim)
    ours = buffered(quantizer, X)
    rotation = quantizer.rotation_on(X.device)
    assert rotation is not None
    exact = X.double() @ rotation.double()
    restored = quantizer.dequantize(ours, torch.float32).double() @ rotation.double()
    # Half a step, the rounding of low and scale to float16, and float32 sums.
    slack = 2**-10 * exact.abs().amax(-1, keepdim=True)
    assert bool(((restored - exact).abs() <= ours.scale.double() * 0.5 + slack).all())


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_restored_states_are_those_of_the_quantizer(isa: str, rotate: bool, dtype: torch.dtype) -> None:
    quantizer = KVQuantizer(KVCacheConfig(rotate=rotate), 80)
    packed = buffered(quantizer, states(2, 3, 9, 80))
    ours, theirs = CpuBackend().dequantize_kv(packed, quantizer, dtype), quantizer.dequantize(packed, dtype)
    size = float(theirs.abs().max())
    tolerance = size * (2**-8 if dtype == torch.bfloat16 else 80 * EPS)
    assert ours.dtype == dtype
    assert float((ours - theirs).abs().max()) <= (tolerance if rotate else 0)


@pytest.mark.parametrize("head_dim", [16, 33, 64, 80])
@pytest.mark.parametrize(
    ("mask", "group", "sinks", "tokens"),
    [("none", 1, 0, 32), ("none", 6, 3, 19), ("bool", 3, 0, 19), ("bool", 4, 3, 32), ("float", 2, 17, 19)],
)
def test_attention_is_that_of_the_reference(
    isa: str, head_dim: int, mask: str, group: int, sinks: int, tokens: int
) -> None:
    quantizer = KVQuantizer(KVCacheConfig(rotate=head_dim != 16), head_dim)
    keys, values = (buffered(quantizer, states(2, 3, tokens, head_dim, seed=seed)) for seed in (0, 1))
    whole = (states(2, 3, sinks, head_dim, seed=5), states(2, 3, sinks, head_dim, seed=6)) if sinks else None
    Q = states(2, 3 * group, 1, head_dim, seed=2)
    visible = torch.rand(2, 1, 1, sinks + tokens, generator=torch.Generator().manual_seed(3)) > 0.4
    visible[..., -1] = True
    given = {"none": None, "bool": visible, "float": states(2, 1, 1, sinks + tokens, seed=4)}[mask]
    ours, theirs = (
        backend.int4_kv_attention(Q, keys, values, quantizer, scaling=head_dim**-0.5, mask=given, sinks=whole)
        for backend in (CpuBackend(), ReferenceBackend())
    )
    # Scores are sums of head_dim products; their error, exponentiated, is one of the weights.
    largest = float(Q.abs().amax() * 12 * head_dim**0.5)
    assert float((ours - theirs).abs().max()) <= 8 * EPS * head_dim * largest
    assert ours.shape == Q.shape


def test_weights_far_below_the_largest_are_zeros(isa: str) -> None:
    """Exponentials end where float32 does, without infinities or negative numbers."""
    quantizer = KVQuantizer(KVCacheConfig(rotate=False), 16)
    packed = quantizer.quantize(torch.linspace(-1, 1, 40)[None, None, :, None] * torch.ones(16))
    Q = torch.full((1, 1, 1, 16), 200.0)  # scores from -3200 to 3200
    Y = CpuBackend().int4_kv_attention(Q, packed, packed, quantizer, scaling=1.0, mask=None)
    torch.testing.assert_close(Y, torch.ones(1, 1, 1, 16), rtol=1e-3, atol=0)


def test_a_row_that_sees_nothing_is_no_number_and_harms_no_other(isa: str) -> None:
    quantizer = KVQuantizer(KVCacheConfig(), 64)
    packed = buffered(quantizer, states(2, 2, 5, 64))
    mask = torch.tensor([False, True])[:, None, None, None].expand(2, 1, 1, 5)
    Y = CpuBackend().int4_kv_attention(states(2, 2, 1, 64), packed, packed, quantizer, scaling=0.1, mask=mask)
    assert bool(Y[0].isnan().all())
    assert bool(Y[1].isfinite().all())


def test_tokens_beyond_the_last_are_not_read(isa: str) -> None:
    """The buffers' spare room holds anything."""
    quantizer = KVQuantizer(KVCacheConfig(), 64)
    packed = buffered(quantizer, states(1, 2, 5, 64))
    dense = PackedKV(*(part.contiguous() for part in packed))
    Q = states(1, 2, 1, 64, seed=1)
    first, second = (
        CpuBackend().int4_kv_attention(Q, each, each, quantizer, scaling=0.1, mask=None) for each in (packed, dense)
    )
    assert torch.equal(first, second)


def test_several_queries_are_the_reference_backends(isa: str) -> None:
    quantizer = KVQuantizer(KVCacheConfig(), 64)
    packed = buffered(quantizer, states(1, 2, 5, 64))
    Q = states(1, 4, 3, 64, seed=1)
    with pytest.raises(KernelUnavailableError, match="one query at a time"):
        CpuBackend().int4_kv_attention(Q, packed, packed, quantizer, scaling=0.1, mask=None)
    Y = int4_kv_attention(Q, packed, packed, quantizer, scaling=0.1)
    K = quantizer.dequantize(packed, torch.float32).repeat_interleave(2, dim=1)
    mask = torch.ones(3, 5, dtype=torch.bool).tril(2)
    expected = torch.nn.functional.scaled_dot_product_attention(Q, K, K, attn_mask=mask, scale=0.1)
    torch.testing.assert_close(Y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 8])
def test_other_bits_go_through_the_quantizer(bits: int) -> None:
    quantizer = KVQuantizer(KVCacheConfig(bits=bits), 64)
    X = states(1, 2, 5, 64)
    out = quantizer.empty(1, 2, 5, X.device)
    quantize_kv(X, quantizer, out)
    assert all(torch.equal(a, b) for a, b in zip(out, quantizer.quantize(X), strict=True))
    assert torch.equal(dequantize_kv(out, quantizer, torch.float32), quantizer.dequantize(out, torch.float32))


def test_sizes_that_do_not_fit_are_refused() -> None:
    quantizer = KVQuantizer(KVCacheConfig(), 64)
    packed = buffered(quantizer, states(2, 2, 5, 64))
    with pytest.raises(ShapeError, match="3 heads cannot share 2"):
        int4_kv_attention(states(2, 3, 1, 64), packed, packed, quantizer, scaling=1.0)
    with pytest.raises(ShapeError, match="head_dim 32, the cache 64"):
        int4_kv_attention(states(2, 2, 1, 32), packed, packed, quantizer, scaling=1.0)
    with pytest.raises(ShapeError, match="6 queries cannot be the newest of 5"):
        int4_kv_attention(states(2, 2, 6, 64), packed, packed, quantizer, scaling=1.0)
    sinks = (states(2, 2, 1, 64), states(2, 1, 1, 64))
    with pytest.raises(ShapeError, match=r"have shape \(2, 1, 1, 64\); it must be \(2, 2, 1, 64\)"):
        int4_kv_attention(states(2, 2, 1, 64), packed, packed, quantizer, scaling=1.0, sinks=sinks)
    with pytest.raises(ShapeError, match="do not fit codes"):
        quantize_kv(states(2, 2, 4, 64), quantizer, packed)
