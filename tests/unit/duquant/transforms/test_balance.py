"""Balancing: the closed form is the minimum of the expected output error, and bad moments do no harm."""

import pytest
import torch

from duquant.transforms.balance import balance, diagonal_blocks

DAMP = 1e-3


def moment(channels: int, seed: int, rows: int = 200) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    X = torch.randn(rows, channels, generator=generator, dtype=torch.float64) @ mixing
    return X.T @ X


def damped(M: torch.Tensor) -> torch.Tensor:
    mean = M.diagonal().mean()
    return M / mean + DAMP * torch.eye(len(M), dtype=M.dtype)


def expected_error(B: torch.Tensor, S: torch.Tensor, G: torch.Tensor) -> float:
    inverse = torch.linalg.inv(B)
    return float((B.T @ S @ B).trace() * (inverse @ G @ inverse.T).trace())


def test_nothing_near_the_closed_form_is_better() -> None:
    S, G = moment(6, 0), moment(6, 1)
    B = balance(S, G, alpha=0.5, damp=DAMP)
    least = expected_error(B, damped(S), damped(G))
    generator = torch.Generator().manual_seed(2)
    for size in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(20):
            change = torch.randn(6, 6, generator=generator, dtype=torch.float64) * size
            nearby = B @ torch.matrix_exp(change)
            assert expected_error(nearby, damped(S), damped(G)) >= least * (1 - 1e-9)


def test_the_least_error_is_the_squared_trace_of_the_product_s_root() -> None:
    S, G = moment(6, 0), moment(6, 1)
    B = balance(S, G, alpha=0.5, damp=DAMP)
    eigenvalues = torch.linalg.eigvals(damped(S) @ damped(G)).real
    torch.testing.assert_close(
        expected_error(B, damped(S), damped(G)), float(eigenvalues.sqrt().sum() ** 2), rtol=1e-9, atol=0
    )


def test_diagonal_moments_give_smoothing_by_root_mean_squares() -> None:
    S, G = torch.tensor([4.0, 1.0, 9.0]), torch.tensor([1.0, 16.0, 2.0])
    B = balance(S.diag(), G.diag(), alpha=0.5, damp=1e-6)
    scale = (G / G.mean() / (S / S.mean())) ** 0.25
    torch.testing.assert_close(B, scale.double().diag(), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_ends_of_alpha_whiten_one_side(alpha: float) -> None:
    S, G = moment(5, 0), moment(5, 1)
    B = balance(S, G, alpha=alpha, damp=DAMP)
    inverse = torch.linalg.inv(B)
    white = B @ damped(S) @ B if alpha == 1.0 else inverse @ damped(G) @ inverse
    torch.testing.assert_close(white, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-8)


def test_a_common_factor_changes_nothing_but_the_scale() -> None:
    S, G = moment(5, 0), moment(5, 1)
    torch.testing.assert_close(
        balance(S * 1e6, G * 1e-6, alpha=0.5, damp=DAMP), balance(S, G, alpha=0.5, damp=DAMP), rtol=1e-8, atol=0
    )


@pytest.mark.parametrize(
    ("S", "G"),
    [
        (torch.zeros(4, 4), torch.eye(4)),
        (torch.eye(4), torch.zeros(4, 4)),
        (torch.zeros(4, 4), torch.zeros(4, 4)),
        (torch.tensor([1.0, 0.0, 2.0, 1e-30]).diag(), torch.eye(4)),
        (torch.ones(4, 4), torch.ones(4, 4)),  # a single token, a single row
        (torch.eye(4) - 1e-3, torch.eye(4)),  # not positive semidefinite
    ],
)
def test_dead_channels_and_flat_moments_stay_finite_and_invertible(S: torch.Tensor, G: torch.Tensor) -> None:
    B = balance(S, G, alpha=0.5, damp=0.01)
    assert bool(torch.isfinite(B).all())
    assert float(torch.linalg.cond(B)) < 1e3


def test_blocks_are_those_on_the_diagonal() -> None:
    M = torch.arange(36.0).view(6, 6)
    assert torch.equal(diagonal_blocks(M, 2), torch.stack([M[0:2, 0:2], M[2:4, 2:4], M[4:6, 4:6]]))
