"""Laws of the affine grids."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duquant.quantizers.affine import code_range, dequantize, fake_quantize, make_grid, quantize, row_grid

EPS = torch.finfo(torch.float32).eps
ALL_BITS = [2, 3, 4, 5, 6, 7, 8]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounding_bound(X: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """scale / 2, and the float32 roundings of x / scale and of the product back."""
    return scale.double() / 2 + 4 * EPS * (X.double().abs() + scale.double())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", ALL_BITS)
def test_round_trip_errs_at_most_half_a_step(bits: int, symmetric: bool) -> None:
    X = normal(50, 33) * normal(50, 1, seed=1).exp()
    grid = row_grid(X, bits=bits, symmetric=symmetric)
    error = (dequantize(quantize(X, grid), grid).double() - X.double()).abs()
    assert bool((error <= rounding_bound(X, grid.scale)).all())


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=8),
    st.sampled_from(ALL_BITS),
    st.booleans(),
)
def test_round_trip_law_holds_for_any_row(values: list[float], bits: int, symmetric: bool) -> None:
    X = torch.tensor([values])
    grid = row_grid(X, bits=bits, symmetric=symmetric)
    error = (fake_quantize(X, grid).double() - X.double()).abs()
    # Rounding of the zero point: low / scale is up to 1e4 codes away from zero.
    assert bool((error <= rounding_bound(X, grid.scale) + 4 * EPS * X.double().abs().max()).all())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", ALL_BITS)
def test_codes_stay_in_their_range(bits: int, symmetric: bool) -> None:
    X = normal(20, 64)
    grid = row_grid(X, bits=bits, symmetric=symmetric, clip_ratio=torch.tensor([0.5, 0.5]))
    low, high = code_range(bits)
    codes = quantize(X, grid)
    assert codes.dtype == torch.int8
    assert int(codes.min()) >= low
    assert int(codes.max()) <= high


@pytest.mark.parametrize("value", [1.0, -3.7, 1e-3, -1e4, 6.5e4, 1e-20, 1e30])
@pytest.mark.parametrize("bits", ALL_BITS)
def test_constant_rows_are_exact(bits: int, value: float) -> None:
    X = torch.full((2, 9), value)
    restored = fake_quantize(X, row_grid(X, bits=bits))
    # scale = value * 1e-4 and its multiple: two roundings; values at the floor of the scale differ by less than it.
    torch.testing.assert_close(restored, X, rtol=4 * EPS, atol=1e-12)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", ALL_BITS)
def test_zero_rows_stay_zero(bits: int, symmetric: bool) -> None:
    X = torch.zeros(3, 8)
    grid = row_grid(X, bits=bits, symmetric=symmetric)
    assert bool(torch.isfinite(grid.scale).all())
    assert torch.equal(fake_quantize(X, grid), X)


@pytest.mark.parametrize("offset", [10.0, -10.0, 100.0, -1000.0])
def test_common_offset_costs_nothing(offset: float) -> None:
    X = normal(6, 64) + offset
    grid = row_grid(X, bits=4)
    low, high = code_range(4)
    assert bool(((grid.zero_point < low) | (grid.zero_point > high)).all())
    bound = rounding_bound(X, grid.scale) + 4 * EPS * abs(offset)
    assert bool(((fake_quantize(X, grid) - X).abs() <= bound).all())
    spread = X.amax(1, keepdim=True) - X.amin(1, keepdim=True)
    assert bool((grid.scale <= torch.maximum(spread / 15, 2e-4 * X.abs().amax(1, keepdim=True))).all())


@pytest.mark.parametrize("value", [5.0, -5.0])
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_a_clipped_row_on_one_side_of_zero_saturates_there(value: float, spread: float) -> None:
    X = value + spread * torch.linspace(-0.5, 0.5, 8)[None]
    restored = fake_quantize(X, row_grid(X, bits=4, clip_ratio=torch.tensor([0.75, 0.75])))
    farthest = X.abs().amax()
    assert float(restored.abs().amax()) == pytest.approx(0.75 * float(farthest), rel=0.02)
    assert bool((restored.abs() <= 0.77 * farthest).all())
    assert bool((restored.sign() == X.sign()).all())


def test_symmetric_grids_have_no_zero_point_and_the_usual_scale() -> None:
    X = normal(6, 64)
    grid = row_grid(X, bits=4, symmetric=True)
    assert not bool(grid.zero_point.any())
    torch.testing.assert_close(grid.scale, X.abs().amax(1, keepdim=True) / 7.5)


def test_clip_ratio_scales_each_end() -> None:
    X = torch.tensor([[-10.0, 0.0, 20.0]])
    grid = row_grid(X, bits=8, clip_ratio=torch.tensor([0.5, 0.8]))
    restored = fake_quantize(X, grid)[0].tolist()
    step = float(grid.scale)
    assert restored[0] == pytest.approx(-5, abs=step)
    assert restored[1] == pytest.approx(0, abs=step / 2)
    assert restored[2] == pytest.approx(16, abs=step)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_more_bits_never_err_more_than_their_own_bound(bits: int) -> None:
    X = normal(4, 256)
    worst = [float((fake_quantize(X, row_grid(X, bits=b)) - X).abs().max()) for b in range(2, bits + 1)]
    assert all(later <= earlier for earlier, later in pairwise(worst))


@pytest.mark.parametrize("symmetric", [False, True])
def test_fake_quantize_is_quantize_then_dequantize(symmetric: bool) -> None:
    X = normal(7, 40)
    grid = row_grid(X, bits=4, symmetric=symmetric)
    assert torch.equal(fake_quantize(X, grid), dequantize(quantize(X, grid), grid))


def test_zero_points_are_whole_numbers() -> None:
    grid = row_grid(normal(100, 16) + 5, bits=4)
    assert torch.equal(grid.zero_point, grid.zero_point.round())


def test_rounding_leaves_its_input_alone() -> None:
    X = normal(7, 40)
    before = X.clone()
    grid = row_grid(X, bits=4, clip_ratio=torch.tensor([0.5, 0.5]))
    quantize(X, grid)
    fake_quantize(X, grid)
    make_grid(X[:, :1], X[:, :1] + 1, bits=4)
    assert torch.equal(X, before)
