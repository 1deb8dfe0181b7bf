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


@dataclass(frozen=True)
class Found:
    """What an earlier try left in the work directory, as (layer, shard) pairs."""

    boundaries: frozenset[tuple[int, int]] = frozenset()
    statistics: frozenset[tuple[int, int]] = frozenset()


def plan(
    *, layers: int, shards: int, finished_layers: frozenset[int] = frozenset(), found: Found | None = None
) -> list[Step]:
    """Return the steps of a run, in an order that is good when they run one after the other.

    `finished_layers` are not quantized again; layer -1 stands for the extra shard (embeddings, final norm, head). The
    sweep of a shard covers only the layers whose statistics are missing, from the last boundary that lies before them.

    >>> [step.id.kind for step in plan(layers=1, shards=1)]
    ['tokenize', 'extra', 'embed', 'sweep', 'quantize']
    """
    found = found or Found()
    missing = [layer for layer in range(layers) if layer not in finished_layers]
    sweeps: dict[int, list[Step]] = {}
    embeds: list[Step] = []
    for shard in range(shards):
        unknown = [layer for layer in missing if (layer, shard) not in found.statistics]
        if not unknown:
            continue
        start = max((b for b, s in found.boundaries if s == shard and b <= unknown[0]), default=None)
        before: tuple[StepId, ...] = ()
        if start is None:
            embeds.append(Step(StepId("embed", shard=shard), (StepId("tokenize"),)))
            before = (embeds[-1].id,)
        for layer in range(start or 0, unknown[-1] + 1):
            step = Step(StepId("sweep", layer, shard), before)
            sweeps.setdefault(layer, []).append(step)
            before = (step.id,)
    steps = [Step(StepId("tokenize"))] if embeds else []
    if -1 not in finished_layers:
        steps.append(Step(StepId("extra")))
    steps += embeds
    for layer in range(layers):
        of_layer = sweeps.get(layer, [])
        steps += of_layer
        if layer in missing:
            steps.append(Step(StepId("quantize", layer), tuple(step.id for step in of_layer)))
    return steps
