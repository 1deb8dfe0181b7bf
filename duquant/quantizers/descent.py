"""Coordinate descent: takes the columns of a rounded weight again, each in view of the errors of all the others.

The output error of a row is e H e^T, with e what rounding adds to its weights and H the second moment of the inputs.
With all other columns fixed it is a parabola in each one, so the best code of a column is the one nearest to its lowest
point, and no visit raises the error. GPTQ is a good start and stops short: a column that it has rounded never moves
again, whatever comes after.

Reference: QuantEase, arXiv 2309.01885v2, algorithm 1.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from duquant.quantizers.affine import Grid, dequantize, quantize

_COLUMNS = 128
"""Columns whose gradients are kept up to date; those of the next ones are computed anew, by one matrix product."""


def descend(
    codes: Int8[Tensor, "channels rows"],
    W: Float[Tensor, "channels rows"],
    grids: Sequence[Grid],
    moment: Float[Tensor, "channels channels"],
    passes: int,
) -> None:
    """Improve codes in place, until nothing changes or `passes` times over all columns.

    Args:
        codes: to start from, transposed: a column of the weight is one piece of memory.
        W: what was rounded, float32, transposed.
        grids: of each channel, (rows,).
        moment: of the inputs, positive definite, float32.
        passes: at most so many.
    """
    error = torch.stack([dequantize(code, grid) for code, grid in zip(codes, grids, strict=True)]).sub_(W)
    for _ in range(passes):
        before = codes.clone()
        for first in range(0, len(codes), _COLUMNS):
            block = slice(first, first + _COLUMNS)
            H, gradients = moment[block, block], moment[block] @ error
            for offset, gradient in enumerate(gradients):
                column = first + offset
                missed = error[column]
                lowest = W[column] + missed - gradient / H[offset, offset]
                code = quantize(lowest, grids[column])
                moved = dequantize(code, grids[column]) - W[column] - missed
                codes[column] = code
                missed += moved
                gradients[offset + 1 :].addr_(H[offset, offset + 1 :], moved)
        if torch.equal(codes, before):
            return
