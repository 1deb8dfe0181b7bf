"""Boundary files: the inputs of a layer for some windows, raw bfloat16, (windows, seq_len, hidden)."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from duquant.config import CalibrationConfig
from duquant.errors import ScratchError
from duquant.models.skeleton import COMPUTE_DTYPE


def read_micro_batches(
    path: Path, calibration: CalibrationConfig, hidden: int
) -> Iterator[Float[Tensor, "batch seq hidden"]]:
    """Yield micro-batches by plain reads: a memory map would count the whole file towards the process's memory.

    Raises:
        ScratchError: the file became shorter while it was read.
    """
    window_bytes = calibration.seq_len * hidden * 2
    with path.open("rb", buffering=0) as file:
        left = path.stat().st_size
        while left:
            raw = bytearray(min(left, window_bytes * calibration.micro_batch))
            if (count := file.readinto(raw)) != len(raw):
                raise ScratchError(f"{path} ends {len(raw) - count} bytes too soon; it changed while it was read")
            left -= count
            batch = torch.frombuffer(raw, dtype=COMPUTE_DTYPE).view(-1, calibration.seq_len, hidden)
            del raw
            yield batch
            del batch


class BoundaryWriter:
    """Appends tensors to a scratch file that is renamed to `target` at a clean end."""

    def __init__(self, target: Path) -> None:
        self._target = target
        # A name of its own: a worker that was given up may still be writing its copy.
        self._staged = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")

    def __enter__(self) -> "BoundaryWriter":
        self._file = self._staged.open("wb")
        return self

    def write(self, tensor: Tensor) -> None:
        """Append a tensor."""
        self._file.write(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        if kind is None:
            self._staged.rename(self._target)
        else:
            self._staged.unlink(missing_ok=True)
