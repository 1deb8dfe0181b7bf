"""Cayley SGD: it stays orthogonal, it descends, and it is bounded."""

import pytest
import torch

from duquant.transforms.cayley import cayley_step, nearest_orthogonal, orthogonality_error


def rotation(n: int, seed: int, *batch: int) -> torch.Tensor:
    gaussian = torch.randn(*batch, n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(gaussian).Q


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6], ids=["small", "medium", "huge"])
def test_hundreds_of_steps_stay_orthogonal(size: float) -> None:
    R = rotation(24, 0, 3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(300):
        R = cayley_step(R, size * torch.randn(R.shape, generator=generator, dtype=torch.float64), 1.5)
    assert orthogonality_error(R) < 1e-12


def test_the_nearest_rotation_is_found() -> None:
    """min |R A - B|^2 over rotations has a closed form (Procrustes) to compare with."""
    A = torch.randn(16, 40, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    B = rotation(16, 3) @ A
    U, _, Vh = torch.linalg.svd(B @ A.T)
    wanted = U @ Vh
    R = nearest_orthogonal(wanted + 0.05 * torch.randn(16, 16, generator=torch.Generator().manual_seed(4)).double())
    before = float((R - wanted).norm())
    for _ in range(400):
        R = cayley_step(R, 2 * (R @ A - B) @ A.T, 0.004)
    assert before > 0.2
    assert float((R - wanted).norm()) < 1e-6


def test_a_small_step_moves_as_the_gradient_says() -> None:
    """To first order: the loss <G, R> falls by the rate times the squared norm of G's part along the manifold."""
    R = rotation(12, 5)
    G = torch.randn(12, 12, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    tangent = (G - R @ G.T @ R) / 2
    rate = 1e-6
    moved = float((G * (cayley_step(R, G, rate) - R)).sum())
    assert moved == pytest.approx(-rate * float(tangent.square().sum()), rel=1e-3)


def test_no_step_turns_further_than_its_bound() -> None:
    """The step's skew matrix has 1-norm 1 at most, so no vector moves by more than its own length."""
    R = rotation(20, 7)
    G = 1e9 * torch.randn(20, 20, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    assert float(torch.linalg.matrix_norm(cayley_step(R, G, 1000.0) - R, ord=2)) <= 1.0


def test_a_gradient_normal_to_the_manifold_moves_nothing() -> None:
    R = rotation(8, 9)
    S = torch.randn(8, 8, generator=torch.Generator().manual_seed(10), dtype=torch.float64)
    assert float((cayley_step(R, R @ (S + S.T), 1.0) - R).abs().max()) < 1e-12
