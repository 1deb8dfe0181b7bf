"""Zero-shot and few-shot accuracy, through lm-eval (github.com/EleutherAI/lm-evaluation-harness, 0.4.13)."""

import copy
import functools
import logging
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from duquant.errors import DuQuantError, EvaluationError
from duquant.evaluation.plan import TaskConfig
from duquant.evaluation.task_files import TaskFile, read_task_file

_FEWSHOT_SEED = 1234
"""lm-eval's own, so that its solved examples are the ones that everybody shows."""

Progress = Callable[[int, int], None]
"""Called with requests done and requests in all."""


def measure_task(
    model: Any,
    tokenizer: Any,
    task: TaskConfig,
    *,
    roots: Sequence[Path] | None = None,
    allow_hub: bool = False,
    on_progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Ask a loaded model the questions of a task.

    Log-likelihoods are float32, and the prompt is the task's own: no chat template. A group of tasks gives one entry
    for itself and one for each of its members.

    Args:
        model: an artifact or an unquantized model, as transformers loads it.
        tokenizer: its tokenizer.
        task: what to ask.
        roots: folders that task files and their data must be in; none allows every folder.
        allow_hub: whether tasks of lm-eval may fetch their questions from the hub.
        on_progress: called after each batch.

    Returns:
        By the task's name: acc, acc_norm and whatever else it scores (0 to 1, or as lm-eval defines it), each with a
        _stderr, the standard error of its mean over the questions (null for other aggregations); samples, the
        questions that were asked; num_fewshot; seconds.

    Raises:
        EvaluationError: there is no such task, its file or its questions cannot be used.
    """
    require_lm_eval()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        what = f"task {task.name}"
        built = _guarded(what, lambda: _build(task, roots, allow_hub, Path(cache)))
        tasks: dict[str, Any] = built["tasks"]
        for each in tasks.values():
            _set_fewshot(each, task)
        results = _evaluate(what, model, tokenizer, built, task.limit, on_progress)
    seconds = time.perf_counter() - started
    found = {
        name: {**_scores(results["results"][name], results["samples"][name], tasks[name]), "seconds": seconds}
        for name in tasks
    }
    groups = {name: results["results"][name] for name in built.get("groups", {}) if name in results["results"]}
    for name, values in groups.items():
        count = sum(found[member]["samples"] for member in _members(name, built["group_map"]) if member in found)
        found[name] = {**_named_scores(values), "samples": count, "num_fewshot": task.num_fewshot, "seconds": seconds}
    return found


def require_lm_eval() -> None:
    """Refuse where lm-eval is not installed.

    Raises:
        EvaluationError: it is not.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as err:
        raise EvaluationError("tasks need the package lm-eval: pip install 'duquant[eval]'") from err
    _tame_lm_eval()


@functools.cache
def _tame_lm_eval() -> None:
    """Let templates of task files only format text, and keep bars out of other people's output.

    lm-eval renders templates in a plain Jinja environment, in which they can reach every Python object.
    """
    import lm_eval.api.task
    import lm_eval.utils
    from jinja2 import BaseLoader, StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    sandbox = SandboxedEnvironment(loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True)
    sandbox.filters.update(lm_eval.utils.env.filters)
    lm_eval.utils.env = sandbox
    # It warns of what is done on purpose here: a model that is loaded already, data that a function reads.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    lm_eval.api.task.tqdm = functools.partial(lm_eval.api.task.tqdm, disable=True)


def _guarded(what: str, step: Callable[[], Any]) -> Any:
    """Run lm-eval's part of a step: whatever fails there is said to be the task's fault."""
    try:
        return step()
    except DuQuantError:
        raise
    except Exception as err:  # a task's templates and questions fail in every way that Python has
        raise _fault(what, err) from err


def _fault(what: str, err: Exception) -> EvaluationError:
    """Return what a task got wrong, in one line."""
    return EvaluationError(f"{what}: {type(err).__name__}: {' '.join(str(err).split())[:500]}")


def _build(task: TaskConfig, roots: Sequence[Path] | None, allow_hub: bool, cache: Path) -> dict[str, Any]:
    """Return what lm-eval's `evaluate` takes: tasks, and groups of them."""
    if task.kind == "file":
        file = read_task_file(Path(task.name), roots=roots)
        return {"tasks": {file.name: _from_file(file, cache)}}
    if not allow_hub:
        raise EvaluationError(
            f"task {task.name}: the questions of lm-eval's tasks are on the hub, which is switched off; "
            "pass --allow-hub or set allow_hub, or give a task file (.yaml or .jsonl)"
        )
    manager = _task_manager()
    if task.name not in manager.task_index:
        raise EvaluationError(f"lm-eval has no task {task.name!r}; a task file ends in .yaml or .jsonl")
    loaded: dict[str, Any] = manager.load([task.name])
    return loaded


@functools.cache
def _task_manager() -> Any:
    """Return lm-eval's index of its tasks. It reads some 14,000 files, which takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _from_file(file: TaskFile, cache: Path) -> Any:
    from lm_eval.api.metrics import mean  # noqa: F401  # fills the registry
    from lm_eval.api.registry import metric_registry
    from lm_eval.api.task import ConfigurableTask

    for metric in file.fields.get("metric_list") or ():
        # lm-eval would look for it on the hub, and run what it finds there.
        if metric["metric"] not in metric_registry:
            raise EvaluationError(f"task {file.name}: lm-eval has no metric {metric['metric']!r}", field="metric_list")
    data = functools.partial(_read_questions, file, cache)
    # A copy: lm-eval writes into what it is given.
    return ConfigurableTask(config={**copy.deepcopy(dict(file.fields)), "task": file.name, "custom_dataset": data})


def _read_questions(file: TaskFile, cache: Path, **_metadata: Any) -> Any:
    """Return the task's data sets by split."""
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    files = {split: list(paths) for split, paths in file.data_files.items()}
    try:
        return load_dataset(file.format, data_files=files, cache_dir=str(cache), keep_in_memory=True)
    except Exception as err:  # its readers pass on the errors of what they read with
        cause = " ".join(str(err.__cause__ or err).split())
        raise EvaluationError(
            f"task {file.name}: cannot read {', '.join(path for paths in files.values() for path in paths)}: {cause}"
        ) from err


def _set_fewshot(built: Any, task: TaskConfig) -> None:
    own = built.get_config("num_fewshot")
    if task.num_fewshot is None:
        built.set_config(key="num_fewshot", value=own or 0)
    elif own == 0 and task.num_fewshot > 0:
        # A task that says 0 means it: its prompt has its examples, or cannot take any.
        raise EvaluationError(f"task {task.name} takes no solved examples, num_fewshot is {task.num_fewshot}")
    else:
        built.set_config(key="num_fewshot", value=task.num_fewshot)
    built.set_fewshot_seed(seed=_FEWSHOT_SEED)


def _evaluate(
    what: str, model: Any, tokenizer: Any, built: dict[str, Any], limit: int | None, on_progress: Progress | None
) -> dict[str, Any]:
    from lm_eval.evaluator import evaluate

    from duquant.evaluation.scoring import ScoringModel

    scorer = ScoringModel(model, tokenizer, on_progress=on_progress)
    # Its bootstrap starts a process for each core; the errors of means need none, and are made below.
    run = functools.partial(evaluate, lm=scorer, task_dict=built, limit=limit, bootstrap_iters=0, log_samples=True)
    try:
        results: dict[str, Any] = run()
    except DuQuantError:
        raise  # our own, from the model or from `on_progress`
    except Exception as err:
        if scorer.is_running:
            raise
        raise _fault(what, err) from err
    return results


def _scores(values: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], built: Any) -> dict[str, Any]:
    """Return a task's scores with standard errors."""
    from lm_eval.api.metrics import mean

    found = _named_scores(values)
    for metric, aggregate in built.aggregation().items():
        if aggregate is not mean:
            continue
        for filtered in {sample["filter"] for sample in samples}:
            name = _score_name(metric, filtered)
            kept = [sample[metric] for sample in samples if sample["filter"] == filtered and metric in sample]
            if name in found and len(kept) > 1:
                found[f"{name}_stderr"] = statistics.stdev(float(value) for value in kept) / math.sqrt(len(kept))
    return {
        **found,
        "samples": len({sample["doc_id"] for sample in samples}),
        "num_fewshot": int(built.get_config("num_fewshot")),
    }


def _named_scores(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return lm-eval's "metric,filter" entries by metric, and a _stderr of null for each."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        metric, comma, filtered = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, (int, float)):
            name = _score_name(metric, filtered)
            found[name], found[f"{name}_stderr"] = float(value), None
    return found


def _score_name(metric: str, filtered: str) -> str:
    return metric if filtered == "none" else f"{metric}_{filtered}"


def _members(group: str, group_map: Mapping[str, Sequence[str]]) -> set[str]:
    """Return all tasks of a group and of the groups in it."""
    found: set[str] = set()
    for name in group_map.get(group, ()):
        found |= _members(name, group_map) if name in group_map else {name}
    return found
