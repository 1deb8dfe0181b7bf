"""The KV cache quantizer."""

import pytest
import torch

from duquant.config import KVCacheConfig
from duquant.quantizers.kv import KVQuantizer, PackedKV

EPS = torch.finfo(torch.float32).eps
EPS16 = torch.finfo(torch.float16).eps
HEAD_DIMS = [64, 80, 96, 128, 256]
BITS = [2, 4, 8]


def states(head_dim: int, *, seed: int = 0, batch: int = 2, tokens: int = 5) -> torch.Tensor:
    X = torch.randn(batch, 3, tokens, head_dim, generator=torch.Generator().manual_seed(seed))
    X[..., 7] += 9  # keys have such channels
    return X


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("bits", BITS)
def test_round_trip_errs_at_most_half_a_step(bits: int, head_dim: int, rotate: bool) -> None:
    quantizer = KVQuantizer(KVCacheConfig(bits=bits, rotate=rotate), head_dim)
    X = states(head_dim)
    packed = quantizer.quantize(X)
    error = (quantizer.dequantize(packed, torch.float32).double() - X.double()).norm(dim=-1)
    # Half a step; the float16 low end and step move the two ends of the range by their own roundings.
    spread = packed.scale.double() * (2**bits - 1)
    each = packed.scale.double() / 2 + EPS16 * (packed.low.double().abs() + spread)
    # A rotation keeps the norm of the error, not its largest entry, so the bound is on norms.
    bound = each * head_dim**0.5 + 8 * head_dim * EPS * X.double().norm(dim=-1, keepdim=True)
    assert bool((error[..., None] <= bound).all())


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("bits", BITS)
def test_every_value_errs_at_most_half_a_step_without_rotation(bits: int, head_dim: int) -> None:
    quantizer = KVQuantizer(KVCacheConfig(bits=bits), head_dim)
    X = states(head_dim)
    packed = quantizer.quantize(X)
    error = (quantizer.dequantize(packed, torch.float32).double() - X.double()).abs()
    spread = packed.scale.double() * (2**bits - 1)
    bound = packed.scale.double() / 2 + EPS16 * (packed.low.double().abs() + spread)
    assert bool((error <= bound + 4 * EPS * X.abs().max()).all())


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("bits", BITS)
def test_codes_take_bits_over_eight_bytes_a_channel(bits: int, head_dim: int) -> None:
    packed = KVQuantizer(KVCacheConfig(bits=bits), head_dim).quantize(states(head_dim))
    assert packed.packed.dtype == torch.uint8
    assert packed.packed.shape == (2, 3, 5, head_dim * bits // 8)


@pytest.mark.parametrize("bits", BITS)
def test_head_dim_that_does_not_fill_its_last_byte_is_padded(bits: int) -> None:
    quantizer = KVQuantizer(KVCacheConfig(bits=bits), 9)
    X = states(9)
    packed = quantizer.quantize(X)
    assert packed.packed.shape[-1] == -(-9 * bits // 8)
    assert quantizer.dequantize(packed, torch.float32).shape == X.shape


def test_every_token_and_head_is_rounded_by_itself() -> None:
    quantizer = KVQuantizer(KVCacheConfig(rotate=True), 64)
    X = states(64, tokens=6)
    whole = quantizer.quantize(X)
    first, rest = quantizer.quantize(X[:, :, :2]), quantizer.quantize(X[:, :, 2:])
    for together, *parts in zip(whole, first, rest, strict=True):
        assert torch.equal(together, torch.cat(parts, dim=2))


@pytest.mark.parametrize("bits", BITS)
def test_constant_and_zero_rows_are_restored(bits: int) -> None:
    quantizer = KVQuantizer(KVCacheConfig(bits=bits), 64)
    X = torch.zeros(1, 1, 3, 64)
    X[0, 0, 1], X[0, 0, 2] = 2.5, -300.1
    restored = quantizer.dequantize(quantizer.quantize(X), torch.float32)
    # Half of the smallest step, or the float16 rounding of the low end.
    torch.testing.assert_close(restored, X, atol=2**-15, rtol=EPS16)


def test_values_beyond_float16_stay_finite() -> None:
    quantizer = KVQuantizer(KVCacheConfig(), 64)
    X = states(64)
    X[0, 0, 0, 0], X[0, 0, 1, 1] = 1e6, -1e6
    packed = quantizer.quantize(X)
    assert bool(torch.isfinite(packed.scale).all())
    assert bool(torch.isfinite(packed.low).all())
    assert bool(torch.isfinite(quantizer.dequantize(packed, torch.float32)).all())


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_restored_states_have_the_asked_dtype(dtype: torch.dtype, rotate: bool) -> None:
    quantizer = KVQuantizer(KVCacheConfig(rotate=rotate), 64)
    assert quantizer.dequantize(quantizer.quantize(states(64).to(dtype)), dtype).dtype == dtype


def test_rotation_halves_the_error_of_an_outlier_channel() -> None:
    X = states(128)
    X[..., 5] += 60

    def error(rotate: bool) -> float:
        quantizer = KVQuantizer(KVCacheConfig(rotate=rotate), 128)
        return float((quantizer.dequantize(quantizer.quantize(X), torch.float32) - X).norm())

    assert error(rotate=True) < error(rotate=False) / 2


def test_scores_of_rotated_keys_are_those_of_the_keys() -> None:
    """Rotating back the dequantized keys is the same product as rotating the queries."""
    quantizer = KVQuantizer(KVCacheConfig(bits=8, rotate=True), 80)
    K, Q = states(80), states(80, seed=1)
    restored = quantizer.dequantize(quantizer.quantize(K), torch.float32)
    scores, exact = Q @ restored.transpose(-1, -2), Q @ K.transpose(-1, -2)
    bound = Q.norm(dim=-1, keepdim=True) * (restored - K).norm(dim=-1)[..., None, :]
    assert bool(((scores - exact).abs() <= bound * (1 + 1e-3) + 1e-3).all())


def test_quantize_leaves_its_input_alone() -> None:
    X = states(64)
    before = X.clone()
    quantizer = KVQuantizer(KVCacheConfig(rotate=True, clip_ratio=0.9), 64)
    packed = quantizer.quantize(X)
    copies = PackedKV(*(t.clone() for t in packed))
    quantizer.dequantize(packed, torch.float32)
    assert torch.equal(X, before)
    assert all(torch.equal(a, b) for a, b in zip(packed, copies, strict=True))
