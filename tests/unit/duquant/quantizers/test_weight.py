"""Weight rounding: its bounds, its groups, its clips."""

from dataclasses import replace

import pytest
import torch

from duquant.config import WeightConfig
from duquant.errors import ConfigError
from duquant.quantizers.affine import code_range
from duquant.quantizers.weight import ClipRatios, QuantizedWeight, quantize_weight, resolve_group_size

EPS = torch.finfo(torch.float32).eps


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weighted_error(W: torch.Tensor, q: QuantizedWeight, importance: torch.Tensor) -> torch.Tensor:
    """The objective of the clip search, for each row and group."""
    error = (q.dequantize().double() - W.double()).square() * importance.double()
    return error.view(W.shape[0], q.scale.shape[1], -1).sum(-1)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [None, 8, 16, 48])
@pytest.mark.parametrize("bits", [4, 8])
def test_round_trip_errs_at_most_half_a_step(bits: int, group_size: int | None, symmetric: bool) -> None:
    W = normal(10, 48) * normal(10, 1, seed=1).exp()
    q = quantize_weight(W, WeightConfig(bits=bits, group_size=group_size, symmetric=symmetric))
    step = q.scale.double().repeat_interleave(48 // q.scale.shape[1], dim=1)
    assert bool(((q.dequantize().double() - W.double()).abs() <= step / 2 + 4 * EPS * (W.abs() + step)).all())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("clip", ["none", "fixed", "search"])
@pytest.mark.parametrize("offset", [0.0, 5.0, -5.0])
def test_zero_points_are_codes(offset: float, clip: str, bits: int) -> None:
    config = WeightConfig(bits=bits, clip=clip, clip_ratio=0.8 if clip == "fixed" else 1.0)  # type: ignore[arg-type]
    q = quantize_weight(normal(12, 32) + offset, config)
    low, high = code_range(bits)
    assert torch.equal(q.zero_point, q.zero_point.round())
    assert bool(((q.zero_point >= low) & (q.zero_point <= high)).all())
    assert int(q.codes.min()) >= low
    assert int(q.codes.max()) <= high


@pytest.mark.parametrize("group_size", [None, 8, 24])
def test_each_group_has_its_own_grid(group_size: int | None) -> None:
    q = quantize_weight(normal(5, 48), WeightConfig(group_size=group_size))
    assert q.scale.shape == q.zero_point.shape == (5, 1 if group_size is None else 48 // group_size)


def test_groups_equal_rounding_each_group_alone() -> None:
    W = normal(6, 64)
    together = quantize_weight(W, WeightConfig(group_size=16, clip="search"))
    for index in range(4):
        alone = quantize_weight(W[:, index * 16 : index * 16 + 16], WeightConfig(clip="search"))
        assert torch.equal(together.codes[:, index * 16 : index * 16 + 16], alone.codes)
        assert torch.equal(together.scale[:, index], alone.scale[:, 0])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("weighted", [False, True])
def test_searched_clip_is_never_worse_than_none(
    bits: int, group_size: int | None, symmetric: bool, weighted: bool
) -> None:
    W = normal(40, 48) ** 3
    importance = normal(48, seed=2).exp() if weighted else None
    config = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    plain = quantize_weight(W, WeightConfig(**config))  # type: ignore[arg-type]
    searched = quantize_weight(W, WeightConfig(clip="search", **config), importance)  # type: ignore[arg-type]
    objective = torch.ones(48) if importance is None else importance
    before, after = weighted_error(W, plain, objective), weighted_error(W, searched, objective)
    assert bool((after <= before * (1 + 48 * EPS)).all())
    if bits == 4:  # eight bits have little to gain
        assert float(after.sum()) < float(before.sum())


def test_searched_clip_is_never_worse_than_a_fixed_candidate() -> None:
    W, importance = normal(40, 48) ** 3, normal(48, seed=2).exp()
    searched = weighted_error(W, quantize_weight(W, WeightConfig(clip="search"), importance), importance)
    fixed = weighted_error(W, quantize_weight(W, WeightConfig(clip="fixed", clip_ratio=0.8)), importance)
    assert bool((searched <= fixed * (1 + 48 * EPS)).all())


def test_fixed_clip_shrinks_the_scale_by_its_ratio() -> None:
    W = normal(8, 32)
    plain, clipped = (
        quantize_weight(W, WeightConfig()),
        quantize_weight(W, WeightConfig(clip="fixed", clip_ratio=0.5)),
    )
    torch.testing.assert_close(clipped.scale, plain.scale / 2, rtol=4 * EPS, atol=0)


@pytest.mark.parametrize("clip", ["none", "search"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_zero_and_constant_rows_survive(symmetric: bool, clip: str) -> None:
    W = torch.zeros(4, 16)
    W[1], W[2] = 3.5, -0.25
    q = quantize_weight(W, WeightConfig(symmetric=symmetric, clip=clip))  # type: ignore[arg-type]
    restored = q.dequantize()
    assert bool(torch.isfinite(q.scale).all())
    assert torch.equal(restored[[0, 3]], torch.zeros(2, 16))
    # Asymmetric ranges run from zero to the constant, whose end is a code; symmetric ones err half a step at most.
    bound = 4 * EPS * 4 if not symmetric else float(q.scale.max()) / 2 * (1 + EPS)
    torch.testing.assert_close(restored, W, atol=bound, rtol=0)


def test_group_size_that_does_not_divide_the_width_names_the_field() -> None:
    with pytest.raises(ConfigError, match=r"weight\.group_size 32 has no divisor of the width 82"):
        quantize_weight(normal(4, 82), WeightConfig(group_size=32))


@pytest.mark.parametrize(("width", "requested"), [(576, 128), (1536, 128), (11008, 128), (48, 32), (64, 9), (5, 8)])
def test_groups_are_the_largest_that_divide_the_width(width: int, requested: int) -> None:
    size = resolve_group_size(width, requested)
    assert width % size == 0
    assert size == max(n for n in range(1, requested + 1) if width % n == 0)
    q = quantize_weight(normal(3, width), WeightConfig(group_size=requested))
    assert q.scale.shape == (3, width // size)


@pytest.mark.parametrize("group_size", [None, 16])
def test_learned_ratios_scale_each_end_of_each_group(group_size: int | None) -> None:
    W, groups = normal(5, 48), 1 if group_size is None else 3
    ratios = ClipRatios(0.5 + normal(5, groups, 1).sigmoid() / 2, 0.5 + normal(5, groups, 1, seed=1).sigmoid() / 2)
    config = WeightConfig(clip="learned", group_size=group_size)
    q = quantize_weight(W, config, ratios=ratios)
    grouped = W.view(5, groups, -1)
    low, high = grouped.amin(-1) * ratios.beta[..., 0], grouped.amax(-1) * ratios.gamma[..., 0]
    torch.testing.assert_close(q.scale, (high - low) / 15, rtol=4 * EPS, atol=0)
    parts = [quantize_weight(W[i : i + 1], config, ratios=ratios.rows(i, 1)) for i in range(5)]
    assert torch.equal(q.codes, torch.cat([part.codes for part in parts]))


def test_input_is_left_alone() -> None:
    W, importance = normal(4, 48), torch.ones(48)
    before = W.clone()
    quantize_weight(W, WeightConfig(clip="search"), importance)
    assert torch.equal(W, before)
    assert torch.equal(importance, torch.ones(48))


def test_transposed_and_bfloat16_weights_are_accepted() -> None:
    W = normal(48, 6).bfloat16()
    assert torch.equal(
        quantize_weight(W.T, WeightConfig()).codes, quantize_weight(W.T.contiguous().float(), WeightConfig()).codes
    )


OUTPUT = WeightConfig(clip="output")


def correlated(channels: int, tokens: int = 200) -> torch.Tensor:
    X = normal(tokens, channels, seed=5) @ normal(channels, channels, seed=6)
    return X.T @ X


def output_error(W: torch.Tensor, q: QuantizedWeight, H: torch.Tensor) -> torch.Tensor:
    error = (q.dequantize() - W).double()
    return ((error @ H.double()) * error).sum(1)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("other", ["none", "search"])
def test_clip_by_output_error_is_never_worse_in_any_row(other: str, symmetric: bool) -> None:
    W, H = normal(20, 32), correlated(32)
    found = quantize_weight(W, replace(OUTPUT, symmetric=symmetric), second_moment=H)
    config = WeightConfig(clip=other, symmetric=symmetric)  # type: ignore[arg-type]
    known = quantize_weight(W, config, H.diagonal())
    # The cost is summed in float32; the candidates of the other search are among this one's.
    assert bool((output_error(W, found, H) <= output_error(W, known, H) * (1 + 1e-4)).sum() >= len(W) - 1)
    assert float(output_error(W, found, H).sum()) < float(output_error(W, known, H).sum())


@pytest.mark.parametrize("W", [torch.zeros(3, 8), torch.full((3, 8), 2.5), torch.full((3, 8), -1e-9)])
def test_zero_and_constant_rows_survive_the_clip_by_output_error(W: torch.Tensor) -> None:
    q = quantize_weight(W, OUTPUT, second_moment=correlated(8))
    assert bool(torch.isfinite(q.scale).all())
    # 1e-9 is far above the floor of all scales, 1e-12: rows of less than half of that become zero.
    torch.testing.assert_close(q.dequantize(), W, rtol=0.1, atol=0.0)


def test_a_single_token_s_moment_is_enough_for_the_clip_by_output_error() -> None:
    W, H = normal(4, 16), correlated(16, tokens=1)
    q = quantize_weight(W, OUTPUT, second_moment=H)
    assert bool((output_error(W, q, H) <= output_error(W, quantize_weight(W, WeightConfig()), H) + 1e-3).all())
