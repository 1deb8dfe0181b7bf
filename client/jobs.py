"""`duquant job`: work on a running service."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from client import calls
from client.connection import Session, on_service
from client.errors import BadInputError
from client.job_views import COLUMNS, LAYER_COLUMNS, check_job, layer_row, print_event, report_job, row_of
from client.lists import (
    CreatedFrom,
    CreatedUntil,
    CursorOption,
    LimitOption,
    OfModel,
    OfRecipe,
    read_time,
    tell_of_ignored,
    tell_of_more,
)
from client.measures import FewshotOption, QuestionsOption, SpeedFlag, TasksOption, TextOption, measuring, text_source
from client.models import Job
from client.output import counted, duration, note, print_pairs, print_table, size
from client.progress import detaching, follow_job
from client.recipes import is_file_name, preset_names, read_data_file

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
PriorityOption = Annotated[int | None, typer.Option(help="0 to 1000, usually 100; lower numbers start first.")]
QueueOption = Annotated[str | None, typer.Option(help="The queue that it waits in.")]
RunAtOption = Annotated[
    str | None,
    typer.Option(metavar="TIME", parser=read_time, help="When it may start: 2026-01-31T22:00:00Z, +2h, now."),
]
DeadlineOption = Annotated[
    str | None,
    typer.Option("--deadline", metavar="TIME", parser=read_time, help="When it fails if it has not ended."),
]


def _label(text: str) -> str:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise typer.BadParameter(f"{text!r} is no label; one looks like team=search")
    return text


LabelOption = Annotated[
    list[str] | None, typer.Option("--label", metavar="NAME=VALUE", parser=_label, help="A label; repeat for more.")
]
_NONE = "none"
"""What takes a deadline or labels away."""
_OPTIONS = {
    "queue": "--queue",
    "priority": "--priority",
    "run_at": "--run-at",
    "deadline_at": "--deadline",
    "labels": "--label",
    "depends_on": "--after",
}
"""The options that say how a job waits, by the API's names: they are no part of the work that is found again."""


def _deadline_or_none(text: str) -> str:
    return text if text == _NONE else read_time(text)


def _label_or_none(text: str) -> str:
    return text if text == _NONE else _label(text)


@app.command()
@on_service
def submit(
    session: Session,
    model: Annotated[str, typer.Argument(help="demo:NAME, local:NAME or hub:OWNER/NAME@COMMIT.")],
    recipe: RecipeOption = None,
    calibration: TextOption = None,
    samples: SamplesOption = None,
    seq_len: SeqLenOption = None,
    priority: PriorityOption = None,
    queue: QueueOption = None,
    run_at: RunAtOption = None,
    deadline: DeadlineOption = None,
    label: LabelOption = None,
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
    evaluate_seq_len: Annotated[int | None, typer.Option(help="Tokens in a window of that evaluation.")] = None,
    tasks: TasksOption = None,
    num_fewshot: FewshotOption = None,
    limit: QuestionsOption = None,
    speed: SpeedFlag = False,
    force: Annotated[bool, typer.Option("--force", help="Make the artifact again even if there is one.")] = False,
    wait_for_it: WaitFlag = False,
    timeout: TimeoutOption = None,
) -> None:
    """Submit a quantization job. The same work again returns the job that is there."""
    settings = measuring(
        session,
        evaluate_on,
        seq_len=evaluate_seq_len,
        windows=evaluate_windows,
        tasks=tasks,
        num_fewshot=num_fewshot,
        limit=limit,
        speed=speed,
    )
    job = session.client.submit(
        model,
        recipe_value(recipe),
        calibration=_calibration(session, calibration, samples, seq_len),
        # Whoever says how to measure wants it measured.
        evaluate=settings if evaluate or settings else None,
        priority=priority,
        force=force,
        queue=queue,
        run_at=run_at,
        deadline_at=deadline,
        labels=_labels(label),
        depends_on=after or None,
    )
    note(f"{'found' if job.reused else 'submitted'} {job.id} ({job.state})")
    reused = job.reused
    if reused:
        asked = {"queue": queue, "priority": priority, "run_at": run_at, "deadline_at": deadline}
        tell_of_ignored(ignored_options(job, labels=_labels(label), depends_on=after, **asked), job.id)
    if wait_for_it:
        job = follow_job(session.client, job.id, timeout)
    report_job(session, job, reused=reused)
    if wait_for_it:
        check_job(job)


def ignored_options(job: Job, **asked: Any) -> list[str]:
    """Return the options whose values a job that was there already does not have."""
    return [_OPTIONS[name] for name, value in asked.items() if value is not None and not _has(job.raw.get(name), value)]


