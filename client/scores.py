"""Tables of what an evaluation has measured: scores of tasks, rows of the kernel benchmark."""

from collections.abc import Iterator, Mapping
from typing import Any

from client.output import note, number, print_table

Metrics = Mapping[str, Any]


def print_scores(metrics: Metrics) -> None:
    """Print the tables of an evaluation's tasks and speed, those that it has."""
    if metrics.get("tasks"):
        print_table(("task", "score", "value", "error", "questions"), list(_task_rows(metrics["tasks"])))
    if metrics.get("speed"):
        columns = ("", "step", "contender", "tokens/s", "speedup", "transform")
        print_table(columns, list(_speed_rows(metrics["speed"])))
        for skipped in metrics["speed"].get("skipped", ()):
            note(f"left out: {skipped['what']} ({skipped['scope']}): {skipped['reason']}")


def _task_rows(tasks: Metrics) -> Iterator[tuple[object, ...]]:
    for task, scores in tasks.items():
        for name in scores:
            if f"{name}_stderr" in scores:
                yield task, name, number(scores[name]), number(scores[f"{name}_stderr"]), scores["samples"]


def _speed_rows(speed: Metrics) -> Iterator[tuple[object, ...]]:
    for scope in ("layer", "model"):
        for row in speed[scope]:
            step = f"prefill {row['tokens']}" if row["phase"] == "prefill" else f"decode x {row['batch']}"
            for kind, rate in row["tokens_per_second"].items():
                speedup, overhead = (row.get(name, {}).get(kind) for name in ("speedup", "transform_overhead"))
                ratio = None if speedup is None else f"{speedup:.2f}x"
                yield scope, step, kind, number(rate), ratio, None if overhead is None else f"{overhead:+.1%}"
