"""The steps of a run and what each waits for. Executors may run them in any order that respects `needs`.

A pass quantizes layers on one set of inputs. Recipe.input_mode says which the first pass takes; each of
Recipe.refine_passes takes what the quantized network of the pass before gives. What passes before the last make are
drafts: layers that stay in the work directory, for the next pass to run.
"""

from collections.abc import Sequence

from duquant.pipeline.passes import Pass
from duquant.pipeline.steps import Found, Step, StepId


def plan(
    *,
    layers: int,
    shards: int,
    passes: Sequence[Sequence[range]] | None = None,
    finished_layers: frozenset[int] = frozenset(),
    found: Sequence[Found] = (),
) -> list[Step]:
    """Return the steps of a run, in an order that is good when they run one after the other.

    Args:
        layers: of the model.
        shards: groups of calibration windows.
        passes: the chains of each, see Recipe.stages; None is one pass that takes each layer by itself.
        finished_layers: they are not quantized again; -1 is the extra shard (embeddings, final norm, head).
        found: what an earlier try left, by pass.

    >>> [step.id.kind for step in plan(layers=1, shards=1)]
    ['tokenize', 'extra', 'embed', 'sweep', 'quantize']
    >>> [step.id.kind for step in plan(layers=2, shards=1, passes=[[range(2)]])][3:]
    ['sweep', 'quantize', 'propagate', 'observe', 'quantize']
    """
    passes = passes or [[range(layer, layer + 1) for layer in range(layers)]]
    left = [found[index] if index < len(found) else Found() for index in range(len(passes))]
    parts: list[Pass] = []
    wanted, ready = frozenset(range(layers)) - finished_layers, finished_layers
    # From the last to the first: what a pass runs its text through is what the one before has to make.
    for index in reversed(range(len(passes))):
        part = Pass(index, passes[index], shards, left[index], wanted, ready, is_last=index == len(passes) - 1)
        parts.insert(0, part)
        ready = left[index - 1].packed
        wanted = part.run_over - ready
    steps: list[Step] = []
    for part in parts:
        steps += part.steps({step.id for step in steps})
    first = [] if -1 in finished_layers else [Step(StepId("extra"))]
    if any(step.id.kind == "embed" for step in steps):
        first.insert(0, Step(StepId("tokenize")))
    return first + steps
