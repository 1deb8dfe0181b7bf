"""How long a job waits for its next try: by class of error, doubling, with full jitter.

Reference: Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
"""

import errno
import random
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.ENOMEM})


class ErrorClass(StrEnum):
    """Errors that a later try may not meet. All others end the job at once."""

    OUTAGE = "outage"
    """A server does not answer, or a worker process died: it comes back by itself."""
    SCARCITY = "scarcity"
    """Disk or memory is full: somebody has to make room, or another job has to end."""


@dataclass(frozen=True, slots=True)
class BackOff:
    """The longest pause before each try: `factor` times the first pause of the settings, doubled with every try."""

    factor: float
    limit_s: float


BACK_OFF = {
    ErrorClass.OUTAGE: BackOff(factor=1, limit_s=300),
    ErrorClass.SCARCITY: BackOff(factor=6, limit_s=1800),
}


def pause_s(
    error: ErrorClass, tries: int, *, first_s: float, jitter: Callable[[float, float], float] = random.uniform
) -> float:
    """Return the pause after this many tries: anything between nothing and the back-off.

    Full jitter spreads the jobs that one outage has hit over the whole time, so that they do not come back as one wave.
    """
    back_off = BACK_OFF[error]
    # The exponent is bounded: a job may be tried more often than a float can double.
    longest = min(first_s * back_off.factor * 2.0 ** min(tries - 1, 32), back_off.limit_s)
    return jitter(0.0, longest)


def class_of(error: OSError) -> ErrorClass:
    """Return the class of an error of the operating system."""
    return ErrorClass.SCARCITY if error.errno in _FULL else ErrorClass.OUTAGE
