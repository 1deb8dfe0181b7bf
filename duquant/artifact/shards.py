"""Shard files: deterministic safetensors, their hashes, and the index over them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from duquant.artifact.layout import INDEX
from duquant.models.tensor_files import save_tensors


@dataclass(frozen=True)
class ShardInfo:
    """What the index and the manifest need to know of a finished shard."""

    name: str
    sha256: str
    size_bytes: int
    tensors: tuple[str, ...]
    tensor_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {**asdict(self), "tensors": list(self.tensors)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ShardInfo":
        """Undo `to_dict`."""
        return cls(**{**values, "tensors": tuple(values["tensors"])})


def sha256_file(path: Path) -> str:
    """Return the sha256, in hex, of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> ShardInfo:
    """Write tensors as one safetensors file; it appears whole or not at all. Equal tensors give equal bytes."""
    # The metadata entry is what transformers insists on to recognise a torch checkpoint.
    save_tensors(path, tensors, metadata={"format": "pt"})
    return ShardInfo(
        name=path.name,
        sha256=sha256_file(path),
        size_bytes=path.stat().st_size,
        tensors=tuple(sorted(tensors)),
        tensor_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
    )


def write_index(directory: Path, shards: Sequence[ShardInfo]) -> None:
    """Write model.safetensors.index.json."""
    weight_map = {tensor: shard.name for shard in shards for tensor in shard.tensors}
    index = {"metadata": {"total_size": sum(shard.tensor_bytes for shard in shards)}, "weight_map": weight_map}
    write_json(directory / INDEX, index)


def write_json(path: Path, value: object) -> None:
    """Write JSON as `json_bytes` has it."""
    path.write_bytes(json_bytes(value))


def json_bytes(value: object) -> bytes:
    """Return JSON with sorted keys and a final newline: equal values are equal bytes."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
