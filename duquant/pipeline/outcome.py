"""What a step that makes a shard tells of it."""

from collections.abc import Mapping, Sequence
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
    metrics: dict[str, dict[str, float | None]]
    """By site, and by what was learned; None is what could not be measured."""
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {**asdict(self), "shard": self.shard.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ShardOutcome":
        """Undo `to_dict`."""
        return cls(**{**values, "shard": ShardInfo.from_dict(values["shard"])})


def summary_of(outcomes: Sequence[ShardOutcome]) -> dict[str, Any]:
    """Return the sizes of the artifact that these shards are."""
    size = sum(outcome.shard.size_bytes for outcome in outcomes)
    source_bytes = sum(outcome.source_bytes for outcome in outcomes)
    weights = sum(outcome.quantized_weights for outcome in outcomes)
    packed_bytes = sum(outcome.shard.tensor_bytes for outcome in outcomes if outcome.layer >= 0)
    return {
        "size_bytes": size,
        "source_bytes": source_bytes,
        "size_ratio": round(size / source_bytes, 4),
        "quantized_weights": weights,
        "bits_per_weight": round(8 * packed_bytes / weights, 4) if weights else 16.0,
    }


def report_of(outcomes: Sequence[ShardOutcome]) -> dict[str, Any]:
    """Return how the layers fared; what the extra shard tells is of the whole model."""
    report: dict[str, Any] = {
        "layers": {str(outcome.layer): outcome.metrics for outcome in outcomes if outcome.layer >= 0}
    }
    for outcome in outcomes:
        if outcome.layer < 0:
            report.update(outcome.metrics)
    return report
