"""What a step that makes a shard tells of it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from duquant.artifact.shards import ShardInfo


@dataclass(frozen=True)
class ShardOutcome:
    """A finished shard, in types that travel as JSON."""

    layer: int
    """-1 for the extra shard."""
    shard: ShardInfo
    source_sha256: str
    """Of the tensors that went in."""
    source_bytes: int
    quantized_weights: int
    metrics: dict[str, dict[str, float]]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {**asdict(self), "shard": self.shard.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ShardOutcome":
        """Undo `to_dict`."""
        return cls(**{**values, "shard": ShardInfo.from_dict(values["shard"])})
