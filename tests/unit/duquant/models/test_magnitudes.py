"""Magnitudes of 16-bit numbers."""

import pytest
import torch

from duquant.models.magnitudes import is_finite, magnitude_bits

DTYPES = (torch.bfloat16, torch.float16)


def every_number(dtype: torch.dtype) -> torch.Tensor:
    """All 65,536 bit patterns."""
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_integers_are_in_the_order_of_the_magnitudes(dtype: torch.dtype) -> None:
    numbers = every_number(dtype)
    numbers = numbers[~numbers.isnan()]
    bits, magnitudes = magnitude_bits(numbers).int(), numbers.float().abs()
    by_bits = magnitudes[bits.argsort(stable=True)]
    assert torch.equal(by_bits, magnitudes.sort().values)
    assert torch.equal(magnitude_bits(numbers).view(dtype).float(), magnitudes)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_number_that_is_not_finite_is_found(dtype: torch.dtype, bad: float) -> None:
    X = torch.full((3, 5), torch.finfo(dtype).max, dtype=dtype)
    assert is_finite(X)
    assert is_finite(-X)
    X[1, 2] = bad
    assert not is_finite(X)


def test_every_pattern_is_told_apart_as_torch_does() -> None:
    for dtype in DTYPES:
        numbers = every_number(dtype)
        bits = magnitude_bits(numbers).int()
        infinite = int(magnitude_bits(torch.tensor(torch.inf, dtype=dtype)))
        assert torch.equal(bits < infinite, numbers.isfinite())


def test_nothing_is_finite() -> None:
    assert is_finite(torch.empty(0, dtype=torch.bfloat16))
