"""Accuracy through lm-eval, on a tiny model and a tiny task, without any network."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from duquant.errors import EvaluationError
from duquant.evaluation.accuracy import measure_task
from duquant.evaluation.loading import LoadedModel, load_for_evaluation
from duquant.evaluation.plan import TaskConfig
from duquant.evaluation.scoring import ScoringModel

# The harness and what it needs warn of their own use of each other.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

QUESTIONS = [
    {"goal": "Open a jar", "sol1": "turn the lid", "sol2": "eat the whole of the lid", "label": 0},
    {"goal": "Dry a dish", "sol1": "throw it", "sol2": "wipe it with a towel", "label": 1},
    {"goal": "Light a room", "sol1": "close the shutters", "sol2": "switch on a lamp", "label": 1},
    {"goal": "Cut bread", "sol1": "use a knife", "sol2": "use a spoon", "label": 0},
    {"goal": "Sweep", "sol1": "a broom", "sol2": "a piano", "label": 0},
]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")


@pytest.fixture(scope="module")
def artifact(tiny_artifact: Callable[..., Any]) -> LoadedModel:
    return load_for_evaluation(str(tiny_artifact().artifact), device="cpu")


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "jars.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in QUESTIONS))
    return path


@torch.no_grad()
def likelihood(loaded: LoadedModel, context: str, answer: str) -> float:
    """By hand, one token after the other. The tokenizer has one token a byte."""
    first, whole = (
        loaded.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (context, context + answer)
    )
    logits = loaded.model(torch.tensor([whole]), use_cache=True).logits[0].float().log_softmax(-1)
    return sum(float(logits[position - 1, whole[position]]) for position in range(len(first), len(whole)))


def test_scores_are_those_by_hand(artifact: LoadedModel, questions: Path) -> None:
    seen: list[tuple[int, int]] = []
    found = measure_task(
        artifact.model,
        artifact.tokenizer,
        TaskConfig(kind="file", name=str(questions)),
        on_progress=lambda *done: seen.append(done),
    )
    plain, normal = [], []
    for item in QUESTIONS:
        answers = [str(item["sol1"]), str(item["sol2"])]
        scores = [likelihood(artifact, f"Question: {item['goal']}\nAnswer:", f" {answer}") for answer in answers]
        by_length = [score / len(answer) for score, answer in zip(scores, answers, strict=True)]
        plain.append(scores.index(max(scores)) == item["label"])
        normal.append(by_length.index(max(by_length)) == item["label"])
    result = found["jars"]
    assert (result["samples"], result["num_fewshot"]) == (5, 0)
    for name, hits in (("acc", plain), ("acc_norm", normal)):
        share = sum(hits) / len(hits)
        assert result[name] == pytest.approx(share)
        assert result[f"{name}_stderr"] == pytest.approx(math.sqrt(share * (1 - share) / (len(hits) - 1)))
    assert seen[-1] == (10, 10)
    assert json.loads(json.dumps(found)) == found


def test_neighbours_in_a_batch_and_its_padding_change_nothing(tiny_model: Callable[..., Path]) -> None:
    loaded = load_for_evaluation(str(tiny_model()), device="cpu")
    model = loaded.model.float()
    scorer = ScoringModel(model, loaded.tokenizer)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 250, (length,), generator=generator).tolist() for length in (3, 4, 9, 17, 30, 30, 31, 64)]
    requests = [(("", ""), row[:2], row[2:]) for row in rows]
    found = scorer._loglikelihood_tokens(requests)
    for row, (likelihood_found, _) in zip(rows, found, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([row[:-1]])).logits[0].double().log_softmax(-1)
        expected = sum(float(logits[place - 1, row[place]]) for place in range(2, len(row)))
        # Sums of at most 64 float32 losses near 6.
        assert likelihood_found == pytest.approx(expected, rel=1e-4)


def test_limit_and_solved_examples(artifact: LoadedModel, questions: Path) -> None:
    task = TaskConfig(kind="file", name=str(questions), limit=2, num_fewshot=1)
    result = measure_task(artifact.model, artifact.tokenizer, task)["jars"]
    assert (result["samples"], result["num_fewshot"]) == (2, 1)


def task_file(folder: Path, **fields: Any) -> TaskConfig:
    values = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": "jars.jsonl"}},
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "doc_to_text": "{{goal}}",
        "doc_to_choice": "{{[sol1, sol2]}}",
        "doc_to_target": "label",
        **fields,
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump(values))
    return TaskConfig(kind="file", name=str(folder / "mine.yaml"))


def test_generated_answers_are_compared(artifact: LoadedModel, questions: Path) -> None:
    task = task_file(
        questions.parent,
        output_type="generate_until",
        doc_to_choice=None,
        doc_to_target="sol1",
        generation_kwargs={"max_gen_toks": 3, "until": ["\n"]},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    result = measure_task(artifact.model, artifact.tokenizer, task)["mine"]
    # Three random bytes are none of the answers.
    assert result["exact_match"] == 0.0
    assert result["samples"] == 5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"doc_to_text": "{{absent}}"}, "'absent' is undefined"),
        ({"doc_to_text": "{{goal"}, "task .*mine.yaml: TemplateSyntaxError"),
        ({"doc_to_text": "{{goal.__class__.__mro__}}"}, "access to attribute '__class__' .* is unsafe"),
        ({"metric_list": [{"metric": "someone/metric"}]}, "lm-eval has no metric 'someone/metric'"),
        ({"num_fewshot": 0}, "takes no solved examples, num_fewshot is 1"),
        ({"doc_to_choice": "{{sol1}}"}, "task .*mine.yaml"),
    ],
)
def test_what_a_task_gets_wrong_is_its_error(
    artifact: LoadedModel, questions: Path, fields: dict[str, Any], message: str
) -> None:
    task = task_file(questions.parent, **fields)
    task = TaskConfig(kind="file", name=task.name, num_fewshot=1 if "num_fewshot" in fields else None)
    with pytest.raises(EvaluationError, match=message):
        measure_task(artifact.model, artifact.tokenizer, task)


def test_unreadable_questions_are_named(artifact: LoadedModel, questions: Path) -> None:
    task = task_file(questions.parent)
    questions.write_text('{"goal": "a"}\n{"goal":')
    with pytest.raises(EvaluationError, match=r"cannot read .*jars\.jsonl"):
        measure_task(artifact.model, artifact.tokenizer, task)


def test_a_model_that_outputs_nan_is_told_from_a_bad_task(own_artifact: Path, questions: Path) -> None:
    loaded = load_for_evaluation(str(own_artifact), device="cpu")
    with torch.no_grad():
        loaded.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(EvaluationError, match="the model's outputs are NaN or Inf"):
        measure_task(loaded.model, loaded.tokenizer, TaskConfig(kind="file", name=str(questions)))


def test_errors_of_a_model_at_work_are_not_the_task_s(
    artifact: LoadedModel, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A cache that cannot grow: what a full device looks like from here.
    def full(*_args: Any, **_kwargs: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(artifact.model.model.layers[0], "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        measure_task(artifact.model, artifact.tokenizer, TaskConfig(kind="file", name=str(questions)))


def test_tasks_of_the_hub_need_the_hub(artifact: LoadedModel) -> None:
    with pytest.raises(EvaluationError, match=r"task piqa: .* switched off"):
        measure_task(artifact.model, artifact.tokenizer, TaskConfig(name="piqa"))


def test_an_unknown_task_is_named(artifact: LoadedModel) -> None:
    with pytest.raises(EvaluationError, match="lm-eval has no task 'no_such_task'"):
        measure_task(artifact.model, artifact.tokenizer, TaskConfig(name="no_such_task"), allow_hub=True)
