"""`duquant job`: work on a running service."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from client import calls
from client.connection import Session, on_service
from client.errors import BadInputError, JobFailedError
from client.lists import CursorOption, LimitOption, OfModel, OfRecipe, tell_of_more
from client.measures import QuestionsOption, SpeedFlag, TasksOption, TextOption, measuring, text_source
from client.models import Job
from client.output import duration, note, print_pairs, print_table, size
from client.progress import follow_job
from client.recipes import is_file_name, preset_names, read_data_file
from client.times import ago, at, took

app = typer.Typer(help="Jobs on a running service.", no_args_is_help=True)

JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="The job's id.")]
TimeoutOption = Annotated[
    float | None, typer.Option("--timeout", min=0, help="Give up waiting after this many seconds (exit code 124).")
]
WaitFlag = Annotated[bool, typer.Option("--wait", help="Follow it until it has ended.")]
SamplesOption = Annotated[int | None, typer.Option(help="Windows of calibration text.")]
SeqLenOption = Annotated[int | None, typer.Option(help="Tokens in a window.")]
RecipeOption = Annotated[
    str | None, typer.Option(help="A preset, or a recipe file (.json or .yaml).", autocompletion=preset_names)
]


@app.command()
@on_service
def submit(
    session: Session,
    model: Annotated[str, typer.Argument(help="demo:NAME, local:NAME or hub:OWNER/NAME@COMMIT.")],
    recipe: RecipeOption = None,
    calibration: TextOption = None,
    samples: SamplesOption = None,
    seq_len: SeqLenOption = None,
    priority: Annotated[int | None, typer.Option(help="0 to 1000; lower numbers start first. [default: 100]")] = None,
    queue: Annotated[str | None, typer.Option(help="The queue that it waits in.")] = None,
    after: Annotated[
        list[str] | None, typer.Option(metavar="JOB", help="A job that must succeed first; repeat for more.")
    ] = None,
    evaluate: Annotated[bool, typer.Option("--evaluate", help="Measure the artifact when it is made.")] = False,
    evaluate_on: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The text of that evaluation, or none for tasks alone.")
    ] = None,
    evaluate_windows: Annotated[
        int | None, typer.Option(min=0, help="Windows of that evaluation; 0 for the whole text.")
    ] = None,
    tasks: TasksOption = None,
    limit: QuestionsOption = None,
    speed: SpeedFlag = False,
    force: Annotated[bool, typer.Option("--force", help="Make the artifact again even if there is one.")] = False,
    wait_for_it: WaitFlag = False,
    timeout: TimeoutOption = None,
) -> None:
    """Submit a quantization job. The same work again returns the job that is there."""
    settings = measuring(session, evaluate_on, windows=evaluate_windows, tasks=tasks, limit=limit, speed=speed)
    job = session.client.submit(
        model,
        recipe_value(recipe),
        calibration=_calibration(session, calibration, samples, seq_len),
        # Whoever says how to measure wants it measured.
        evaluate=settings if evaluate or settings else None,
        priority=priority,
        force=force,
        queue=queue,
        depends_on=after or None,
    )
    note(f"{'found' if job.reused else 'submitted'} {job.id} ({job.state})")
    reused = job.reused
    if wait_for_it:
        job = follow_job(session.client, job.id, timeout)
    report_job(session, job, reused=reused)
    if wait_for_it:
        check_job(job)


def _calibration(session: Session, text: str | None, samples: int | None, seq_len: int | None) -> dict[str, Any] | None:
    """Return the changes to the recipe's calibration; none when there are none."""
    source = None if text is None else text_source(session, text, "calibration")
    changes = {"source": source, "samples": samples, "seq_len": seq_len}
    return {name: value for name, value in changes.items() if value is not None} or None


def recipe_value(recipe: str | None) -> Any:
    """Return what a recipe option means: a preset's name, or what is in the file.

    Raises:
        BadInputError: the file cannot be read.
    """
    if recipe is not None and is_file_name(recipe):
        return read_data_file(Path(recipe), "the recipe")
    return recipe


@app.command("list")
@on_service
def list_jobs(
    session: Session,
    state: Annotated[str | None, typer.Option(help="Only jobs in this state.")] = None,
    kind: Annotated[str | None, typer.Option(help="Only quantize or evaluate jobs.")] = None,
    model: OfModel = None,
    recipe: OfRecipe = None,
    batch: Annotated[str | None, typer.Option(help="Only jobs that this batch has made.")] = None,
    limit: LimitOption = 50,
    cursor: CursorOption = None,
) -> None:
    """List jobs, newest first."""
    filters = {"state": state, "kind": kind, "model": model, "recipe": recipe, "batch": batch}
    page = session.client.list(**filters, limit=limit, cursor=cursor)
    rows = [
        (
            job.id,
            job.kind,
            job.state,
            job.model,
            job.recipe_name,
            f"{job.phase} {job.done}/{job.total}" if job.total else "",
            ago(job.raw["created_at"]),
            took(job.raw),
            _gpu(job),
            job.reason,
        )
        for job in page.items
    ]
    data = {"items": [job.raw for job in page.items], "next_cursor": page.next_cursor}
    columns = ("job", "kind", "state", "model", "recipe", "progress", "created", "took", "GPU time", "reason")
    session.show(data, lambda: print_table(columns, rows))
    tell_of_more("job list", page.next_cursor)


