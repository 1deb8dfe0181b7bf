"""`duquant batch`: many models with many recipes at once."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from client import calls
from client.connection import Session, on_service
from client.errors import BadInputError, JobFailedError
from client.jobs import PriorityOption, TimeoutOption, WaitFlag, recipe_value
from client.lists import (
    CreatedFrom,
    CreatedUntil,
    CursorOption,
    LimitOption,
    OfModel,
    OfRecipe,
    WithTag,
    tell_of_ignored,
    tell_of_more,
)
from client.models import Batch, parse_model
from client.output import counted, duration, note, print_pairs, print_table, size
from client.progress import Teller, teller
from client.recipes import read_data_file
from client.times import ago, at

app = typer.Typer(help="Many models with many recipes at once.", no_args_is_help=True)

NameOption = Annotated[str | None, typer.Option(help="A name for people.")]
QueueOption = Annotated[str | None, typer.Option(help="The queue that its jobs wait in.")]
BatchArgument = Annotated[str, typer.Argument(metavar="BATCH", help="The batch's id.")]
_FIELDS = frozenset({"name", "models", "recipes", "calibration", "evaluate", "priority", "queue", "force"})
_COLUMNS = ("model", "recipe", "state", "perplexity", "x model", "size", "x model", "time", "tokens/s", "why")


@app.command()
@on_service
def submit(
    session: Session,
    file: Annotated[Path, typer.Argument(help="A YAML or JSON file; see docs/how-to/quantize-a-zoo.md.")],
    name: NameOption = None,
    priority: PriorityOption = None,
    queue: QueueOption = None,
    force: Annotated[
        bool, typer.Option("--force", help="Make every artifact again, also those that are there.")
    ] = False,
    wait_for_it: WaitFlag = False,
    timeout: TimeoutOption = None,
) -> None:
    """Submit a file of models and recipes. Options replace what the file says; what is there already is reused."""
    options = {**read_zoo(file), **_given(name=name, priority=priority, queue=queue)}
    if force:
        options["force"] = True
    batch = session.client.run(calls.submit_batch(options.pop("models"), options.pop("recipes", None), **options))
    there = f", {batch.reused} of them there already" if batch.reused else ""
    note(f"submitted {batch.id}: {_pieces(batch)}{there}")
    if batch.reused:
        tell_of_ignored([f"--{name}" for name in _given(priority=priority, queue=queue)], "what is there already")
    if wait_for_it:
        _finish(session, batch.id, timeout)
        return
    _report(session, batch)
    refused = batch.raw["jobs"].get("refused", 0)
    if refused:
        for row in session.client.run(calls.batch_table(batch.id)):
            if row["state"] == "refused":
                note(f"refused {row['model_name']} with {row['recipe_name']}: {row['detail']}")
    if refused == batch.jobs.total:
        raise JobFailedError(f"nothing of {batch.id} was accepted: mend what is refused and submit it again")


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def read_zoo(path: Path) -> dict[str, Any]:
    """Read a batch file: as the API has it, but models and recipes may be written as on the command line.

    Raises:
        BadInputError: the file cannot be read, or has a field that there is not.
    """
    values = read_data_file(path, "the batch")
    if not isinstance(values, dict) or not isinstance(values.get("models"), list):
        raise BadInputError(f"{path} must hold an object with a list of models")
    if unknown := sorted(str(name) for name in values if name not in _FIELDS):
        known = ", ".join(sorted(_FIELDS))
        raise BadInputError(f"{path}: there is no field {unknown[0]!r}; fields are: {known}")
    recipes = values.get("recipes")
    if recipes is not None and not isinstance(recipes, list):
        raise BadInputError(f"{path}: recipes must be a list")
    zoo: dict[str, Any] = {**values, "models": [_selector(each, path) for each in values["models"]]}
    if recipes is not None:
        # Files of recipes are named from where the batch file is.
        zoo["recipes"] = [_recipe(each, path.parent) for each in recipes]
    return zoo


def _selector(value: Any, path: Path) -> Mapping[str, Any]:
    if isinstance(value, str):
        kind, _, rest = value.partition(":")
        if kind == "tag":
            return {"tag": rest}
        if value.endswith("*"):
            return {"source": kind, "prefix": rest.removesuffix("*")}
        return parse_model(value)
    if isinstance(value, dict):
        return value
    raise BadInputError(f"{path}: {value!r} is no model; write demo:NAME, local:NAME, local:PREFIX*, tag:TAG")


def _recipe(value: Any, folder: Path) -> Any:
    if not isinstance(value, str):
        return value
    return recipe_value(value if "/" not in value and "." not in value else str(folder / value))


@app.command("list")
@on_service
def list_batches(
    session: Session,
    state: Annotated[
        list[str] | None,
        typer.Option(help="Only batches that are running, succeeded, partial, failed or cancelled; repeat for more."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Only batches with this name.")] = None,
    model: Annotated[str | None, typer.Option(help="Only batches with work on the model of this name.")] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="Only batches with work with the recipe of this name; with --model, on that model."),
    ] = None,
    created_from: CreatedFrom = None,
    created_until: CreatedUntil = None,
    limit: LimitOption = 50,
    cursor: CursorOption = None,
) -> None:
    """List batches, newest first."""
    filters = {"state": state or None, "name": name, "model": model, "recipe": recipe}
    when = {"created_from": created_from, "created_until": created_until}
    page = session.client.run(calls.list_batches(**filters, **when, limit=limit, cursor=cursor))
    rows = [
        (each.id, each.name, each.state, f"{each.jobs.ended}/{each.jobs.total}", each.jobs.failed, _made(each))
        for each in page.items
    ]
    session.show(page.raw, lambda: print_table(("batch", "name", "state", "jobs", "failed", "created"), rows))
    tell_of_more("batch list", page.next_cursor)


@app.command()
@on_service
def get(session: Session, batch_id: BatchArgument) -> None:
    """Show how far a batch is."""
    _report(session, session.client.run(calls.get_batch(batch_id)))


@app.command()
@on_service
def wait(session: Session, batch_id: BatchArgument, timeout: TimeoutOption = None) -> None:
    """Follow a batch until nothing of it waits or runs. Ctrl-C stops following; the batch goes on."""
    _finish(session, batch_id, timeout)


@app.command()
@on_service
def table(session: Session, batch_id: BatchArgument) -> None:
    """Compare what a batch has made: perplexity, size and speed."""
    _show_table(session, session.client.run(calls.batch_table(batch_id)))


@app.command()
@on_service
def cancel(session: Session, batch_id: BatchArgument) -> None:
    """Cancel what a batch has made and that has not ended."""
    _report(session, session.client.run(calls.cancel_batch(batch_id)))


@app.command()
@on_service
def retry(
    session: Session, batch_id: BatchArgument, wait_for_it: WaitFlag = False, timeout: TimeoutOption = None
) -> None:
    """Run again what failed or was cancelled; each job goes on from the layers that it has finished."""
    batch = session.client.run(calls.retry_batch(batch_id))
    if wait_for_it:
        _finish(session, batch.id, timeout)
    else:
        _report(session, batch)


@app.command()
@on_service
def requantize(
    session: Session,
    model: OfModel = None,
    recipe: OfRecipe = None,
    tag: WithTag = None,
    name: NameOption = None,
    priority: PriorityOption = None,
    queue: QueueOption = None,
    evaluate: Annotated[bool, typer.Option("--evaluate", help="Measure what is made.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say which artifacts that would be.")] = False,
) -> None:
    """Make again what an older algorithm, or an older version of a preset, has made."""
    options = _given(model=model, recipe=recipe, tag=tag, priority=priority, queue=queue)
    if evaluate:
        options["evaluate"] = {}
    answer = session.client.run(calls.requantize(name=name or "requantize", dry_run=dry_run, **options))
    rows = [(each["artifact_id"], each["model_name"], each["recipe_name"], each["reason"]) for each in answer.items]
    session.show(
        answer.raw, lambda: print_table(("artifact", "model", "recipe", "outdated by"), rows) if rows else None
    )
    if not rows:
        note("nothing is outdated")
    if answer.batch is not None:
        note(f"submitted {answer.batch.id}: {_pieces(answer.batch)}")


def _finish(session: Session, batch_id: str, timeout: float | None) -> None:
    """Follow a batch, show its table, and fail when something of it has."""
    with teller(f"No longer following; the batch goes on: duquant batch wait {batch_id}") as shown:
        batch = session.client.wait_for_batch(batch_id, timeout_s=timeout, on_update=lambda batch: _tell(shown, batch))
    rows = session.client.run(calls.batch_table(batch_id))
    _show_table(session, rows)
    bad = sum(each.failed + each.cancelled for each in (batch.jobs, batch.evaluations))
    if bad:
        can_retry = any(map(_may_succeed, rows))
        advice = f"duquant batch retry {batch_id}" if can_retry else "mend what the table says and submit it again"
        raise JobFailedError(f"{bad} of the {_pieces(batch)} of {batch_id} did not succeed: {advice}")


def _may_succeed(row: Mapping[str, Any]) -> bool:
    """Tell whether trying a row again may help: what was refused has no job, and a bad input stays bad."""
    if row["state"] in ("failed", "cancelled"):
        return bool(row["reason"] != "bad_input")
    if row["state"] == "refused" or row["evaluation_state"] not in ("failed", "cancelled"):
        return False
    return row.get("evaluation_reason") != "bad_input"


def _pieces(batch: Batch) -> str:
    jobs = counted(batch.jobs.total, "job")
    return f"{jobs} and {counted(batch.evaluations.total, 'evaluation')}" if batch.evaluations.total else jobs


def _tell(shown: Teller, batch: Batch) -> None:
    kinds = [(each, unit) for each, unit in ((batch.jobs, "jobs"), (batch.evaluations, "evaluations")) if each.total]
    failed = sum(each.failed for each, _ in kinds)
    title = f"{batch.state}, {failed} failed" if failed else batch.state
    words = ", ".join(f"{each.ended}/{each.total} {unit}" for each, unit in kinds)
    shown.tell(title, sum(each.ended for each, _ in kinds), sum(each.total for each, _ in kinds), words=words)


def _report(session: Session, batch: Batch) -> None:
    pairs = {
        "batch": batch.id,
        "name": batch.name or None,
        "state": batch.state,
        "jobs": _how_many(batch.raw["jobs"]),
        "there already": batch.reused,
        "evaluations": _how_many(batch.raw["evaluations"]) if batch.evaluations.total else None,
        "created": at(batch.raw["created_at"]),
        "cancelled": at(batch.raw["cancelled_at"]),
        "finished": at(batch.raw["finished_at"]),
    }
    session.show(batch.raw, lambda: print_pairs(pairs))


def _made(batch: Batch) -> str | None:
    return ago(batch.raw["created_at"])


def _how_many(counts: Mapping[str, int]) -> str:
    """Say how many are where; those that were refused are some of the failed ones."""
    parts = {name: f"{count} {name}" for name, count in counts.items() if count and name not in ("total", "refused")}
    if refused := counts.get("refused"):
        parts["failed"] += " (refused)" if refused == counts["failed"] else f" ({refused} of them refused)"
    return ", ".join(parts.values()) or "none"


def _show_table(session: Session, rows: list[dict[str, Any]]) -> None:
    cells = [
        (
            row["model_name"],
            row["recipe_name"],
            row["state"] + (" (reused)" if row["reused"] else ""),
            _number(row["perplexity"], ".2f"),
            _number(row["perplexity_ratio"], ".3f"),
            None if row["size_bytes"] is None else size(row["size_bytes"]),
            _number(row["size_ratio"], ".2f"),
            None if row["seconds"] is None else duration(row["seconds"]),
            _number(row["tokens_per_second"], ".0f"),
            _why(row),
        )
        for row in rows
    ]
    session.show({"rows": rows}, lambda: print_table(_COLUMNS, cells))


def _number(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)


def _why(row: Mapping[str, Any]) -> str | None:
    if row["state"] in ("failed", "refused"):
        return ": ".join(part for part in (row["reason"], row["detail"]) if part)
    # The row of an unquantized model is its evaluation, and work that was cancelled takes its evaluation along.
    if row["state"] == "cancelled":
        return None
    if row["evaluation_state"] == "failed":
        # An older service has no reason here.
        parts = ("evaluation", row.get("evaluation_reason"), row["evaluation_detail"])
        return ": ".join(part for part in parts if part)
    return "evaluation: cancelled" if row["evaluation_state"] == "cancelled" else None
