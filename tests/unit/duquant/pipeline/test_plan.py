"""Laws of the plan."""

from itertools import combinations

import pytest

from duquant.pipeline import Found, StepId, plan

SHAPES = [(1, 1), (1, 3), (3, 1), (4, 2)]


@pytest.mark.parametrize(("layers", "shards"), SHAPES)
def test_every_need_precedes_its_step(layers: int, shards: int) -> None:
    for count in range(layers + 2):
        for finished in combinations(range(-1, layers), count):
            seen: set[StepId] = set()
            for step in plan(layers=layers, shards=shards, finished_layers=frozenset(finished)):
                assert set(step.needs) <= seen
                assert step.id not in seen
                seen.add(step.id)


@pytest.mark.parametrize(("layers", "shards"), SHAPES)
def test_whole_plan_does_everything_once(layers: int, shards: int) -> None:
    ids = [step.id for step in plan(layers=layers, shards=shards)]
    expected = {StepId("tokenize"), StepId("extra")}
    expected |= {StepId("embed", shard=shard) for shard in range(shards)}
    expected |= {StepId("sweep", layer, shard) for layer in range(layers) for shard in range(shards)}
    expected |= {StepId("quantize", layer) for layer in range(layers)}
    assert set(ids) == expected
    assert len(ids) == len(expected)


def test_quantizing_waits_for_all_shards_of_its_layer() -> None:
    steps = {step.id: step.needs for step in plan(layers=3, shards=4)}
    assert steps[StepId("quantize", 1)] == tuple(StepId("sweep", 1, shard) for shard in range(4))


def test_sweep_waits_for_its_own_shard_alone() -> None:
    steps = {step.id: step.needs for step in plan(layers=3, shards=4)}
    assert steps[StepId("sweep", 2, 3)] == (StepId("sweep", 1, 3),)
    assert steps[StepId("sweep", 0, 3)] == (StepId("embed", shard=3),)


def test_finished_layers_are_skipped() -> None:
    ids = [step.id for step in plan(layers=5, shards=2, finished_layers=frozenset({-1, 0, 2, 4}))]
    assert [step.layer for step in ids if step.kind == "quantize"] == [1, 3]
    assert StepId("extra") not in ids
    assert max(step.layer for step in ids if step.kind == "sweep") == 3


def test_nothing_is_left_of_a_finished_run() -> None:
    assert plan(layers=3, shards=2, finished_layers=frozenset({-1, 0, 1, 2})) == []


def test_only_the_extra_shard_is_left_when_all_layers_are_finished() -> None:
    assert [step.id for step in plan(layers=2, shards=2, finished_layers=frozenset({0, 1}))] == [StepId("extra")]


def test_a_resumed_sweep_starts_at_the_last_boundary_before_the_first_missing_statistics():
    found = Found(
        boundaries=frozenset({(3, 0), (1, 1)}), statistics=frozenset({(1, 0), (2, 0), (0, 1), (3, 1), (4, 1)})
    )
    steps = plan(layers=5, shards=3, finished_layers=frozenset({-1, 0}), found=[found])
    sweeps = [(step.id.layer, step.id.shard) for step in steps if step.id.kind == "sweep"]
    assert [layer for layer, shard in sweeps if shard == 0] == [3, 4]
    assert [layer for layer, shard in sweeps if shard == 1] == [1, 2]
    assert [layer for layer, shard in sweeps if shard == 2] == [0, 1, 2, 3, 4]
    assert [step.id.shard for step in steps if step.id.kind == "embed"] == [2]
    needs = {step.id: step.needs for step in steps}
    assert needs[StepId("sweep", 3, 0)] == ()
    assert needs[StepId("quantize", 3)] == (StepId("sweep", 3, 0), StepId("sweep", 3, 2))


def test_nothing_is_swept_when_all_statistics_are_there():
    found = Found(statistics=frozenset({(0, 0), (1, 0)}))
    kinds = [step.id.kind for step in plan(layers=2, shards=1, found=[found])]
    assert kinds == ["extra", "quantize", "quantize"]


@pytest.mark.parametrize(("layers", "shards"), SHAPES)
def test_distillation_waits_for_all_drafts_and_every_shard_for_it(layers: int, shards: int) -> None:
    ids = [step.id for step in plan(layers=layers, shards=shards, distills=True)]
    assert len(set(ids)) == len(ids)
    assert {step.layer for step in ids if step.kind == "draft"} == set(range(layers))
    needs = {step.id: step.needs for step in plan(layers=layers, shards=shards, distills=True)}
    drafts = tuple(StepId("draft", layer) for layer in range(layers))
    assert needs[StepId("distill")] == (StepId("tokenize"), *drafts)
    for step in (StepId("extra"), *(StepId("quantize", layer) for layer in range(layers))):
        assert needs[step] == (StepId("distill"),)
    seen: set[StepId] = set()
    for step in ids:
        assert set(needs[step]) <= seen
        seen.add(step)


def test_what_is_there_of_a_distillation_is_not_done_again() -> None:
    drafted = [Found(packed=frozenset({0, 2}))]
    ids = [step.id for step in plan(layers=3, shards=1, distills=True, found=drafted)]
    assert [step.layer for step in ids if step.kind == "draft"] == [1]
    finished = frozenset({-1, 1})
    ids = [step.id for step in plan(layers=3, shards=1, distills=True, is_distilled=True, finished_layers=finished)]
    assert ids == [StepId("quantize", 0), StepId("quantize", 2)]
    everything = frozenset({-1, 0, 1, 2})
    assert plan(layers=3, shards=1, distills=True, finished_layers=everything) == []
