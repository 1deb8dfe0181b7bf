"""Quality gates: limits compared with what was measured."""

from typing import Any

import pytest

from duquant.config import QualityGate
from workers.gate import check

METRICS: dict[str, Any] = {
    "perplexity": 15.0,
    "tasks": {"quiz": {"acc": 0.5, "acc_norm": 0.9}, "math": {"exact_match": 0.25}, "prose": {"bleu": 40.0}},
}
PARTS = {"task quiz.jsonl": {"state": "done", "names": ["quiz"]}, "task math": {"state": "done", "names": ["math"]}}


@pytest.mark.parametrize(("limit", "passed"), [(0.5, True), (0.49, False), (0.0, False)])
def test_the_increase_of_perplexity_is_the_ratio_minus_one_and_may_be_as_large_as_the_limit(
    limit: float, passed: bool
) -> None:
    (found,) = check(QualityGate(max_perplexity_increase=limit), METRICS, PARTS, {"perplexity": 10.0})
    assert (found.passed, found.value) == (passed, 0.5)
    assert "rose by 50.0%, from 10.0000 to 15.0000" in found.words


def test_an_artifact_better_than_its_model_passes_the_strictest_gate() -> None:
    (found,) = check(QualityGate(max_perplexity_increase=0.0), METRICS, PARTS, {"perplexity": 16.0})
    assert found.passed


@pytest.mark.parametrize(("least", "passed"), [(0.5, True), (0.51, False)])
def test_a_task_of_a_file_is_found_by_the_name_that_the_file_gives_it(least: float, passed: bool) -> None:
    gate = QualityGate(min_accuracy=least, tasks=("quiz.jsonl",))
    (found,) = check(gate, METRICS, PARTS, None)
    assert (found.passed, found.value, found.check) == (passed, 0.5, "acc of quiz.jsonl")


def test_each_task_has_its_own_limit_and_one_without_is_measured_only() -> None:
    gate = QualityGate(min_accuracy={"math": 0.3}, tasks=("quiz.jsonl", "math"))
    (found,) = check(gate, METRICS, PARTS, None)
    assert (found.check, found.passed) == ("exact_match of math", False)
    assert found.words == "exact_match of math is 25.0%; the least is 30.0%"


def test_a_task_without_an_accuracy_cannot_have_enough_of_it() -> None:
    gate = QualityGate(min_accuracy=0.0, tasks=("prose",))
    (found,) = check(gate, METRICS, {"task prose": {"state": "done", "names": ["prose"]}}, None)
    assert (found.passed, found.value, found.words) == (False, None, "prose has no accuracy")
