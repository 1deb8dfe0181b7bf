"""The GPU's packed cache holds what KVQuantizer would put there."""

import pytest
import torch

from duquant.config import KVCacheConfig
from duquant.kernels.gpu.cache import dequantize_kv, quantize_kv
from duquant.quantizers.kv import KVQuantizer, PackedKV


def states(*shape: int) -> torch.Tensor:
    X = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    X[..., 1] *= 10
    return X


@pytest.mark.parametrize("head_dim", [16, 24])
@pytest.mark.parametrize(
    "config", [KVCacheConfig(bits=4), KVCacheConfig(bits=4, rotate=False, clip_ratio=0.9)], ids=str
)
def test_codes_and_grids_are_those_of_the_quantizer(config: KVCacheConfig, head_dim: int, device: torch.device) -> None:
    quantizer = KVQuantizer(config, head_dim)
    X = states(2, 3, 5, head_dim).to(device)
    room = quantizer.empty(2, 3, 8, device)
    for part in room:
        part.fill_(7)
    quantize_kv(
        X.transpose(1, 2).contiguous().transpose(1, 2), quantizer, PackedKV(*(part[:, :, 2:7] for part in room))
    )
    expected = quantizer.quantize(X)
    for part, exact in zip(room, expected, strict=True):
        assert bool((part[:, :, :2] == 7).all())
        assert bool((part[:, :, 7:] == 7).all())
        same = (part[:, :, 2:7] == exact).float().mean()
        # Sums in another order may end next to a rounding boundary; without a rotation there are none.
        assert float(same) == 1.0 if not config.rotate else float(same) > 0.98


@pytest.mark.parametrize("value", [0.0, 1e-30, 3.0, 1e30])
def test_constant_rows_of_any_size_stay_finite(value: float, device: torch.device) -> None:
    quantizer = KVQuantizer(KVCacheConfig(bits=4, rotate=False), 16)
    X = torch.full((1, 1, 2, 16), value, device=device)
    out = quantizer.empty(1, 1, 2, device)
    quantize_kv(X, quantizer, out)
    for part, exact in zip(out, quantizer.quantize(X), strict=True):
        assert torch.equal(part, exact)


@pytest.mark.parametrize("rotate", [True, False])
def test_dequantized_states_are_those_of_the_quantizer(rotate: bool, device: torch.device) -> None:
    quantizer = KVQuantizer(KVCacheConfig(bits=4, rotate=rotate), 16)
    packed = PackedKV(*(part.transpose(1, 2) for part in quantizer.quantize(states(2, 5, 3, 16).to(device))))
    expected = quantizer.dequantize(packed, torch.float32)
    found = dequantize_kv(packed, quantizer, torch.float32)
    # Sixteen products in another order.
    bound = 16 * torch.finfo(torch.float32).eps * expected.abs().amax() * 4
    assert bool(((found - expected).abs() <= bound).all())


def test_caches_of_other_kinds_fall_back_to_the_quantizer(device: torch.device) -> None:
    quantizer = KVQuantizer(KVCacheConfig(bits=8), 16)
    X = states(1, 2, 3, 16).to(device)
    out = quantizer.empty(1, 2, 3, device)
    quantize_kv(X, quantizer, out)
    expected = quantizer.quantize(X)
    assert torch.equal(out.packed, expected.packed)
    assert torch.equal(dequantize_kv(out, quantizer, torch.float32), quantizer.dequantize(expected, torch.float32))
