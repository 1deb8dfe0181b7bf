"""GPTQ: the same as the algorithm written down plainly, never worse than nearest under its objective, and robust."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from duquant.config import WeightConfig
from duquant.errors import CalibrationError, ConfigError
from duquant.quantizers.gptq import GPTQSolver
from duquant.quantizers.weight import QuantizedWeight, quantize_weight

CONFIGS = {
    "row": WeightConfig(solver="gptq"),
    "clipped": WeightConfig(solver="gptq", clip="search"),
    "symmetric": WeightConfig(solver="gptq", symmetric=True),
    "groups": WeightConfig(solver="gptq", group_size=16),
    "eight": WeightConfig(solver="gptq", bits=8),
}
DESCENT = {name: replace(config, descent_passes=30) for name, config in CONFIGS.items()}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def second_moment(channels: int, tokens: int = 400, seed: int = 1) -> Tensor:
    """Of correlated inputs, with channels of very different size."""
    X = normal(tokens, channels, seed=seed) @ normal(channels, channels, seed=seed + 1)
    X = X * normal(channels, seed=seed + 2).exp()
    return X.T @ X


def output_error(W: Tensor, quantized: QuantizedWeight, H: Tensor) -> float:
    error = (W - quantized.dequantize()).double()
    return float(((error @ H.double()) * error).sum())


def plain_gptq(W: Tensor, H: Tensor, config: WeightConfig) -> Tensor:
    """The codes by the definition: after each column the rest moves by -error * Hinv[j, rest] / Hinv[j, j]."""
    channels = W.shape[1]
    grid = quantize_weight(W, config, H.diagonal().clone())
    order = torch.argsort(H.diagonal(), descending=True, stable=True)
    W, H = W[:, order].double(), H[order][:, order].double()
    inverse = torch.linalg.inv(H + config.damp * H.diagonal().mean() * torch.eye(channels))
    low, high = -(2 ** (config.bits - 1)), 2 ** (config.bits - 1) - 1
    codes = torch.empty(W.shape, dtype=torch.int8)
    for j in range(channels):
        group = int(order[j]) // (channels // grid.scale.shape[1])
        scale, zero_point = grid.scale[:, group].double(), grid.zero_point[:, group].double()
        code = ((W[:, j] / scale).round() + zero_point).clamp(low, high)
        codes[:, order[j]] = code.to(torch.int8)
        error = (W[:, j] - (code - zero_point) * scale) / inverse[0, 0]
        W[:, j:] -= error[:, None] * inverse[0]
        # Column j is done: take it out of the inverse.
        inverse = (inverse - inverse[:, :1] * inverse[:1] / inverse[0, 0])[1:, 1:]
    return codes


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
@pytest.mark.parametrize("channels", [16, 48, 144])
def test_codes_are_those_of_the_definition(channels: int, config: WeightConfig) -> None:
    W, H = normal(7, channels), second_moment(channels)
    found = GPTQSolver.from_second_moment(H, config.damp).quantize(W, config)
    different = (found.codes != plain_gptq(W, H, config)).double().mean()
    # float32 against float64: a value in the middle between two codes may fall to either side.
    assert float(different) < 0.01


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_output_error_is_far_below_nearest(config: WeightConfig) -> None:
    W, H = normal(32, 160), second_moment(160)
    nearest = quantize_weight(W, config, H.diagonal().clone())
    found = GPTQSolver.from_second_moment(H, config.damp).quantize(W, config)
    assert torch.equal(found.scale, nearest.scale)
    assert torch.equal(found.zero_point, nearest.zero_point)
    assert output_error(W, found, H) < 0.7 * output_error(W, nearest, H)


def solve(W: Tensor, H: Tensor, config: WeightConfig) -> QuantizedWeight:
    """Round with as many passes as the config has."""
    solver = GPTQSolver.from_second_moment(H, config.damp, descends=config.descent_passes > 0)
    return solver.quantize(W, config)


def damped(H: Tensor, config: WeightConfig) -> Tensor:
    """The moment that the solver sees, in float64."""
    return H.double() + config.damp * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)


def test_uncorrelated_channels_round_to_nearest() -> None:
    W, config = normal(9, 40), CONFIGS["row"]
    found = GPTQSolver.from_second_moment(torch.diag(torch.arange(1.0, 41.0)), config.damp).quantize(W, config)
    assert torch.equal(found.codes, quantize_weight(W, config).codes)


@pytest.mark.parametrize("passes", [0, 2])
def test_rows_do_not_depend_on_each_other(passes: int) -> None:
    config = replace(CONFIGS["clipped"], descent_passes=passes)
    W, solver = normal(12, 48), GPTQSolver.from_second_moment(second_moment(48), 0.01, descends=passes > 0)
    together = solver.quantize(W, config)
    parts = [solver.quantize(rows, config) for rows in W.split(4)]
    assert torch.equal(together.codes, torch.cat([part.codes for part in parts]))


def test_weight_is_left_alone() -> None:
    W = normal(3, 16)
    before = W.clone()
    GPTQSolver.from_second_moment(second_moment(16), 0.01).quantize(W, CONFIGS["row"])
    assert torch.equal(W, before)


@pytest.mark.parametrize("configs", [CONFIGS, DESCENT])
@pytest.mark.parametrize("tokens", [1, 5])
def test_fewer_tokens_than_channels(tokens: int, configs: dict[str, WeightConfig]) -> None:
    """One token gives a second moment of rank one: damping makes up for the rest."""
    W, X = normal(6, 48), normal(tokens, 48, seed=3)
    H = X.T @ X
    found = solve(W, H, configs["row"])
    assert output_error(W, found, H) < output_error(W, quantize_weight(W, CONFIGS["row"]), H)


@pytest.mark.parametrize("configs", [CONFIGS, DESCENT])
def test_dead_channels_and_constant_rows(configs: dict[str, WeightConfig]) -> None:
    W, H = normal(6, 48), second_moment(48)
    H[5] = H[:, 5] = 0.0
    W[2], W[3] = 0.25, 0.0
    found = solve(W, H, configs["row"])
    assert torch.equal(found.dequantize()[3], W[3])
    assert bool(((found.dequantize()[2] - 0.25).abs() <= found.scale[2]).all())
    step = found.scale[:, 0] / 2 * (1 + 1e-5)
    assert bool(((found.dequantize()[:, 5] - W[:, 5]).abs() <= step)[:2].all()), "nothing moves a dead channel"


@pytest.mark.parametrize("configs", [CONFIGS, DESCENT])
def test_no_input_at_all_rounds_to_nearest(configs: dict[str, WeightConfig]) -> None:
    W = normal(4, 16)
    found = solve(W, torch.zeros(16, 16), configs["row"])
    assert torch.equal(found.codes, quantize_weight(W, CONFIGS["row"]).codes)


def test_a_moment_that_is_not_positive_definite_is_damped_more_and_says_so() -> None:
    H = torch.eye(16)
    H[0, 1] = H[1, 0] = 1.05
    assert GPTQSolver.from_second_moment(H, 0.01).damp == pytest.approx(0.1)
    assert GPTQSolver.from_second_moment(torch.eye(16), 0.01).damp == 0.01


@pytest.mark.parametrize("damp", [0.01, 0.02, 0.3, 1.0])
def test_every_damp_is_raised_up_to_the_same_last_one(damp: float) -> None:
    """The least eigenvalue is -4: ten times the mean is enough, and what comes before it from any start is not."""
    H = torch.eye(16)
    H[0, 1] = H[1, 0] = 5.0
    assert GPTQSolver.from_second_moment(H, damp).damp == pytest.approx(10.0)


def test_a_single_token_s_moment_is_damped_until_its_inverse_has_a_factor() -> None:
    """Of rank one and hardly damped: what float32 leaves of it may have an inverse that has no factor."""
    solvers = [GPTQSolver.from_second_moment(second_moment(64, tokens=1, seed=seed), 1e-6) for seed in range(32)]
    for solver in solvers:
        diagonal = solver.factor.diagonal()
        assert bool((torch.isfinite(diagonal) & (diagonal > 0)).all())
    assert any(solver.damp > 1e-6 for solver in solvers), "none of these needed more"


def test_hopeless_moments_are_errors() -> None:
    H = torch.eye(16)
    H[0, 1] = H[1, 0] = 1e3
    with pytest.raises(CalibrationError, match=r"not positive definite, not even with 0\.3, 3, 10 times"):
        GPTQSolver.from_second_moment(H, 0.3)
    H[0, 1] = torch.nan
    with pytest.raises(CalibrationError, match="NaN or Inf"):
        GPTQSolver.from_second_moment(H, 0.01)


def test_group_size_that_does_not_divide_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no divisor of the width 22"):
        GPTQSolver.from_second_moment(second_moment(22), 0.01).quantize(
            normal(2, 22), WeightConfig(solver="gptq", group_size=8)
        )
