"""Outlier channels in 8 bits, the others in groups: what is rounded to what."""

from dataclasses import replace

import pytest
import torch

from duquant.config import ActivationConfig, WeightConfig
from duquant.quantizers.activation import round_activations
from duquant.quantizers.gptq import GPTQSolver
from duquant.quantizers.outliers import by_energy
from duquant.quantizers.weight import QuantizedWeight, quantize_weight

WEIGHT = WeightConfig(symmetric=True, group_size=16, clip="fixed", clip_ratio=0.85)
CLIP = torch.tensor([0.9, 0.9])


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_channels_are_ordered_by_energy() -> None:
    X = normal(50, 24) * torch.arange(24, 0, -1)
    energy = X[:, by_energy(X)].square().sum(0)
    assert bool((energy[1:] >= energy[:-1]).all())
    assert torch.equal(by_energy(torch.zeros(3, 5)), torch.arange(5))


@pytest.mark.parametrize("symmetric", [False, True])
def test_each_group_of_a_token_is_rounded_by_itself(symmetric: bool) -> None:
    X = normal(7, 48)
    config = ActivationConfig(symmetric=symmetric, group_size=16)
    parts = [round_activations(part, replace(config, group_size=None), CLIP) for part in X.split(16, dim=1)]
    assert torch.equal(round_activations(X, config, CLIP), torch.cat(parts, dim=1))
    # A width that the size does not divide takes the largest divisor below.
    assert torch.equal(round_activations(X, replace(config, group_size=20), CLIP), round_activations(X, config, CLIP))


def test_outliers_are_rounded_to_8_bits_unclipped_and_do_not_widen_the_others_grids() -> None:
    X = normal(9, 40)
    X[:, 32:] *= 100.0
    config = ActivationConfig(symmetric=True, group_size=16, clip_ratio=0.9)
    rounded = round_activations(X, config, CLIP, outliers=8)
    assert torch.equal(rounded[:, :32], round_activations(X[:, :32], config, CLIP))
    step = X[:, 32:].abs().amax(1, keepdim=True) / 127.5
    assert bool(((rounded - X)[:, 32:].abs() <= step * 0.5001).all())
    plain = round_activations(X, replace(config, group_size=None), CLIP)
    assert float((rounded - X).square().sum()) < 0.01 * float((plain - X).square().sum())


def test_rounding_in_blocks_of_rows_is_rounding_at_once() -> None:
    W = normal(12, 40)
    parts = [
        replace(quantize_weight(rows[:, :32], WEIGHT), outliers=quantize_weight(rows[:, 32:], WeightConfig(bits=8)))
        for rows in W.split(5)
    ]
    joined = QuantizedWeight.concatenate(parts)
    assert joined.outliers is not None
    assert torch.equal(joined.dequantize(), torch.cat([part.dequantize() for part in parts]))
    assert joined.dequantize().shape == W.shape
    assert joined.is_finite
    joined.outliers.scale[3] = torch.inf
    assert not joined.is_finite


def test_gptq_on_uncorrelated_channels_rounds_outliers_to_nearest_in_8_bits() -> None:
    W = normal(6, 40)
    solver = GPTQSolver.from_second_moment(torch.diag(torch.arange(1.0, 41.0)), 0.01)
    found = solver.quantize(W, WEIGHT, outliers=8)
    assert found.outliers is not None
    assert torch.equal(found.codes, quantize_weight(W[:, :32], WEIGHT).codes)
    assert torch.equal(found.outliers.codes, quantize_weight(W[:, 32:], WeightConfig(bits=8, symmetric=True)).codes)
    assert (found.bits, found.outliers.bits) == (4, 8)


def test_gptq_makes_up_for_errors_across_both_parts() -> None:
    W = normal(16, 40)
    mixed = normal(400, 40, seed=1) @ normal(40, 40, seed=2)
    mixed[:, 32:] *= 20.0
    H = mixed.T @ mixed
    found = GPTQSolver.from_second_moment(H, 0.01).quantize(W, WEIGHT, outliers=8)
    nearest = replace(
        quantize_weight(W[:, :32], WEIGHT), outliers=quantize_weight(W[:, 32:], WeightConfig(bits=8, symmetric=True))
    )

    def error(q: QuantizedWeight) -> float:
        return float((mixed @ (q.dequantize() - W).T).square().sum())

    assert error(found) < 0.9 * error(nearest)
