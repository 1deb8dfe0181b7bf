"""Smoothing scales and their folds."""

import pytest
import torch

from duquant.transforms.smoothing import MIN_SCALE, activation_scale, exact_fold, share_over_heads, smoothing_scale


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_scale_is_the_formula(alpha: float) -> None:
    act_absmax, weight_absmax = normal(12).abs() + 0.1, 9 * normal(12, seed=1).abs()
    expected = (act_absmax.double() ** alpha / weight_absmax.double() ** (1 - alpha)).clamp_min(MIN_SCALE)
    scale = smoothing_scale(act_absmax, weight_absmax, alpha)
    torch.testing.assert_close(scale.double(), expected, rtol=1e-5, atol=0)


def test_dead_channels_keep_one() -> None:
    absmax = torch.tensor([0.0, 2.0, 0.0, 2.0])
    scale = smoothing_scale(absmax, torch.tensor([1.0, 0.0, 0.0, 1.0]), 0.5)
    assert scale[:3].tolist() == [1.0, 1.0, 1.0]
    assert float(scale[3]) == pytest.approx(2**0.5)


def test_scale_is_finite_and_bounded_below_for_extreme_channels() -> None:
    absmax = torch.tensor([1e-30, 1e30, 1e-30, 1e30])
    scale = smoothing_scale(absmax, torch.tensor([1e-30, 1e-30, 1e30, 1e30]), 0.5)
    assert bool(torch.isfinite(scale).all())
    assert bool((scale >= MIN_SCALE * (1 - torch.finfo(torch.float32).eps)).all())


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_activation_scale_is_a_power_balanced_around_one(alpha: float) -> None:
    size = normal(16).abs() + 0.01
    scale = activation_scale(size, alpha)
    torch.testing.assert_close(scale / scale[0], (size / size[0]) ** alpha, rtol=1e-4, atol=0)
    assert float(scale.max() * scale.min()) == pytest.approx(1.0, rel=1e-5)


def test_activation_scale_of_dead_channels_is_one() -> None:
    size = torch.tensor([0.0, 4.0, 1.0, 0.0])
    torch.testing.assert_close(activation_scale(size, 0.5), torch.tensor([1.0, 2**0.5, 0.5**0.5, 1.0]))
    assert activation_scale(torch.zeros(3), 0.5).tolist() == [1.0, 1.0, 1.0]


HEADS = [(4, 4, 8), (4, 2, 8), (9, 3, 64), (8, 1, 16), (6, 2, 5), (1, 1, 96), (12, 4, 80)]


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
def test_shared_scale_is_equal_over_the_query_heads_of_a_kv_head(heads: int, kv_heads: int, head_dim: int) -> None:
    scale = normal(heads * head_dim).abs() + 0.01
    shared = share_over_heads(scale, kv_heads=kv_heads, head_dim=head_dim)
    per_head = heads // kv_heads
    for head in range(heads):
        for d in range(head_dim):
            first = head // per_head * per_head
            same = [float(scale[other * head_dim + d]) for other in range(first, first + per_head)]
            assert float(shared[head * head_dim + d]) == max(same)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
def test_fold_into_values_is_exact_under_grouped_query_attention(heads: int, kv_heads: int, head_dim: int) -> None:
    """o(attention(v)) is unchanged when v's rows are divided and o's columns multiplied by the shared scale."""
    tokens, hidden = 5, 16
    X = normal(tokens, hidden).double()
    V, out = normal(kv_heads * head_dim, hidden, seed=1).double(), normal(hidden, heads * head_dim, seed=2).double()
    bias = normal(kv_heads * head_dim, seed=3).double()
    attention = normal(heads, tokens, tokens, seed=4).double().softmax(-1)
    scale = share_over_heads(normal(heads * head_dim, seed=5).exp(), kv_heads=kv_heads, head_dim=head_dim).double()
    per_kv_channel = scale.view(kv_heads, -1, head_dim)[:, 0].reshape(-1)

    def run(V: torch.Tensor, bias: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        values = (X @ V.T + bias).view(tokens, kv_heads, head_dim).repeat_interleave(heads // kv_heads, dim=1)
        mixed = torch.einsum("hst,thd->shd", attention, values)
        return mixed.reshape(tokens, -1) @ out.T

    folded = run(V / per_kv_channel[:, None], bias / per_kv_channel, out * scale)
    torch.testing.assert_close(folded, run(V, bias, out), rtol=1e-12, atol=1e-12 * float(out.abs().sum()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_folded_gain_times_its_scale_is_the_gain(dtype: torch.dtype) -> None:
    gain = (normal(4096) * 3).to(dtype)
    folded, real = exact_fold(gain, normal(4096, seed=1).exp())
    assert folded.dtype == dtype
    # `real` is the float32 quotient of two values: one rounding, and one more of the product.
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(folded.double() * real.double(), gain.double(), rtol=eps, atol=0)


def test_real_scale_is_within_a_rounding_of_the_wanted_one() -> None:
    gain, wanted = normal(4096).bfloat16(), normal(4096, seed=1).exp()
    _, real = exact_fold(gain, wanted)
    live = gain != 0
    torch.testing.assert_close(real[live], wanted[live], rtol=torch.finfo(torch.bfloat16).eps, atol=0)


def test_gain_that_would_vanish_or_overflow_stays_as_it_is() -> None:
    gain = torch.tensor([0.0, 1.0, 1e-38, 3e38]).bfloat16()
    folded, real = exact_fold(gain, torch.tensor([2.0, 1e38, 1e38, 1e-2]))
    assert bool(torch.isfinite(folded).all())
    assert bool(torch.isfinite(real).all())
    torch.testing.assert_close(folded.double() * real.double(), gain.double(), rtol=1e-6, atol=0)
    assert folded[0] == 0
    assert real[0] == 1
    assert real[2] == 1
    assert real[3] == 1


@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_folded_gain_of_a_norm_with_an_offset_cancels_exactly(spread: float) -> None:
    """Gemma's norms multiply by 1 + weight, in float32."""
    gain = (spread * normal(4096)).bfloat16()
    folded, real = exact_fold(gain, normal(4096, seed=1).exp(), offset=1.0)
    assert folded.dtype == torch.bfloat16
    eps = torch.finfo(torch.float32).eps
    full, kept = 1.0 + gain.float(), 1.0 + folded.float()
    torch.testing.assert_close(kept.double() * real.double(), full.double(), rtol=eps, atol=0)


def test_scale_of_a_norm_with_an_offset_is_close_to_the_wanted_one_where_bfloat16_is_fine() -> None:
    gain, wanted = normal(4096).exp().bfloat16(), normal(4096, seed=1).clamp(-1, 0).exp()
    _, real = exact_fold(gain, wanted, offset=1.0)
    # The folded gain is above 1; what is stored is at most as large, so it errs by no more than 2^-8 of it.
    torch.testing.assert_close(real, wanted, rtol=torch.finfo(torch.bfloat16).eps, atol=0)


def test_channel_that_an_offset_would_silence_stays_as_it_is() -> None:
    gain = torch.tensor([-1.0, 3.0, 0.0]).bfloat16()
    folded, real = exact_fold(gain, torch.tensor([2.0, 1e6, 1e38]), offset=1.0)
    assert torch.equal(folded, gain)
    assert real.tolist() == [1.0, 1.0, 1.0]
