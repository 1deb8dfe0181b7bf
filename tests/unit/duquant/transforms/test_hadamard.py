"""Laws of the flat orthogonal matrices."""

import math

import pytest
import torch

from duquant.transforms.hadamard import flat_orthogonal, hadamard_factor, is_prime, random_signs

EPS = torch.finfo(torch.float64).eps
HADAMARD_ORDERS = [1, 2, 4, 8, 12, 16, 20, 24, 32, 40, 44, 48, 60, 64, 80, 96, 128, 160, 192, 256]
OTHER_ORDERS = [3, 5, 6, 7, 9, 10, 18, 28, 36, 52, 72, 97, 100, 126, 127, 144, 769]


@pytest.mark.parametrize("n", [*HADAMARD_ORDERS, *OTHER_ORDERS])
def test_matrix_is_orthogonal(n: int) -> None:
    H = flat_orthogonal(n)
    assert H.dtype == torch.float64
    # A sum of n products of entries below sqrt(2/n): its rounding error stays under n * eps * 2.
    torch.testing.assert_close(H.T @ H, torch.eye(n, dtype=torch.float64), atol=4 * n * EPS, rtol=0)


@pytest.mark.parametrize("n", HADAMARD_ORDERS)
def test_hadamard_entries_all_have_the_same_size(n: int) -> None:
    assert hadamard_factor(n) is not None
    sizes = flat_orthogonal(n).abs()
    torch.testing.assert_close(sizes, torch.full_like(sizes, 1 / math.sqrt(n)), atol=2 * EPS, rtol=0)


@pytest.mark.parametrize("n", OTHER_ORDERS)
def test_hartley_entries_are_at_most_sqrt_2_over_n(n: int) -> None:
    assert hadamard_factor(n) is None
    assert float(flat_orthogonal(n).abs().max()) <= math.sqrt(2 / n) * (1 + n * EPS)


def test_matrix_is_the_same_every_time() -> None:
    assert torch.equal(flat_orthogonal(96), flat_orthogonal(96))


@pytest.mark.parametrize("n", range(1, 200))
def test_factor_times_a_power_of_two_gives_the_order(n: int) -> None:
    factor = hadamard_factor(n)
    if factor is not None:
        assert n % factor == 0
        quotient = n // factor
        assert quotient & (quotient - 1) == 0
        assert factor == 1 or is_prime(factor - 1)


def test_primes_are_told_from_other_numbers() -> None:
    assert [n for n in range(30) if is_prime(n)] == [2, 3, 5, 7, 11, 13, 17, 19, 23, 29]


def test_random_signs_come_from_their_generator_alone() -> None:
    torch.manual_seed(1)
    first = random_signs(64, torch.Generator().manual_seed(7))
    torch.manual_seed(2)
    assert torch.equal(first, random_signs(64, torch.Generator().manual_seed(7)))
    assert set(first.tolist()) == {1.0, -1.0}
