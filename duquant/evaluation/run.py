"""A plan's parts, one after the other: perplexity, tasks, speed."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from duquant.errors import EvaluationError
from duquant.evaluation.accuracy import measure_task
from duquant.evaluation.loading import LoadedModel, load_for_evaluation
from duquant.evaluation.perplexity import measure_perplexity
from duquant.evaluation.plan import EvaluationPlan, PerplexityConfig, TaskConfig
from duquant.evaluation.speed import measure_speed

OnProgress = Callable[[str, int, int], None]
"""Called with a phase (windows, task NAME, speed), what is done and what there is to do in it."""
OnPart = Callable[[str, dict[str, Any]], None]
"""Called with a part (perplexity, tasks, speed) and all metrics so far."""


def evaluate_plan(
    model: str,
    plan: EvaluationPlan,
    *,
    device: str = "auto",
    threads: int | None = None,
    allow_hub: bool = False,
    task_roots: Sequence[Path] | None = None,
    on_progress: OnProgress | None = None,
    on_part: OnPart | None = None,
) -> dict[str, Any]:
    """Measure what a plan asks for on an artifact's directory or an unquantized model (bfloat16).

    Whatever is finished has been handed to `on_part` before a later part can fail. Tasks are handed over one by one.

    Args:
        model: a directory, or another reference of duquant.models.references.
        plan: what to measure. Texts of kind object must have been fetched, and be named as files.
        device: auto, cpu, cuda or cuda:N.
        threads: CPU threads; none leaves them as they are.
        allow_hub: let the model, and the questions of lm-eval's tasks, come from the hub.
        task_roots: folders that task files and their data must be in; none allows every folder.
        on_progress: see OnProgress. What it raises ends the evaluation.
        on_part: see OnPart.

    Returns:
        JSON types: device, model_bytes and seconds (of all measuring); of perplexity: perplexity, tokens, windows,
        seq_len and tokens_per_second; tasks (see `measure_task`); speed (see `measure_speed`).

    Raises:
        DuQuantError: the model, a text or a task cannot be used.
    """
    loaded = load_for_evaluation(model, device=device, threads=threads, allow_hub=allow_hub)
    metrics: dict[str, Any] = {
        "device": loaded.device.type,
        "model_bytes": loaded.parameter_bytes,
        "seconds": 0.0,
    }

    def finish(part: str, seconds: float, **found: Any) -> None:
        metrics.update(found)
        metrics["seconds"] += seconds
        if on_part:
            on_part(part, dict(metrics))

    def progress(phase: str) -> Callable[[int, int], None]:
        return functools.partial(on_progress, phase) if on_progress else lambda _done, _total: None

    if plan.perplexity is not None:
        found = _perplexity(loaded, plan.perplexity, progress("windows"))
        finish("perplexity", found.pop("seconds"), **found)
    for task in plan.tasks:
        measured = _task(loaded, task, task_roots, allow_hub, progress(f"task {Path(task.name).name}"))
        before = metrics.get("tasks", {})
        if again := before.keys() & measured.keys():
            raise EvaluationError(f"two tasks are called {', '.join(sorted(again))}", field="tasks")
        finish("tasks", next(iter(measured.values()))["seconds"], tasks={**before, **measured})
    if plan.speed is not None:
        speed = measure_speed(loaded, plan.speed, on_progress=progress("speed"))
        finish("speed", speed["seconds"], speed=speed)
    return metrics


def _perplexity(loaded: LoadedModel, config: PerplexityConfig, progress: Callable[[int, int], None]) -> dict[str, Any]:
    result = measure_perplexity(
        loaded, config.text, seq_len=config.seq_len, windows=config.windows, on_progress=progress
    )
    return {**asdict(result), "tokens_per_second": result.tokens / result.seconds}


def _task(
    loaded: LoadedModel,
    task: TaskConfig,
    roots: Sequence[Path] | None,
    allow_hub: bool,
    progress: Callable[[int, int], None],
) -> dict[str, dict[str, Any]]:
    return measure_task(loaded.model, loaded.tokenizer, task, roots=roots, allow_hub=allow_hub, on_progress=progress)
