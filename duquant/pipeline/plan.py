"""The steps of a run and what each waits for. Executors may run them in any order that respects `needs`.

A pass quantizes layers on one set of inputs. Recipe.input_mode says which the first pass takes; each of
Recipe.refine_passes takes what the quantized network of the pass before gives. What passes before the last make are
drafts: layers that stay in the work directory, for the next pass to run. Where the network is distilled afterwards, so
are those of the last pass.
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
    distills: bool = False,
    is_distilled: bool = False,
) -> list[Step]:
    """Return the steps of a run, in an order that is good when they run one after the other.

    Args:
        layers: of the model.
        shards: groups of calibration windows.
        passes: the chains of each, see Recipe.stages; None is one pass that takes each layer by itself.
        finished_layers: they are not quantized again; -1 is the extra shard (embeddings, final norm, head).
        found: what an earlier try left, by pass.
        distills: all layers learn together before their shards are made.
        is_distilled: an earlier try has done so.

    >>> [step.id.kind for step in plan(layers=1, shards=1)]
    ['tokenize', 'extra', 'embed', 'sweep', 'quantize']
    >>> [step.id.kind for step in plan(layers=2, shards=1, passes=[[range(2)]])][3:]
    ['sweep', 'quantize', 'propagate', 'observe', 'quantize']
    >>> [step.id.kind for step in plan(layers=1, shards=1, distills=True)]
    ['tokenize', 'embed', 'sweep', 'draft', 'distill', 'extra', 'quantize']
    """
    passes = passes or [[range(layer, layer + 1) for layer in range(layers)]]
    left = [found[index] if index < len(found) else Found() for index in range(len(passes))]
    wanted, ready = frozenset(range(layers)) - finished_layers, finished_layers
    if distills:
        # The extra shard tells how distillation went.
        made = [StepId("quantize" if layer >= 0 else "extra", layer) for layer in range(-1, layers)]
        shards_left = [step for step in made if step.layer not in finished_layers]
        if is_distilled or not shards_left:
            return [Step(step) for step in shards_left]
        drafts = left[-1].packed
        steps = _pass_steps(passes, shards, left, frozenset(range(layers)) - drafts, drafts, makes_shards=False)
        return _with_distillation(steps, shards_left)
    steps = _pass_steps(passes, shards, left, wanted, ready, makes_shards=True)
    first = [] if -1 in finished_layers else [Step(StepId("extra"))]
    if any(step.id.kind == "embed" for step in steps):
        first.insert(0, Step(StepId("tokenize")))
    return first + steps


def _pass_steps(
    passes: Sequence[Sequence[range]],
    shards: int,
    left: Sequence[Found],
    wanted: frozenset[int],
    ready: frozenset[int],
    *,
    makes_shards: bool,
) -> list[Step]:
    """Return the steps of all passes.

    Args:
        passes: the chains of each.
        shards: groups of calibration windows.
        left: what an earlier try left, by pass.
        wanted: layers that the last pass is to quantize.
        ready: layers whose quantized form is there for the last pass.
        makes_shards: whether the last pass makes the artifact's layers, and not drafts.
    """
    parts: list[Pass] = []
    # From the last to the first: what a pass runs its text through is what the one before has to make.
    for index in reversed(range(len(passes))):
        is_last = makes_shards and index == len(passes) - 1
        part = Pass(index, passes[index], shards, left[index], wanted, ready, is_last=is_last)
        parts.insert(0, part)
        ready = left[index - 1].packed
        wanted = part.run_over - ready
    steps: list[Step] = []
    for part in parts:
        steps += part.steps({step.id for step in steps})
    return steps


def _with_distillation(drafting: Sequence[Step], shards: Sequence[StepId]) -> list[Step]:
    """Return the steps that make drafts, then what distills them, then those that make shards of the result."""
    tokenize, distill = StepId("tokenize"), StepId("distill")
    drafts = (step.id for step in drafting if step.id.kind == "draft")
    return [Step(tokenize), *drafting, Step(distill, (tokenize, *drafts)), *(Step(id_, (distill,)) for id_ in shards)]
