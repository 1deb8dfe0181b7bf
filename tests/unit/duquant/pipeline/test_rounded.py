"""Rounding that gradients pass: the values of run time, the gradient of the identity."""

import pytest
import torch

from duquant.config import ActivationConfig
from duquant.pipeline.rounded import rounded_rows
from duquant.quantizers.activation import round_activations

CLIP = torch.tensor([0.9, 0.8])


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_those_of_run_time_and_gradients_pass(bits: int, dtype: torch.dtype) -> None:
    config = ActivationConfig(bits=bits)
    X = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = X.clone()
    X.requires_grad_()
    found = rounded_rows(X, config, CLIP)
    expected = round_activations(before.float(), config, CLIP).to(dtype)
    assert torch.equal(found.detach(), expected)
    assert found.dtype == dtype
    gradient = torch.randn(5, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    found.backward(gradient)
    assert X.grad is not None
    assert torch.equal(X.grad, gradient)


@pytest.mark.parametrize("bits", [4, 16])
def test_rows_are_a_copy(bits: int) -> None:
    X = torch.zeros(2, 8)
    rounded_rows(X, ActivationConfig(bits=bits), CLIP).add_(1.0)
    assert torch.equal(X, torch.zeros(2, 8))
