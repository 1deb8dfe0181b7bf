"""Task files are data: what would run or fetch something is refused, and every error names file and field."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from duquant.errors import EvaluationError
from duquant.evaluation.task_files import read_task_file

GOOD: dict[str, Any] = {
    "task": "mine",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"validation": "questions.jsonl"}},
    "validation_split": "validation",
    "output_type": "multiple_choice",
    "doc_to_text": "{{goal}}",
    "doc_to_choice": "{{[sol1, sol2]}}",
    "doc_to_target": "label",
}
QUESTION = '{"goal": "g", "sol1": "a", "sol2": "b", "label": 0}\n'


def write(folder: Path, **changes: Any) -> Path:
    """A task file beside its questions; a change of None takes the field away."""
    (folder / "questions.jsonl").write_text(QUESTION)
    values = {name: value for name, value in {**GOOD, **changes}.items() if value is not None}
    path = folder / "task.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_data_files_are_found_beside_the_task_file(tmp_path: Path) -> None:
    task = read_task_file(write(tmp_path))
    assert (task.name, task.format) == ("mine", "json")
    assert task.data_files == {"validation": (str(tmp_path / "questions.jsonl"),)}
    assert "dataset_path" not in task.fields
    assert task.fields["doc_to_target"] == "label"


def test_bare_questions_are_asked_as_piqa(tmp_path: Path) -> None:
    path = tmp_path / "piqa-valid.jsonl"
    path.write_text(QUESTION)
    task = read_task_file(path)
    assert task.name == "piqa-valid"
    assert task.fields["doc_to_text"] == "Question: {{goal}}\nAnswer:"
    assert [metric["metric"] for metric in task.fields["metric_list"]] == ["acc", "acc_norm"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": None}, "task is None; it must be the task's name"),
        ({"task": ["piqa", "mmlu"]}, "it must be the task's name"),
        ({"output_type": "chat"}, "output_type is 'chat'"),
        ({"dataset_path": "someone/dataset"}, "dataset_path is 'someone/dataset'; a task file's data are files"),
        ({"dataset_path": "./loader.py"}, "dataset_path is './loader.py'"),
        ({"dataset_kwargs": {"data_files": "questions.jsonl", "trust_remote_code": True}}, "the one field data_files"),
        ({"dataset_kwargs": {"data_files": {"validation": "absent.jsonl"}}}, "data_files 'absent.jsonl': there is no"),
        ({"dataset_kwargs": {"data_files": {"validation": "https://x/y.jsonl"}}}, "must be the path of a file"),
        ({"dataset_kwargs": {"data_files": {"validation": "*.jsonl"}}}, "must be the path of a file"),
        ({"dataset_kwargs": {"data_files": {"validation": []}}}, "must be a path or a list of paths"),
        ({"validation_split": "test"}, "validation_split is 'test'; the data files have: validation"),
        ({"validation_split": None}, "one says where the questions are"),
        ({"include": "other.yaml"}, "include is not one of the fields that are data"),
        ({"process_docs": "utils.clean"}, "process_docs is not one of the fields that are data"),
        ({"custom_dataset": "utils.load"}, "custom_dataset is not one of the fields that are data"),
        ({"unsafe_code": True}, "unsafe_code is not one of the fields that are data"),
        ({"metric_list": [{"metric": "acc", "hf_evaluate": True}]}, "hf_evaluate runs code from elsewhere"),
        ({"metric_list": ["acc"]}, "metric_list must be a list of objects"),
        ({"fewshot_config": {"process_docs": "utils.clean"}}, "fewshot_config must be an object with fields of"),
    ],
)
def test_a_bad_field_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path, **changes)
    with pytest.raises(EvaluationError) as caught:
        read_task_file(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "line",
    ["doc_to_text: !function utils.prompt", "metadata: !!python/object/apply:os.system ['touch exploded']"],
)
def test_tags_that_run_code_are_refused(tmp_path: Path, line: str) -> None:
    path = write(tmp_path, doc_to_text=None)
    path.write_text(path.read_text() + line + "\n")
    (tmp_path / "utils.py").write_text(f"open({str(tmp_path / 'exploded')!r}, 'w')")
    with pytest.raises(EvaluationError, match="run code and are not allowed"):
        read_task_file(path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("text", ["task: [", "- a\n- b\n", "", "\x00"])
def test_what_is_no_yaml_object_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "task.yaml"
    path.write_text(text)
    with pytest.raises(EvaluationError, match=r"is not YAML|must be an object"):
        read_task_file(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "line 1 is not JSON"), (QUESTION + '{"goal": "g"}\n', "line 2: a question has"), ("[1]\n", "line 1: a")],
)
def test_a_bad_question_is_named_by_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(text)
    with pytest.raises(EvaluationError, match=message):
        read_task_file(path)


def test_task_and_data_stay_in_the_roots(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    task = write(inside)
    assert read_task_file(task, roots=[inside]).name == "mine"
    with pytest.raises(EvaluationError, match="no such file in the folders that are open"):
        read_task_file(write(outside), roots=[inside])
    elsewhere = write(inside, dataset_kwargs={"data_files": {"validation": "../outside/questions.jsonl"}})
    with pytest.raises(EvaluationError, match=r"dataset_kwargs.data_files '../outside/questions.jsonl': there is no"):
        read_task_file(elsewhere, roots=[inside])
    (inside / "questions.jsonl").unlink()
    (inside / "questions.jsonl").symlink_to(outside / "questions.jsonl")
    with pytest.raises(EvaluationError, match="there is no such file"):
        read_task_file(inside / "task.yaml", roots=[inside])


def test_a_task_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"absent\.yaml: there is no such file"):
        read_task_file(tmp_path / "absent.yaml")
