"""Task files: lm-eval's YAML format, as far as it is data. Nothing in a file is ever run.

lm-eval's own loader runs what a file names: Python functions (`!function`), data set and metric scripts from the hub.
Here a file is read as plain YAML, only fields that are known to be data are let through, and its questions come from
files on this machine.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from duquant.errors import EvaluationError

_FORMATS = ("json", "csv", "parquet", "text")
"""Readers that come with the package datasets and run nothing of the data's."""
_OUTPUT_TYPES = ("multiple_choice", "loglikelihood", "loglikelihood_rolling", "generate_until")
_FIELDS = frozenset(
    [
        "task",
        "task_alias",
        "tag",
        "dataset_path",
        "dataset_kwargs",
        "training_split",
        "validation_split",
        "test_split",
        "fewshot_split",
        "fewshot_config",
        "description",
        "doc_to_text",
        "doc_to_target",
        "doc_to_choice",
        "target_delimiter",
        "fewshot_delimiter",
        "gen_prefix",
        "num_fewshot",
        "metric_list",
        "output_type",
        "generation_kwargs",
        "repeats",
        "filter_list",
        "should_decontaminate",
        "doc_to_decontamination_query",
        "metadata",
    ]
)
_FEWSHOT_FIELDS = frozenset(
    [
        "sampler",
        "split",
        "fewshot_indices",
        "samples",
        "doc_to_text",
        "doc_to_choice",
        "doc_to_target",
        "gen_prefix",
        "fewshot_delimiter",
        "target_delimiter",
    ]
)
_LARGEST_BYTES = 1_000_000
"""Of a YAML file. The questions are in files of their own."""


@dataclass(frozen=True)
class TaskFile:
    """A task that was read from a file."""

    name: str
    fields: Mapping[str, Any]
    """What lm-eval's ConfigurableTask takes, without its data set."""
    format: str
    data_files: Mapping[str, tuple[str, ...]]
    """Absolute paths, by split."""


def read_task_file(path: Path, *, roots: Sequence[Path] | None = None) -> TaskFile:
    """Read a task: YAML in lm-eval's format, or the bare questions of a two-choice task as JSONL.

    Args:
        path: the file.
        roots: folders that it and its data must be in, links followed; none allows every folder.

    Raises:
        EvaluationError: a file is missing or outside the roots, or a field is malformed, unknown or would run code.
    """
    file = _existing(path, roots, f"task file {path}")
    if file.suffix == ".jsonl":
        template = resources.files("duquant.evaluation") / "tasks" / "two_choices.yaml"
        _require_two_choices(file)
        return TaskFile(file.stem, yaml.safe_load(template.read_text("utf-8")), "json", {"validation": (str(file),)})
    values = _parse(file)
    for name in values:
        if name not in _FIELDS:
            raise _bad(
                file, name, "is not one of the fields that are data; those that run or load code are not allowed"
            )
    data_files = _data_files(file, values, roots)
    _check_splits(file, values, data_files)
    _check_metrics(file, values)
    fewshot = values.get("fewshot_config") or {}
    if not isinstance(fewshot, dict) or not set(fewshot) <= _FEWSHOT_FIELDS:
        raise _bad(file, "fewshot_config", f"must be an object with fields of: {', '.join(sorted(_FEWSHOT_FIELDS))}")
    fields = {name: value for name, value in values.items() if name not in ("dataset_path", "dataset_kwargs", "tag")}
    return TaskFile(values["task"], fields, values["dataset_path"], data_files)


def _bad(file: Path, field: str, problem: str) -> EvaluationError:
    return EvaluationError(f"task file {file}: {field} {problem}", field=field, file=str(file))


def _existing(path: Path, roots: Sequence[Path] | None, what: str) -> Path:
    """Return the file with all links followed."""
    found = path.expanduser().resolve()
    # The same words for both: a caller outside the roots is not told which files there are.
    outside = roots is not None and not any(found.is_relative_to(root.resolve()) for root in roots)
    if outside or not found.is_file():
        allowed = "" if roots is None else " in the folders that are open to evaluations"
        raise EvaluationError(f"{what}: there is no such file{allowed}", file=str(path))
    return found


