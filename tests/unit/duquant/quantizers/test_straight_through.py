"""Rounding that gradients pass: the values of fake_quantize, the gradients of the straight-through estimator."""

import pytest
import torch
from torch import Tensor

from duquant.quantizers.affine import code_range, fake_quantize, make_grid
from duquant.quantizers.straight_through import round_between


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ends(values: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    return values.amin(-1, keepdim=True).clamp_max(0) * ratio, values.amax(-1, keepdim=True).clamp_min(0) * ratio


def straight(X: Tensor) -> Tensor:
    """Round forward, pass gradients as they are."""
    return X + (X.round() - X).detach()


def by_single_operations(values: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """The same rounding, differentiated by torch. A clamped value is its end, up to the zero point's rounding."""
    qmin, qmax = code_range(bits)
    scale = (high - low) / (qmax - qmin)
    offset = (torch.round(low / scale) - low / scale).detach()
    codes = straight(values / scale)
    inside = codes * scale
    lowest, highest = low + offset * scale.detach(), high + offset * scale.detach()
    shifted = codes.detach() + qmin - torch.round(low / scale).detach()
    return torch.where(shifted < qmin, lowest, torch.where(shifted > qmax, highest, inside))


@pytest.mark.parametrize("ratio", [1.0, 0.7])
@pytest.mark.parametrize("bits", [4, 8])
def test_values_are_those_of_fake_quantize(bits: int, ratio: float) -> None:
    X = normal(3, 5, 32)
    low, high = ends(X, ratio)
    assert torch.equal(round_between(X, low, high, bits=bits), fake_quantize(X, make_grid(low, high, bits=bits)))


@pytest.mark.parametrize("ratio", [1.0, 0.7])
def test_gradients_are_those_of_the_straight_through_estimator(ratio: float) -> None:
    weights = normal(4, 24, seed=1).double()
    found, expected = [], []
    for function, gradients in ((round_between, found), (by_single_operations, expected)):
        X = normal(4, 24).double().requires_grad_()
        low, high = (end.detach().requires_grad_() for end in ends(X, ratio))
        Y = function(X, low, high, bits=4)  # type: ignore[operator]
        (Y * weights).sum().backward()
        gradients += [X.grad, low.grad, high.grad]
    for one, other in zip(found, expected, strict=True):
        assert one is not None
        assert other is not None
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)
    assert bool((found[1].abs() > 0).all())


def test_a_value_outside_moves_its_end_and_not_itself() -> None:
    X = torch.tensor([[-3.0, 0.1, 3.0]], requires_grad=True)
    low, high = torch.tensor([[-1.0]], requires_grad=True), torch.tensor([[1.0]], requires_grad=True)
    round_between(X, low, high, bits=4).backward(torch.tensor([[2.0, 0.0, 5.0]]))
    assert X.grad is not None
    assert low.grad is not None
    assert high.grad is not None
    assert X.grad.tolist() == [[0.0, 0.0, 0.0]]
    assert (low.grad.item(), high.grad.item()) == (2.0, 5.0)


@pytest.mark.parametrize("X", [torch.zeros(2, 8), torch.full((2, 8), 2.5)])
def test_constant_rows_have_finite_gradients(X: Tensor) -> None:
    low, high = (end.requires_grad_() for end in ends(X, 1.0))
    round_between(X, low, high, bits=4).sum().backward()
    assert low.grad is not None
    assert high.grad is not None
    assert bool(torch.isfinite(torch.cat((low.grad, high.grad))).all())
