"""What is asked of a second moment of activations before weights are rounded by it, and what errors cost under it."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from duquant.errors import CalibrationError

_DIAGONAL_NOISE = 1e-3
"""A diagonal below zero by less than this share of the largest entry is rounding: of sums, or of a transform."""
_COST_NOISE = 1e-4
"""As much for a cost, of tr(H) |e|^2. Balanced blocks of badly conditioned moments leave eigenvalues of -1e-5 tr(H)."""


def check_moment(H: Float[Tensor, "channels channels"]) -> None:
    """Refuse a second moment that no inputs give, as far as its entries tell.

    Whether it is positive semidefinite takes a factorization; GPTQ makes one, and OutputCost watches what it returns.

    Raises:
        CalibrationError: H is not finite, or its diagonal is negative beyond rounding, or zero where H is not.
    """
    low, high = torch.aminmax(H)  # not isfinite: that would take a quarter of H's room
    largest = float(torch.maximum(-low, high))
    if not math.isfinite(largest):
        raise CalibrationError("the second moment of the activations is NaN or Inf")
    least, most = (float(end) for end in torch.aminmax(H.diagonal()))
    if least < -_DIAGONAL_NOISE * largest or most <= 0.0 < largest:
        channel = int(H.diagonal().argmin())
        raise CalibrationError(
            f"the second moment of the activations has {least:g} on its diagonal at channel {channel}, "
            f"beside entries of up to {largest:g}, which no inputs give: it is damaged; calibrate again"
        )


class OutputCost:
    """What errors of a weight's rows cost at the outputs, e H e^T for H the second moment of its inputs.

    No error costs less than nothing, and a search for the least cost would take the one that seems to: `check` tells
    of it afterwards, since asking each time would wait for the device.

    Raises:
        CalibrationError: as `check_moment`.
    """

    def __init__(self, H: Float[Tensor, "channels channels"]) -> None:
        check_moment(H)
        self._H = H
        # |e H e^T| is at most tr(H) |e|^2 for a second moment, and its rounding is a share of that.
        self._noise = _COST_NOISE * H.diagonal().sum()
        self._is_negative = torch.zeros((), dtype=torch.bool, device=H.device)

    def __call__(self, error: Float[Tensor, "rows 1 channels"]) -> Float[Tensor, "rows 1 1"]:
        """Return the cost of each row's error."""
        rows = error[:, 0]
        cost = (rows @ self._H).mul_(rows).sum(-1)
        squares = torch.linalg.vector_norm(rows, dim=-1).square_()  # without a copy of the rows
        self._is_negative |= (cost < -self._noise * squares).any()
        return cost.view(-1, 1, 1)

    def check(self) -> None:
        """Raise if an error cost less than nothing so far.

        Raises:
            CalibrationError: one did.
        """
        if bool(self._is_negative):
            raise CalibrationError(
                "the second moment of the activations is not positive semidefinite: by it an error of the weight costs "
                "less than none, which no inputs give, so it is damaged; calibrate again"
            )
