"""The authors' search: the laws that it keeps, and the differences from the paper that it is here for."""

import math

import pytest
import torch

from duquant.transforms.reference import reference_rotation, spreading_matrix


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("n", [1, 2, 16, 64])
def test_everything_is_orthogonal(n: int) -> None:
    eye = torch.eye(n, dtype=torch.float64)
    M = spreading_matrix(n, generator())
    torch.testing.assert_close(M @ M.T, eye)
    R = reference_rotation(torch.randn(20, 2 * n, generator=generator(1)), n, steps=16, generator=generator())
    torch.testing.assert_close(R @ R.T, eye)


def test_first_row_is_not_flat() -> None:
    """In the paper's order of factors the outlier does not spread evenly: its first entry is the flat value alone."""
    n = 64
    row = spreading_matrix(n, generator())[0]
    assert float(row[0]) == pytest.approx(1 / math.sqrt(n))
    assert float(row.abs().max()) * math.sqrt(n) > 1.5


def test_range_never_grows_and_doing_nothing_is_a_candidate() -> None:
    X = torch.randn(32, 64, generator=generator(2))
    X[:, 5] *= 40
    R = reference_rotation(X, 16, steps=32, generator=generator()).float()
    turned = X.view(-1, 16) @ R
    assert float(turned.max() - turned.min()) < float(X.max() - X.min())
    flat = torch.ones(4, 16) / 4
    flat[:, ::2] *= -1
    assert torch.equal(reference_rotation(flat, 16, steps=4, generator=generator()), torch.eye(16).double())


def test_channel_comes_from_the_row_number() -> None:
    """One outlier of one token, moved to another column: the same swaps; to another row: others."""
    X = torch.zeros(16, 16)
    X[3, 7] = 1.0
    expected = reference_rotation(X, 16, steps=1, generator=generator())
    M = spreading_matrix(16, generator())
    swap = torch.arange(16)
    swap[[0, 3]] = swap[[3, 0]]
    torch.testing.assert_close(expected, M[swap][:, swap])
