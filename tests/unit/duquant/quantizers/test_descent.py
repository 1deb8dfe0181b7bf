"""Coordinate descent: never a larger error under the damped moment, down to where no code alone is better."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor

from duquant.config import WeightConfig
from duquant.quantizers import descent
from duquant.quantizers.gptq import GPTQSolver
from duquant.quantizers.weight import QuantizedWeight

PASSES = 30
CONFIGS = {
    "row": WeightConfig(solver="gptq", descent_passes=PASSES),
    "clipped": WeightConfig(solver="gptq", clip="search", descent_passes=PASSES),
    "symmetric": WeightConfig(solver="gptq", symmetric=True, descent_passes=PASSES),
    "groups": WeightConfig(solver="gptq", group_size=16, descent_passes=PASSES),
    "eight": WeightConfig(solver="gptq", bits=8, descent_passes=PASSES),
    "damped": WeightConfig(solver="gptq", damp=0.3, descent_passes=PASSES),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def second_moment(channels: int) -> Tensor:
    """Of correlated inputs."""
    X = normal(400, channels, seed=1) @ normal(channels, channels, seed=2)
    return X.T @ X


def solve(W: Tensor, H: Tensor, config: WeightConfig) -> QuantizedWeight:
    """Round with as many passes as the config has."""
    return GPTQSolver.from_second_moment(H, config.damp, descends=True).quantize(W, config)


def output_error(W: Tensor, found: QuantizedWeight, H: Tensor, damp: float) -> float:
    """Under the moment that the solver sees, in float64."""
    error = (W - found.dequantize()).double()
    H = H.double() + damp * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)
    return float(((error @ H) * error).sum())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
@pytest.mark.parametrize("channels", [48, 160])
def test_every_pass_lowers_the_error(config: WeightConfig, channels: int) -> None:
    """Fewer channels than are kept up to date at once, and more."""
    W, H = normal(16, channels), second_moment(channels)
    found = [solve(W, H, replace(config, descent_passes=passes)) for passes in range(3)]
    errors = [output_error(W, each, H, config.damp) for each in found]
    assert errors[0] > errors[1] >= errors[2]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_it_ends_where_no_code_alone_is_better(config: WeightConfig) -> None:
    W, H = normal(5, 48), second_moment(48)
    found = solve(W, H, config)
    error = output_error(W, found, H, config.damp)
    low, high = -(2 ** (config.bits - 1)), 2 ** (config.bits - 1) - 1
    for row in range(len(W)):
        for channel in range(W.shape[1]):
            for step in (-1, 1):
                codes = found.codes.clone()
                codes[row, channel] = min(max(int(codes[row, channel]) + step, low), high)
                other = output_error(W, replace(found, codes=codes), H, config.damp)
                assert other >= error * (1 - 1e-5), (row, channel, step)


def test_grids_and_outliers_stay() -> None:
    W, H, config = normal(12, 80), second_moment(80), CONFIGS["symmetric"]
    solver = GPTQSolver.from_second_moment(H, config.damp, descends=True)
    before = solver.quantize(W, replace(config, descent_passes=0), outliers=16)
    after = solver.quantize(W, config, outliers=16)
    assert torch.equal(after.scale, before.scale)
    assert before.outliers is not None
    assert after.outliers is not None
    assert torch.equal(after.outliers.scale, before.outliers.scale)
    assert output_error(W, after, H, config.damp) < output_error(W, before, H, config.damp)


def test_it_ends_early_where_nothing_changes() -> None:
    W, H = normal(6, 40), second_moment(40)
    with mock.patch.object(descent, "quantize", wraps=descent.quantize) as visits:
        found = solve(W, H, CONFIGS["row"])
    assert visits.call_count < PASSES * 40
    assert torch.equal(found.codes, solve(W, H, replace(CONFIGS["row"], descent_passes=2 * PASSES)).codes)


def test_a_moment_that_is_damped_more_is_damped_as_much_here() -> None:
    H = torch.eye(16)
    H[0, 1] = H[1, 0] = 1.05
    solver = GPTQSolver.from_second_moment(H, 0.01, descends=True)
    assert solver.damp == pytest.approx(0.1)
    assert solver.moment is not None
    torch.testing.assert_close(solver.moment, H[solver.order][:, solver.order] + solver.damp * torch.eye(16))
    assert GPTQSolver.from_second_moment(H, 0.01).moment is None
