"""Laws of plans whose layers are calibrated on what quantized layers give."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duquant.config import Recipe
from duquant.pipeline import Found, Step, StepId, plan

MODES = ("fp", "staged:3", "staged:2", "quantized")


@dataclass
class Disk:
    """What the steps of a run read, write and delete, and nothing else: the files of ModelRun without their bytes."""

    recipe: Recipe
    layers: int
    shards: int
    files: set[tuple[object, ...]] = field(default_factory=set)
    finished: set[int] = field(default_factory=set)

    def do(self, step: StepId) -> None:
        """Do a step; fail when a file that it reads is not there."""
        kind, layer, shard, index = step
        stages = self.recipe.stages(self.layers, index)
        stage = next((s for s in stages if layer in s), range(0))
        given = ("boundary" if layer == stage.start else "chain", index, layer, shard)
        match kind:
            case "tokenize":
                self.files.add(("tokens",))
            case "embed":
                self.read(("tokens",))
                self.files.add(("boundary", index, 0, shard))
            case "sweep":
                given = ("boundary", *given[1:])
                is_start = layer == stage.start
                self.record(given, behind=is_start and layer + 1 in stage, is_recorded=is_start)
                if layer < stages[-1].start:
                    self.files.add(("boundary", index, layer + 1, shard))
            case "observe":
                self.record(given, behind=layer + 1 in stage, is_recorded=True)
            case "propagate":
                self.read(given)
                packed = ("packed", max(index - 1, 0), layer)
                # In the service a finished layer comes back from where it is stored.
                assert packed in self.files or (not self.recipe.refine_passes and layer in self.finished), step
                self.files.add(("chain", index, layer + 1, shard))
                self.files.discard(given)
            case "draft" | "quantize":
                self.quantize(step)

    def record(self, given: tuple[object, ...], *, behind: bool, is_recorded: bool) -> None:
        """Run an unquantized layer; its inputs are kept while a propagation behind it reads them, too."""
        self.read(given)
        if is_recorded:
            self.files.add(("statistics", *given[1:]))
        if not behind:
            self.files.discard(given)

    def quantize(self, step: StepId) -> None:
        """Quantize a layer, and forget what it was quantized from."""
        for shard in range(self.shards):
            self.read(("statistics", step.pass_index, step.layer, shard))
            self.files.discard(("statistics", step.pass_index, step.layer, shard))
        if step.kind == "draft" or not self.recipe.refine_passes:
            self.files.add(("packed", step.pass_index, step.layer))
        if step.kind == "quantize":
            assert step.layer not in self.finished, step
            self.finished.add(step.layer)
        if not self.recipe.refine_passes:
            stage = next(s for s in self.recipe.stages(self.layers) if step.layer in s)
            self.files -= {("packed", 0, layer) for layer in range(stage.start, step.layer)}

    def read(self, file: tuple[object, ...]) -> None:
        assert file in self.files, file

    def plan(self) -> list[Step]:
        """Plan what is left."""
        found = [
            Found(
                boundaries=self.pairs("boundary", index),
                chains=self.pairs("chain", index),
                statistics=self.pairs("statistics", index),
                packed=frozenset(f[2] for f in self.files if f[:2] == ("packed", index)),  # type: ignore[misc]
            )
            for index in range(self.recipe.refine_passes + 1)
        ]
        return plan(
            layers=self.layers,
            shards=self.shards,
            passes=[self.recipe.stages(self.layers, index) for index in range(self.recipe.refine_passes + 1)],
            finished_layers=frozenset(self.finished),
            found=found,
        )

    def pairs(self, kind: str, index: int) -> frozenset[tuple[int, int]]:
        return frozenset((f[2], f[3]) for f in self.files if f[:2] == (kind, index))  # type: ignore[misc]


@given(
    mode=st.sampled_from(MODES),
    passes=st.integers(0, 2),
    layers=st.integers(1, 6),
    shards=st.integers(1, 3),
    kills=st.lists(st.integers(0, 40), max_size=4),
    lost=st.lists(st.floats(0, 1), max_size=4),
    order=st.randoms(use_true_random=False),
)
def test_any_order_with_kills_and_lost_files_finishes_and_reads_only_what_is_there(
    mode, passes, layers, shards, kills, lost, order
):
    recipe = Recipe(input_mode=mode, refine_passes=0 if mode == "quantized" else passes)
    disk = Disk(recipe, layers, shards, finished={-1})
    for kill in [*kills, 10**6]:
        waiting = disk.plan()
        done: set[StepId] = set()
        planned = {step.id for step in waiting}
        assert len(planned) == len(waiting)
        while waiting and len(done) < kill:
            ready = [step for step in waiting if done.issuperset(step.needs)]
            assert ready, "steps wait for each other, or for one that is not planned"
            step = order.choice(ready)
            waiting.remove(step)
            disk.do(step.id)
            done.add(step.id)
        for share in lost[:1]:
            # Scratch files may be lost, from one to all of them.
            files = sorted(disk.files, key=str)
            disk.files -= set(order.sample(files, round(share * len(files))))
            lost = lost[1:]
    assert disk.finished == {-1, *range(layers)}
    assert disk.plan() == []


def kinds(steps: Iterable[Step]) -> list[str]:
    return ["-".join(str(part) for part in step.id[:2]) for step in steps]


def test_as_many_stages_as_layers_are_the_plan_of_independent_layers() -> None:
    for mode in ("fp", "staged:4", "staged:9"):
        stages = Recipe(input_mode=mode).stages(4)
        assert plan(layers=4, shards=2, passes=[stages]) == plan(layers=4, shards=2)


def test_a_chain_is_one_layer_after_the_other() -> None:
    steps = plan(layers=3, shards=1, passes=[[range(3)]], finished_layers=frozenset({-1}))
    expected = (
        "tokenize--1 embed--1 sweep-0 quantize-0 propagate-0 observe-1 quantize-1 propagate-1 observe-2 quantize-2"
    )
    assert kinds(steps) == expected.split()
    needs = {step.id: step.needs for step in steps}
    assert needs[StepId("propagate", 1, 0)] == (
        StepId("propagate", 0, 0),
        StepId("observe", 1, 0),
        StepId("quantize", 1),
    )
    assert needs[StepId("quantize", 1)] == (StepId("observe", 1, 0),)


def test_stages_start_from_unquantized_inputs_and_go_on_side_by_side() -> None:
    steps = plan(layers=4, shards=1, passes=[[range(2), range(2, 4)]], finished_layers=frozenset({-1}))
    expected = (
        "tokenize--1 embed--1 sweep-0 quantize-0 sweep-1 sweep-2 quantize-2 "
        "propagate-0 observe-1 quantize-1 propagate-2 observe-3 quantize-3"
    )
    assert kinds(steps) == expected.split()
    needs = {step.id: step.needs for step in steps}
    assert needs[StepId("propagate", 2, 0)] == (StepId("sweep", 1, 0), StepId("sweep", 2, 0), StepId("quantize", 2))


def test_layers_of_a_refinement_pass_do_not_wait_for_each_other() -> None:
    passes = [Recipe(refine_passes=1).stages(3, index) for index in (0, 1)]
    steps = plan(layers=3, shards=1, passes=passes, finished_layers=frozenset({-1}))
    needs = {step.id: step.needs for step in steps}
    for layer in (1, 2):
        assert needs[StepId("quantize", layer, pass_index=1)] == (StepId("observe", layer, 0, 1),)
        observed = {StepId("propagate", layer - 1, 0, 1)}
        assert set(needs[StepId("observe", layer, 0, 1)]) == observed
        assert StepId("draft", layer - 1) in needs[StepId("propagate", layer - 1, 0, 1)]
    # Nothing runs the last layer, so it needs no draft.
    assert [step.layer for step in needs if step.kind == "draft"] == [0, 1]


def test_a_resumed_chain_goes_on_from_the_last_inputs_behind_quantized_layers() -> None:
    found = Found(boundaries=frozenset({(0, 1)}), chains=frozenset({(2, 0), (3, 0)}), statistics=frozenset({(3, 1)}))
    finished = frozenset({-1, 0, 1, 2})
    steps = plan(layers=5, shards=2, passes=[[range(5)]], finished_layers=finished, found=[found])
    of_shards = [[s.id[:2] for s in steps if s.id.shard == shard] for shard in (0, 1)]
    assert of_shards[0] == [("observe", 3), ("propagate", 3), ("observe", 4)]
    # Its statistics of layer 3 are there, but what layer 4 sees has to be made from the start again.
    assert of_shards[1] == [*(("propagate", layer) for layer in range(4)), ("observe", 4)]
    assert [s.id.layer for s in steps if s.id.kind == "quantize"] == [3, 4]


@pytest.mark.parametrize("mode", MODES)
def test_only_the_last_chains_of_a_lost_work_directory_are_run_again(mode: str) -> None:
    recipe = Recipe(input_mode=mode)
    finished = frozenset({-1, 0, 1, 2, 3})
    steps = plan(layers=6, shards=1, passes=[recipe.stages(6)], finished_layers=finished)
    propagated = [step.id.layer for step in steps if step.id.kind == "propagate"]
    expected = {"fp": [], "staged:3": [4], "staged:2": [3, 4], "quantized": [0, 1, 2, 3, 4]}
    assert propagated == expected[mode]