def _has(value: Any, asked: Any) -> bool:
    if isinstance(asked, Mapping):
        return asked.items() <= (value or {}).items()
    if isinstance(asked, list):
        return set(asked) <= set(value or ())
    return bool(value == asked)


def _labels(given: list[str] | None) -> dict[str, str] | None:
    """Return the labels that options name.

    Raises:
        BadInputError: they give one name two values.
    """
    labels: dict[str, str] = {}
    for text in given or ():
        name, _, value = text.partition("=")
        if labels.setdefault(name, value) != value:
            raise BadInputError(f"the label {name!r} has two values: {labels[name]} and {value}")
    return labels or None


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
    state: Annotated[list[str] | None, typer.Option(help="Only jobs in this state; repeat for more.")] = None,
    kind: Annotated[str | None, typer.Option(help="Only quantize or evaluate jobs.")] = None,
    model: OfModel = None,
    recipe: OfRecipe = None,
    queue: Annotated[str | None, typer.Option(help="Only jobs of this queue.")] = None,
    batch: Annotated[str | None, typer.Option(help="Only jobs that this batch has made.")] = None,
    reason: Annotated[str | None, typer.Option(help="Only jobs that failed for this reason.")] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", parser=_label, help="Only jobs with this label; repeat for more."),
    ] = None,
    created_from: CreatedFrom = None,
    created_until: CreatedUntil = None,
    limit: LimitOption = 50,
    cursor: CursorOption = None,
) -> None:
    """List jobs, newest first."""
    page = session.client.list(
        state=state or None,
        kind=kind,
        model=model,
        recipe=recipe,
        queue=queue,
        batch=batch,
        reason=reason,
        label=label or None,
        created_from=created_from,
        created_until=created_until,
        limit=limit,
        cursor=cursor,
    )
    data = {"items": [job.raw for job in page.items], "next_cursor": page.next_cursor}
    session.show(data, lambda: print_table(COLUMNS, [row_of(job) for job in page.items]))
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
def layers(session: Session, job_id: JobArgument) -> None:
    """List a job's layers: what is done, how long each took, what went wrong. None before it is planned."""
    items = session.client.layers(job_id)
    session.show({"items": items}, lambda: print_table(LAYER_COLUMNS, [layer_row(each) for each in items]))


@app.command()
@on_service
def events(
    session: Session,
    job_id: JobArgument,
    after: Annotated[int, typer.Option(min=0, help="Only those after the event with this number.")] = 0,
) -> None:
    """Print what happens to a job as it happens, until it has ended: with -o json a line for each event."""
    with detaching(f"No longer following; the job goes on: duquant job wait {job_id}"):
        for event in session.client.events(job_id, after=after):
            print_event(event, session.output)


@app.command()
@on_service
def change(
    session: Session,
    job_id: JobArgument,
    priority: PriorityOption = None,
    run_at: RunAtOption = None,
    queue: QueueOption = None,
    deadline: Annotated[
        str | None,
        typer.Option(
            metavar="TIME", parser=_deadline_or_none, help="When it fails if it has not ended; none takes it away."
        ),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            parser=_label_or_none,
            help="A label; repeat for more. They replace all that it has; none takes them away.",
        ),
    ] = None,
    version: Annotated[
        int | None,
        typer.Option(min=0, help="Only if the job still has this version, as `job get -o json` prints it."),
    ] = None,
) -> None:
    """Change a waiting job's priority, start or queue, the deadline of one that has not ended, or any job's labels."""
    given: dict[str, Any] = {"priority": priority, "run_at": run_at, "queue": queue}
    changes = {name: value for name, value in given.items() if value is not None}
    if deadline is not None:
        changes["deadline_at"] = None if deadline == _NONE else deadline
    if label:
        if _NONE in label and len(label) > 1:
            raise BadInputError("--label none takes all labels away; give it alone")
        changes["labels"] = None if label == [_NONE] else _labels(label)
    if not changes:
        raise BadInputError("nothing is to be changed; give --priority, --run-at, --queue, --deadline or --label")
    report_job(session, session.client.change(job_id, version=version, **changes))


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
    jobs = counted(known["jobs"], "finished job")
    words = {
        "same_work": f"{jobs} with this model and recipe",
        "same_model": f"{jobs} with this model and other settings",
        "same_recipe": f"{jobs} with this recipe and other models",
        "shape": "the shape of the model",
        "none": None,
    }
    return words.get(known["basis"], f"{known['basis']}, {jobs}")
