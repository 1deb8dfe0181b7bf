import subprocess
import sys
from typing import Any

import pytest

from duquant.config import TextSource
from duquant.errors import ConfigError
from duquant.evaluation.plan import EvaluationPlan, PerplexityConfig, SpeedConfig, TaskConfig


def test_a_plan_survives_its_own_json() -> None:
    plan = EvaluationPlan(
        perplexity=PerplexityConfig(text=TextSource(kind="file", name="a.txt"), seq_len=64, windows=None),
        tasks=(TaskConfig(name="piqa", limit=7), TaskConfig(kind="file", name="mine.yaml", num_fewshot=2)),
        speed=SpeedConfig(decode_batches=(1, 4)),
    )
    assert EvaluationPlan.from_dict(plan.to_dict()) == plan
    assert hash(EvaluationPlan.from_dict(plan.to_dict())) == hash(plan)


def test_what_is_left_out_has_its_default() -> None:
    plan = EvaluationPlan.from_dict({"tasks": [{"name": "piqa"}]})
    assert plan == EvaluationPlan(tasks=(TaskConfig(name="piqa"),))
    assert plan.perplexity == PerplexityConfig()
    assert plan.speed is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"task": []}, "unknown evaluation plan field task;"),
        ({"perplexity": {"window": 3}}, "unknown evaluation plan field perplexity.window;"),
        ({"speed": {"budget": 3}}, "unknown evaluation plan field speed.budget;"),
        ({"tasks": [{}]}, "field tasks.name is missing"),
        ({"tasks": ["piqa"]}, "tasks must be an object"),
        ({"tasks": [{"name": "piqa"}, {"name": "piqa"}]}, "names 'piqa' twice"),
        ({"tasks": [{"name": "mine.yaml"}]}, "its task.kind is 'file'"),
        ({"tasks": [{"name": "../secrets"}]}, "its task.kind is 'file'"),
        ({"tasks": [{"kind": "file", "name": "mine.py"}]}, "a task file ends in one of"),
        ({"tasks": [{"name": "piqa", "limit": 0}]}, "task.limit is 0"),
        ({"tasks": [{"name": "piqa", "num_fewshot": -1}]}, "task.num_fewshot is -1"),
        ({"perplexity": {"seq_len": 2}}, "perplexity.seq_len is 2"),
        ({"perplexity": {"text": {"kind": "random", "name": ""}}}, "a random source has no text"),
        ({"speed": {"decode_batches": [1, 1]}}, "at most 8 different numbers"),
        ({"speed": {"decode_batches": [0]}}, "speed.decode_batches is 0"),
        ({"speed": {"seconds": float("nan")}}, "speed.seconds is nan"),
        ({"perplexity": None}, "the plan measures nothing"),
        ([], "evaluation plan must be an object"),
    ],
)
def test_a_bad_plan_is_refused_with_its_field(values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EvaluationPlan.from_dict(values)


@pytest.mark.parametrize(("name", "kind"), [("piqa", "hub"), ("a/b.yaml", "file"), ("piqa-valid.jsonl", "file")])
def test_a_name_on_the_command_line_is_a_file_when_it_ends_like_one(name: str, kind: str) -> None:
    assert TaskConfig.named(name, limit=3) == TaskConfig(kind=kind, name=name, limit=3)  # type: ignore[arg-type]


def test_plans_cost_no_torch() -> None:
    code = "import sys, duquant.evaluation.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
