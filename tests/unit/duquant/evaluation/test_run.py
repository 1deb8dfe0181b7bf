"""A plan's parts, in their order; what is measured is kept when a later part fails."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from duquant.config import TextSource
from duquant.errors import EvaluationError
from duquant.evaluation.perplexity import evaluate
from duquant.evaluation.plan import EvaluationPlan, PerplexityConfig, SpeedConfig, TaskConfig
from duquant.evaluation.run import evaluate_plan

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture
def perplexity(text_file: Path) -> PerplexityConfig:
    return PerplexityConfig(text=TextSource(kind="file", name=str(text_file)), seq_len=32, windows=2)


@pytest.fixture
def jars(tmp_path: Path) -> TaskConfig:
    path = tmp_path / "jars.jsonl"
    path.write_text('{"goal": "Open a jar", "sol1": "turn the lid", "sol2": "eat it", "label": 0}\n' * 3)
    return TaskConfig(kind="file", name=str(path))


def test_all_parts_in_one_set_of_metrics(
    tiny_artifact: Callable[..., Any], perplexity: PerplexityConfig, jars: TaskConfig
) -> None:
    artifact = str(tiny_artifact().artifact)
    plan = EvaluationPlan(
        perplexity=perplexity,
        tasks=(jars,),
        speed=SpeedConfig(prefill_tokens=8, decode_batches=(1,), context=4, seconds=1.0),
    )
    parts: list[tuple[str, set[str]]] = []
    phases: list[str] = []
    metrics = evaluate_plan(
        artifact,
        plan,
        device="cpu",
        on_part=lambda part, so_far: parts.append((part, set(so_far))),
        on_progress=lambda phase, _done, _total: phases.append(phase),
    )
    alone = evaluate(artifact, perplexity.text, seq_len=32, windows=2, device="cpu")
    assert metrics["perplexity"] == alone.perplexity
    assert {name: metrics[name] for name in ("tokens", "windows", "seq_len", "model_bytes", "device")} == {
        "tokens": alone.tokens, "windows": 2, "seq_len": 32, "model_bytes": alone.model_bytes, "device": "cpu"
    }  # fmt: skip
    assert metrics["tasks"]["jars"]["samples"] == 3
    assert metrics["speed"]["artifact"] == "duquant"
    assert [part for part, _ in parts] == ["perplexity", "tasks", "speed"]
    assert "tasks" not in parts[0][1]
    assert {"perplexity", "tasks"} <= parts[1][1]
    assert list(dict.fromkeys(phases)) == ["windows", "task jars.jsonl", "speed"]
    assert json.loads(json.dumps(metrics)) == metrics


def test_what_was_measured_is_kept_when_a_task_fails(
    tiny_artifact: Callable[..., Any], perplexity: PerplexityConfig, jars: TaskConfig
) -> None:
    plan = EvaluationPlan(perplexity=perplexity, tasks=(jars, TaskConfig(kind="file", name="/absent/task.yaml")))
    kept: dict[str, Any] = {}
    with pytest.raises(EvaluationError, match=r"task file /absent/task\.yaml: there is no such file"):
        evaluate_plan(
            str(tiny_artifact().artifact), plan, device="cpu", on_part=lambda _part, so_far: kept.update(so_far)
        )
    assert kept["perplexity"] > 1
    assert kept["tasks"]["jars"]["samples"] == 3


def test_task_files_stay_in_the_folders_that_are_open(
    tiny_artifact: Callable[..., Any], jars: TaskConfig, tmp_path: Path
) -> None:
    plan = EvaluationPlan(perplexity=None, tasks=(jars,))
    with pytest.raises(EvaluationError, match="in the folders that are open to evaluations"):
        evaluate_plan(str(tiny_artifact().artifact), plan, device="cpu", task_roots=[tmp_path / "other"])


def test_an_unquantized_model_has_the_same_metrics(tiny_model: Callable[..., Path], jars: TaskConfig) -> None:
    metrics = evaluate_plan(str(tiny_model()), EvaluationPlan(perplexity=None, tasks=(jars,)), device="cpu")
    assert set(metrics["tasks"]["jars"]) >= {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "samples"}
    assert metrics["seconds"] == metrics["tasks"]["jars"]["seconds"]