def _parse(file: Path) -> dict[str, Any]:
    if file.stat().st_size > _LARGEST_BYTES:
        raise EvaluationError(f"task file {file} has more than {_LARGEST_BYTES} bytes", file=str(file))
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.constructor.ConstructorError as err:
        where = "" if err.problem_mark is None else f" in line {err.problem_mark.line + 1}"
        raise EvaluationError(
            f"task file {file}: {err.problem}{where}; tags such as !function run code and are not allowed",
            file=str(file),
        ) from err
    except (yaml.YAMLError, UnicodeDecodeError) as err:
        raise EvaluationError(f"task file {file} is not YAML: {' '.join(str(err).split())}", file=str(file)) from err
    if not isinstance(values, dict):
        raise EvaluationError(f"task file {file} must be an object, not {type(values).__name__}", file=str(file))
    name = values.get("task")
    if not isinstance(name, str) or not name or len(name) > 200:
        raise _bad(file, "task", f"is {name!r}; it must be the task's name")
    if values.get("output_type") not in _OUTPUT_TYPES:
        allowed = ", ".join(_OUTPUT_TYPES)
        raise _bad(file, "output_type", f"is {values.get('output_type')!r}; it must be one of: {allowed}")
    return values


def _data_files(file: Path, values: dict[str, Any], roots: Sequence[Path] | None) -> dict[str, tuple[str, ...]]:
    """Return the paths of the data by split, as the package datasets reads `data_files`."""
    if values.get("dataset_path") not in _FORMATS:
        problem = f"is {values.get('dataset_path')!r}; a task file's data are files: one of {', '.join(_FORMATS)}"
        raise _bad(file, "dataset_path", problem)
    options = values.get("dataset_kwargs")
    if not isinstance(options, dict) or set(options) != {"data_files"}:
        raise _bad(file, "dataset_kwargs", "must be an object with the one field data_files")
    named = options["data_files"]
    by_split = named if isinstance(named, dict) else {"train": named}
    found = {}
    for split, names in by_split.items():
        listed = [names] if isinstance(names, str) else names
        if not isinstance(listed, list) or not listed or not all(isinstance(name, str) for name in listed):
            raise _bad(file, "dataset_kwargs.data_files", f"of {split!r} must be a path or a list of paths")
        found[str(split)] = tuple(str(_data_file(file, name, roots)) for name in listed)
    return found


def _data_file(file: Path, name: str, roots: Sequence[Path] | None) -> Path:
    # datasets takes these for patterns and for files inside others, which may be on the network.
    if any(mark in name for mark in ("*", "?", "[", "::", "://")):
        raise _bad(file, "dataset_kwargs.data_files", f"names {name!r}; it must be the path of a file")
    return _existing(file.parent / name, roots, f"task file {file}: dataset_kwargs.data_files {name!r}")


def _check_splits(file: Path, values: dict[str, Any], data_files: Mapping[str, object]) -> None:
    named = [values.get(field) for field in ("test_split", "validation_split")]
    if not any(named):
        raise _bad(file, "test_split", "and validation_split are missing; one says where the questions are")
    for field in ("training_split", "validation_split", "test_split", "fewshot_split"):
        split = values.get(field)
        if split is not None and split not in data_files:
            raise _bad(file, field, f"is {split!r}; the data files have: {', '.join(data_files)}")


def _check_metrics(file: Path, values: dict[str, Any]) -> None:
    """Refuse metrics that lm-eval would fetch: `hf_evaluate` runs a script from the hub or from a folder."""
    metrics = values.get("metric_list")
    if metrics is None:
        return
    if not isinstance(metrics, list) or not all(
        isinstance(m, dict) and isinstance(m.get("metric"), str) for m in metrics
    ):
        raise _bad(file, "metric_list", "must be a list of objects with a field metric")
    for metric in metrics:
        if "hf_evaluate" in metric:
            raise _bad(file, "metric_list.hf_evaluate", "runs code from elsewhere and is not allowed")


def _require_two_choices(file: Path) -> None:
    """Check the lines of bare questions, so that an error names one."""
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                item = json.loads(line)
            except ValueError as err:
                raise EvaluationError(f"task file {file} line {number} is not JSON: {err}", file=str(file)) from err
            texts = [item.get(name) for name in ("goal", "sol1", "sol2")] if isinstance(item, dict) else [None]
            if not all(isinstance(text, str) for text in texts) or item.get("label") not in (0, 1):
                raise EvaluationError(
                    f"task file {file} line {number}: a question has the texts goal, sol1, sol2 and a label of 0 or 1",
                    file=str(file),
                )
