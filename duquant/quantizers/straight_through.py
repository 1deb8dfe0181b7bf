"""Rounding that gradients pass: to each value, and to the ends of its grid."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from duquant.quantizers.affine import code_range, make_grid


class RoundBetween(torch.autograd.Function):
    """Round each row to the asymmetric grid that spans [low, high], as `make_grid` and `fake_quantize` do.

    Backward takes rounding for the identity (the straight-through estimator): a value inside the grid passes its
    gradient on, one outside gives it to the end it is clamped to, and what rounding moved a value by, over the number
    of steps, goes to the ends through the step size.

    Reference: LWC of OmniQuant, arXiv 2308.13137v3, equation 2; the step's gradient is LSQ's, arXiv 1902.08153v3,
    equation 3. One function, because the same in single operations keeps eight copies of the weight.
    """

    @staticmethod
    def forward(
        ctx: Any,
        values: Float[Tensor, "*rows channels"],
        low: Float[Tensor, "*rows 1"],
        high: Float[Tensor, "*rows 1"],
        bits: int,
    ) -> Float[Tensor, "*rows channels"]:
        """Return the rounded values, float32."""
        grid = make_grid(low, high, bits=bits)
        ctx.save_for_backward(values, grid.scale, grid.zero_point)
        ctx.bits = bits
        qmin, qmax = code_range(bits)
        codes = (values / grid.scale).round_().add_(grid.zero_point).clamp_(qmin, qmax)
        return codes.sub_(grid.zero_point).mul_(grid.scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Return the gradients of values, low and high."""
        (gradient,) = gradients
        values, scale, zero_point = ctx.saved_tensors
        qmin, qmax = code_range(ctx.bits)
        steps = values / scale
        nearest = steps.round()
        moved = nearest - steps
        codes = nearest.add_(zero_point)
        below, above = codes < qmin, codes > qmax
        inside = gradient.masked_fill(below | above, 0.0)
        through_step = (inside * moved).sum(-1, keepdim=True) / (qmax - qmin)
        low = (gradient * below).sum(-1, keepdim=True) - through_step
        high = (gradient * above).sum(-1, keepdim=True) + through_step
        return (inside if ctx.needs_input_grad[0] else None), low, high, None


def round_between(
    values: Float[Tensor, "*rows channels"], low: Float[Tensor, "*rows 1"], high: Float[Tensor, "*rows 1"], *, bits: int
) -> Float[Tensor, "*rows channels"]:
    """Return `values` rounded between each row's ends; see RoundBetween."""
    rounded: Tensor = RoundBetween.apply(values, low, high, bits)  # type: ignore[no-untyped-call]  # torch's
    return rounded
