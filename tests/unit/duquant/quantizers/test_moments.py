"""Second moments that no inputs give are refused; those that inputs give never are, however badly conditioned."""

import pytest
import torch

from duquant.config import WeightConfig
from duquant.errors import CalibrationError
from duquant.quantizers.gptq import GPTQSolver
from duquant.quantizers.moments import OutputCost, check_moment
from duquant.quantizers.weight import quantize_weight


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def changed(row: int, column: int, value: float) -> torch.Tensor:
    """Return I with one entry, and its mirror image, of another value."""
    H = torch.eye(16)
    H[row, column] = H[column, row] = value
    return H


DAMAGED = {
    "all negative": (-torch.eye(16), r"-1 on its diagonal at channel 0"),
    "one negative": (changed(3, 3, -0.01), r"-0\.01 on its diagonal at channel 3"),
    "zero diagonal": (changed(2, 5, 1.0) - torch.eye(16), r"0 on its diagonal"),
    "nan": (changed(2, 5, torch.nan), "NaN or Inf"),
    "inf": (changed(2, 5, torch.inf), "NaN or Inf"),
    "-inf": (changed(2, 5, -torch.inf), "NaN or Inf"),
    "nan on the diagonal": (changed(2, 2, torch.nan), "NaN or Inf"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_moments_are_refused_by_all_that_round_with_them(name: str) -> None:
    H, message = DAMAGED[name]
    with pytest.raises(CalibrationError, match=message):
        check_moment(H)
    with pytest.raises(CalibrationError, match=message):
        GPTQSolver.from_second_moment(H, 0.01)
    with pytest.raises(CalibrationError, match=message):
        quantize_weight(normal(4, 16), WeightConfig(clip="output"), second_moment=H)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("H", [changed(0, 1, 5.0), changed(0, 1, -5.0), torch.eye(16) - 0.5])
def test_a_clip_is_not_searched_by_costs_below_zero(H: torch.Tensor, symmetric: bool) -> None:
    """All have a sound diagonal, and an eigenvalue of -4 or -7."""
    check_moment(H)
    with pytest.raises(CalibrationError, match="not positive semidefinite"):
        quantize_weight(normal(64, 16), WeightConfig(clip="output", symmetric=symmetric), second_moment=H)


@pytest.mark.parametrize("tokens", [0, 1, 5, 300])
def test_moments_of_any_inputs_are_accepted(tokens: int) -> None:
    """Dead channels, massive ones and fewer tokens than channels, rotated in float32: rounding alone is negative."""
    channels = 64
    X = normal(tokens, channels) * normal(channels, seed=1).exp()
    X[:, 7], X[:1, 9] = 0.0, 1e4
    R = torch.linalg.qr(normal(channels, channels, seed=2)).Q
    for H in (X.T @ X, R.T @ (X.T @ X) @ R):
        check_moment(H)
        cost = OutputCost(H)
        # The errors that cost least of all: H's own eigenvectors, most of them of eigenvalue 0 when tokens are few.
        cost(torch.linalg.eigh(H.double()).eigenvectors.T.float()[:, None])
        cost(normal(200, 1, channels, seed=3))
        cost.check()


def test_rounding_may_leave_a_diagonal_a_little_below_zero() -> None:
    H = changed(3, 3, -1e-6)
    check_moment(H)
    assert GPTQSolver.from_second_moment(H, 0.01).damp == 0.01
