"""Ways to damage a checkpoint, which a test does to a copy of its own."""

import json
import pickle
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file


def shard_of(model: Path, tensor: str) -> Path:
    """Return the file that the index names for a tensor."""
    weight_map = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    return model / str(weight_map[tensor])


def fill(model: Path, tensor: str, value: float) -> None:
    """Set every number of a tensor to `value`."""
    file = shard_of(model, tensor)
    tensors = load_file(file)
    tensors[tensor].fill_(value)
    save_file(tensors, file, metadata={"format": "pt"})


def truncate(file: Path) -> None:
    """Cut the end off a file."""
    file.write_bytes(file.read_bytes()[:-10])


def only_pickle(model: Path) -> None:
    """Put a pickle in the weights' place, which leaves the file `exploded` in the folder when it is loaded."""
    for file in model.glob("*.safetensors*"):
        file.unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb(model / "exploded")))


class _Bomb:
    """Leaves a file where it was unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)
