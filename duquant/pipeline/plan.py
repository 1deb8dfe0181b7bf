"""The steps of a run and what each waits for. Executors may run them in any order that respects `needs`."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

StepKind = Literal["tokenize", "embed", "sweep", "quantize", "extra"]


class StepId(NamedTuple):
    """Identity of a step: a kind with the layer and the shard it is about (-1 where it has none)."""

    kind: StepKind
    layer: int = -1
    shard: int = -1


@dataclass(frozen=True)
class Step:
    """One unit of work."""

    id: StepId
    needs: tuple[StepId, ...] = ()


def plan(*, layers: int, shards: int, finished_layers: frozenset[int] = frozenset()) -> list[Step]:
    """Return the steps of a run, in an order that is good when they run one after the other.

    `finished_layers` are not quantized again; the sweep runs only as far as the last unfinished layer. Layer -1 stands
    for the extra shard (embeddings, final norm, head).

    >>> [step.id.kind for step in plan(layers=1, shards=1)]
    ['tokenize', 'extra', 'embed', 'sweep', 'quantize']
    """
    missing = [layer for layer in range(layers) if layer not in finished_layers]
    steps = [] if -1 in finished_layers else [Step(StepId("extra"))]
    if not missing:
        return steps
    steps.insert(0, Step(StepId("tokenize")))
    steps += [Step(StepId("embed", shard=shard), (StepId("tokenize"),)) for shard in range(shards)]
    for layer in range(missing[-1] + 1):
        for shard in range(shards):
            before = StepId("embed", shard=shard) if layer == 0 else StepId("sweep", layer - 1, shard)
            steps.append(Step(StepId("sweep", layer, shard), (before,)))
        if layer not in finished_layers:
            steps.append(
                Step(StepId("quantize", layer), tuple(StepId("sweep", layer, shard) for shard in range(shards)))
            )
    return steps
