"""What a run consists of: steps, and what earlier tries left of their work."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

StepKind = Literal[
    "tokenize", "rotate", "embed", "sweep", "observe", "propagate", "draft", "distill", "quantize", "extra"
]
"""tokenize: cut the text into windows. rotate: make the rotations of the residual stream. embed: make the inputs of
layer 0. sweep: run an unquantized layer over unquantized inputs; records statistics where a chain starts. observe:
run an unquantized layer over what quantized ones gave, for its statistics. propagate: run a quantized layer, for the
inputs of the next. draft: quantize a layer for the next pass, or to be learned on. distill: let all drafts learn
together. quantize: make a layer's shard. extra: make the shard of embeddings, final norm and head."""


class StepId(NamedTuple):
    """Identity of a step: a kind with the layer and the shard it is about (-1 where it has none), and its pass."""

    kind: StepKind
    layer: int = -1
    shard: int = -1
    pass_index: int = 0


@dataclass(frozen=True)
class Step:
    """One unit of work."""

    id: StepId
    needs: tuple[StepId, ...] = ()


@dataclass(frozen=True)
class Found:
    """What an earlier try of one pass left in the work directory, as (layer, shard) pairs."""

    boundaries: frozenset[tuple[int, int]] = frozenset()
    """Inputs of layers in the unquantized model."""
    chains: frozenset[tuple[int, int]] = frozenset()
    """Inputs of layers behind quantized ones."""
    statistics: frozenset[tuple[int, int]] = frozenset()
    packed: frozenset[int] = frozenset()
    """Quantized layers that are kept to be run: of passes before the last, these are the drafts."""
