"""What all launches share: whether kernels are interpreted, and small scratch memory that outlives a call."""

from functools import cache

import torch
import triton
from torch import Tensor

COUNTERS = 1 << 14
"""Tiles that may count arrivals in one launch."""


def is_interpreted() -> bool:
    """Tell whether kernels run in Triton's interpreter, on the CPU: it knows neither assembly nor bfloat16 products."""
    return bool(triton.knobs.runtime.interpret)


class _Assumed:
    capability = (9, 0)


def assume_capability(capability: tuple[int, int]) -> None:
    """Choose tiles for this GPU where there is none: in the interpreter, and when kernels are only compiled."""
    _Assumed.capability = capability


def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a device; of a CPU, what was assumed last, Hopper's at first."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else _Assumed.capability


def arrival_counters(device: torch.device) -> Tensor:
    """Return int32 zeros that kernels leave as zeros: one set for each stream, as launches of one stream take turns."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _counters(device, stream)


@cache
def _counters(device: torch.device, stream: int) -> Tensor:
    del stream
    return torch.zeros(COUNTERS, dtype=torch.int32, device=device)
