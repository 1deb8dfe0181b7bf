"""The steps of one pass: which layers see unquantized inputs, which see those of quantized layers, and who waits."""

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

from duquant.pipeline.steps import Found, Step, StepId, StepKind


@dataclass(frozen=True)
class _Way:
    """The way of one shard through one stage, as far as statistics are missing."""

    first: int
    """The layer that it starts at: its inputs are there, or it is the stage's first."""
    last: int
    unknown: frozenset[int]
    """Layers whose statistics are missing; `last` is one of them."""

    @property
    def run_over(self) -> range:
        """The layers that are run in their quantized form."""
        return range(self.first, self.last)


class Pass:
    """One pass over the layers, cut into stages.

    The first layer of a stage sees unquantized inputs, which sweeps bring there. Each other layer sees what the
    quantized layers of its stage before it give. In the first pass these are the ones that it makes itself, and layers
    wait for each other; in later passes they are drafts of the pass before, and only forward passes wait.

    Args:
        index: which pass.
        stages: runs of layers.
        shards: groups of windows.
        found: what an earlier try left.
        wanted: layers to quantize.
        ready: layers whose quantized form is there.
        is_last: whether it makes the artifact's layers, and not drafts.
    """

    def __init__(
        self,
        index: int,
        stages: Sequence[range],
        shards: int,
        found: Found,
        wanted: frozenset[int],
        ready: frozenset[int],
        *,
        is_last: bool,
    ) -> None:
        self._index, self._stages, self._shards = index, stages, shards
        self._statistics = found.statistics
        self._boundaries, self._chains = _by_shard(found.boundaries), _by_shard(found.chains)
        self._wanted = wanted
        self._quantizes: StepKind = "quantize" if is_last else "draft"
        # Text cannot be run through a layer that is neither there nor made.
        while index == 0 and (missing := self.run_over - ready - self._wanted):
            self._wanted |= missing
        self._needs: dict[StepId, tuple[StepId, ...]] = {}

    @property
    def run_over(self) -> frozenset[int]:
        """The layers that are run in their quantized form."""
        ways = (self._way(stage, shard) for stage in self._stages for shard in range(self._shards))
        return frozenset(chain.from_iterable(way.run_over for way in ways if way))

    def steps(self, planned: Container[StepId]) -> list[Step]:
        """Return the steps. Chains go on side by side: all first layers come first, then all second ones.

        Args:
            planned: steps of the passes before.
        """
        self._needs = {}
        for shard in range(self._shards):
            for stage in self._stages:
                self._reach(stage, shard)
        for shard in range(self._shards):
            for stage in self._stages:
                self._follow(stage, shard, planned)
        for stage in self._stages:
            for layer in (layer for layer in stage if layer in self._wanted):
                records: StepKind = "sweep" if layer == stage.start else "observe"
                recorded = (self._id(records, layer, shard) for shard in range(self._shards))
                self._add(self._id(self._quantizes, layer), recorded)
        return [Step(step, self._needs[step]) for step in sorted(self._needs, key=self._place)]

    def _way(self, stage: range, shard: int) -> _Way | None:
        """Return a shard's way through a stage; None when all statistics that are wanted are there."""
        unknown = [layer for layer in stage if layer in self._wanted and (layer, shard) not in self._statistics]
        if not unknown:
            return None
        there = (layer for layer in self._chains.get(shard, ()) if stage.start < layer <= unknown[0])
        return _Way(max(there, default=stage.start), unknown[-1], frozenset(unknown))

    def _reach(self, stage: range, shard: int) -> None:
        """Add the sweeps that bring unquantized inputs to a stage's first layer, from the last ones that are there."""
        way = self._way(stage, shard)
        start = stage.start
        if way is None or way.first != start:
            return
        origin = max((layer for layer in self._boundaries.get(shard, ()) if layer <= start), default=-1)
        if origin < 0:
            self._needs[self._id("embed", shard=shard)] = (StepId("tokenize"),)
        for layer in range(max(origin, 0), start + (start in way.unknown)):
            self._add(self._id("sweep", layer, shard), self._writers(layer, shard))

    def _follow(self, stage: range, shard: int, planned: Container[StepId]) -> None:
        """Add a shard's steps in a stage behind its first layer."""
        way = self._way(stage, shard)
        if way is None:
            return
        for layer in range(way.first, way.last + 1):
            is_first = layer == stage.start
            written = self._writers(layer, shard) if is_first else (self._id("propagate", layer - 1, shard),)
            if layer in way.unknown and not is_first:
                self._add(self._id("observe", layer, shard), written)
            if layer < way.last:
                step = self._id("propagate", layer, shard)
                # It deletes the layer's inputs, so it waits for whoever else reads them.
                self._add(step, (*written, self._id("sweep" if is_first else "observe", layer, shard)))
                quantized = self._quantized(layer)
                if quantized in planned or (not self._index and layer in self._wanted):
                    self._needs[step] += (quantized,)

    def _quantized(self, layer: int) -> StepId:
        """Return the step that makes the quantized layer that text is run through."""
        if self._index:
            return StepId("draft", layer, pass_index=self._index - 1)
        return self._id(self._quantizes, layer)

    def _writers(self, layer: int, shard: int) -> tuple[StepId, ...]:
        """Return the steps that write a layer's unquantized inputs."""
        return (self._id("sweep", layer - 1, shard) if layer else self._id("embed", shard=shard),)

    def _id(self, kind: StepKind, layer: int = -1, shard: int = -1) -> StepId:
        return StepId(kind, layer, shard, self._index)

    def _add(self, step: StepId, needs: Iterable[StepId]) -> None:
        """Add a step that waits for those of these steps that there are."""
        self._needs[step] = tuple(need for need in needs if need in self._needs)

    def _place(self, step: StepId) -> tuple[int, int, int, int]:
        """Return a step's place in the order: how deep in its stage, at which layer, what, for which shard."""
        # A propagation belongs to the layer whose inputs it writes; sweeps come early, since they let stages begin.
        layer = step.layer + (step.kind == "propagate")
        depth = next((layer - stage.start for stage in self._stages if step.layer in stage), 0)
        kinds = ("embed", "sweep", "propagate", "observe", "draft", "quantize")
        return (0 if step.kind == "sweep" else depth, layer, kinds.index(step.kind), step.shard)


def _by_shard(pairs: Iterable[tuple[int, int]]) -> dict[int, list[int]]:
    """Return the layers of (layer, shard) pairs by shard."""
    found: dict[int, list[int]] = {}
    for layer, shard in pairs:
        found.setdefault(shard, []).append(layer)
    return found