@app.command()
@on_service
def get(session: Session, job_id: JobArgument) -> None:
    """Show a job."""
    report_job(session, session.client.get(job_id))


@app.command()
@on_service
def wait(session: Session, job_id: JobArgument, timeout: TimeoutOption = None) -> None:
    """Follow a job until it has ended. Ctrl-C stops following; the job goes on."""
    job = follow_job(session.client, job_id, timeout)
    report_job(session, job)
    check_job(job)


@app.command()
@on_service
def cancel(session: Session, job_id: JobArgument) -> None:
    """Cancel a job; a running one stops at its worker's next beat."""
    report_job(session, session.client.cancel(job_id))


@app.command()
@on_service
def retry(session: Session, job_id: JobArgument) -> None:
    """Run a failed or cancelled job again; it goes on from the layers that it has finished."""
    report_job(session, session.client.retry(job_id))


@app.command()
@on_service
def estimate(
    session: Session,
    model: Annotated[str, typer.Argument(help="demo:NAME, local:NAME or hub:OWNER/NAME@COMMIT.")],
    recipe: RecipeOption = None,
    calibration: TextOption = None,
    samples: SamplesOption = None,
    seq_len: SeqLenOption = None,
) -> None:
    """Say how long a job would take and how large its artifact would be. Nothing is queued."""
    answer = session.client.run(
        calls.estimate_job(
            model, recipe_value(recipe), calibration=_calibration(session, calibration, samples, seq_len)
        )
    )
    seconds, count = answer["time"]["seconds"], answer["size"]["bytes"]
    pairs = {
        "time": "not known: no job like it has finished yet" if seconds is None else duration(seconds),
        "known from": _basis(answer["time"]),
        "size": "not known" if count is None else size(count),
        "size known from": _basis(answer["size"]),
        "there already": answer["reuses"],
    }
    session.show(answer, lambda: print_pairs(pairs))


def _basis(known: Mapping[str, Any]) -> str | None:
    """Say what an estimate rests on; none when there is no estimate."""
    jobs = f"{known['jobs']} finished job{'' if known['jobs'] == 1 else 's'}"
    words = {
        "same_work": f"{jobs} with this model and recipe",
        "same_model": f"{jobs} with this model and other recipes",
        "same_recipe": f"{jobs} with this recipe and other models",
        "shape": "the shape of the model",
        "none": None,
    }
    return words.get(known["basis"], f"{known['basis']}, {jobs}")


def _gpu(job: Job) -> str | None:
    return duration(job.raw["gpu_seconds"]) if job.raw.get("gpu_seconds") else None


def _result(job: Job) -> dict[str, str | None]:
    """Return what a job that succeeded has made or measured."""
    result = job.result or {}
    artifact, metrics = result.get("artifact"), result.get("metrics") or {}
    perplexity, windows = metrics.get("perplexity"), metrics.get("windows")
    checks = (result.get("quality_gate") or {}).get("checks", ())
    return {
        "artifact": artifact and f"{artifact['files']} files, {size(artifact['size_bytes'])}",
        "perplexity": None if perplexity is None else f"{perplexity:.4f}",
        "measured on": windows and f"{windows} windows of {metrics.get('seq_len')} tokens",
        "accuracy": ", ".join(
            f"{task} {scores['acc']:.4f}" for task, scores in (metrics.get("tasks") or {}).items() if "acc" in scores
        )
        or None,
        "measured": result.get("artifact_job_id"),
        "quality gate": ", ".join(f"{each['check']} {each['value']:.1%} ({each['limit']})" for each in checks) or None,
    }


def report_job(session: Session, job: Job, *, reused: bool | None = None) -> None:
    """Print a job."""
    pairs = {
        "job": job.id,
        "kind": job.kind,
        "state": job.state,
        "reason": job.reason,
        "detail": job.detail,
        "model": job.model,
        "recipe": job.recipe_name,
        "phase": f"{job.phase} {job.done}/{job.total}" if job.phase else None,
        "layers": f"{job.layers_done}/{job.layers_total}" if job.layers_total else None,
        "place in the queue": job.queue_position,
        "time left": None if job.eta_seconds is None else duration(job.eta_seconds),
        "evaluation": job.evaluation_job_id or ", ".join(job.raw.get("evaluation_job_ids") or ()) or None,
        "created": at(job.raw["created_at"]),
        "started": at(job.raw["started_at"]),
        "finished": at(job.raw["finished_at"]),
        "took": took(job.raw),
        "GPU time": _gpu(job),
        **_result(job),
    }
    session.show(job.raw if reused is None else {**job.raw, "reused": reused}, lambda: print_pairs(pairs))


def check_job(job: Job) -> None:
    """Raise unless a job that has ended has succeeded.

    Raises:
        JobFailedError: it failed, or was cancelled.
        BadInputError: it ended in a way that this client does not know.
    """
    if job.state == "failed":
        raise JobFailedError(f"{job.id} failed ({job.reason}): {job.detail}")
    if job.state == "cancelled":
        raise JobFailedError(f"{job.id} was cancelled")
    if job.state != "succeeded":
        raise BadInputError(f"{job.id} ended as {job.state}, which this client does not know; upgrade it")
