"""`duquant job` and `duquant artifact`: work on a running service."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TransferSpeedColumn

from client.connection import KeyOption, UrlOption, connect
from client.errors import BadInputError, JobFailedError
from client.models import Job
from client.output import JsonFlag, chatter, duration, note, print_json, print_pairs, print_table, size
from client.recipes import is_file_name, read_json_file
from client.sdk import Client

app = typer.Typer(help="Jobs on a running service.", no_args_is_help=True)
artifacts = typer.Typer(help="Finished checkpoints.", no_args_is_help=True)

JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="The job's id.")]
TimeoutOption = Annotated[
    float | None, typer.Option("--timeout", min=0, help="Give up waiting after this many seconds (exit code 124).")
]


@app.command()
def submit(
    model: Annotated[str, typer.Argument(help="demo:NAME, local:NAME or hub:OWNER/NAME@COMMIT.")],
    recipe: Annotated[str | None, typer.Option(help="A preset, or a recipe file (.json).")] = None,
    calibration: Annotated[
        str | None, typer.Option(help="A text file below the server's text roots, or builtin:pydoc-topics[:PART].")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Windows of calibration text.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens in a window.")] = None,
    priority: Annotated[int | None, typer.Option(help="0 to 1000; lower numbers start first. [default: 100]")] = None,
    force: Annotated[bool, typer.Option("--force", help="Make the artifact again even if there is one.")] = False,
    wait_for_it: Annotated[bool, typer.Option("--wait", help="Follow the job until it has ended.")] = False,
    timeout: TimeoutOption = None,
    url: UrlOption = None,
    key: KeyOption = None,
    *,
    as_json: JsonFlag = False,
) -> None:
    """Submit a quantization job. The same work again returns the job that is there."""
    changes: dict[str, Any] = {"samples": samples, "seq_len": seq_len}
    if calibration is not None:
        changes["source"] = _text_source(calibration)
    changes = {name: value for name, value in changes.items() if value is not None}
    chosen: Any = recipe
    if recipe is not None and is_file_name(recipe):
        chosen = read_json_file(Path(recipe), "the recipe")
    with connect(url, key) as client:
        job = client.submit(model, chosen, calibration=changes or None, priority=priority, force=force)
        note(f"{'found' if job.reused else 'submitted'} {job.id} ({job.state})")
        if wait_for_it:
            reused = job.reused
            job = _follow(client, job.id, timeout)
            _report(job, as_json=as_json, reused=reused)
            _check(job)
            return
    _report(job, as_json=as_json, reused=job.reused)


def _text_source(text: str) -> dict[str, str]:
    kind, _, rest = text.partition(":")
    if kind == "builtin":
        name, _, part = rest.partition(":")
        return {"kind": kind, "name": name, "part": part or "calibration"}
    return {"kind": "file", "name": text}


@app.command("list")
def list_jobs(
    state: Annotated[str | None, typer.Option(help="Only jobs in this state.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=200, help="Most jobs to list.")] = 50,
    cursor: Annotated[str | None, typer.Option(help="next_cursor of the page before.")] = None,
    url: UrlOption = None,
    key: KeyOption = None,
    *,
    as_json: JsonFlag = False,
) -> None:
    """List jobs, newest first."""
    with connect(url, key) as client:
        page = client.list(state=state, limit=limit, cursor=cursor)
    if as_json:
        print_json({"items": [job.raw for job in page.items], "next_cursor": page.next_cursor})
        return
    rows = [
        (job.id, job.state, job.model, job.recipe_name, f"{job.phase} {job.done}/{job.total}" if job.total else "")
        for job in page.items
    ]
    print_table(("job", "state", "model", "recipe", "progress"), rows)
    if page.next_cursor is not None:
        note(f"more: duquant job list --cursor {page.next_cursor}")


@app.command()
def get(job_id: JobArgument, url: UrlOption = None, key: KeyOption = None, *, as_json: JsonFlag = False) -> None:
    """Show a job."""
    with connect(url, key) as client:
        _report(client.get(job_id), as_json=as_json)


@app.command()
def wait(
    job_id: JobArgument,
    timeout: TimeoutOption = None,
    url: UrlOption = None,
    key: KeyOption = None,
    *,
    as_json: JsonFlag = False,
) -> None:
    """Follow a job until it has ended. Ctrl-C stops following; the job goes on."""
    with connect(url, key) as client:
        job = _follow(client, job_id, timeout)
    _report(job, as_json=as_json)
    _check(job)


@app.command()
def cancel(job_id: JobArgument, url: UrlOption = None, key: KeyOption = None, *, as_json: JsonFlag = False) -> None:
    """Cancel a job; a running one stops at its worker's next beat."""
    with connect(url, key) as client:
        _report(client.cancel(job_id), as_json=as_json)


@artifacts.command()
def pull(
    job_id: JobArgument,
    out: Annotated[Path | None, typer.Option(help="The folder to fill. [default: the job's id]")] = None,
    parallel: Annotated[int, typer.Option(min=1, max=32, help="Files at a time.")] = 4,
    url: UrlOption = None,
    key: KeyOption = None,
    *,
    as_json: JsonFlag = False,
) -> None:
    """Fetch a finished checkpoint, every file verified. Run it again to go on after a break."""
    with connect(url, key) as client, _bar(DownloadColumn(), TransferSpeedColumn()) as bar:
        task = bar.add_task("fetching", total=None)

        def on_bytes(present: int, total: int) -> None:
            bar.update(task, completed=present, total=total)

        summary = client.pull(job_id, out or Path(job_id), parallel=parallel, on_bytes=on_bytes)
    if as_json:
        print_json(
            {
                "out": str(summary.out),
                "files": summary.files,
                "size_bytes": summary.size_bytes,
                "fetched_bytes": summary.fetched_bytes,
            }
        )
    else:
        note(f"{summary.files} files, {size(summary.size_bytes)}, all checksums match: {summary.out}")


@contextmanager
def _bar(*columns: Any) -> Iterator[Progress]:
    """A progress bar on stderr, gone when it is over; silent when nobody looks."""
    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        *columns,
        console=chatter,
        transient=True,
        disable=not chatter.is_terminal,
    )
    with progress:
        yield progress


def _follow(client: Client, job_id: str, timeout: float | None) -> Job:
    """Wait with a progress bar; where nobody looks, with a line for each change."""
    said = ""
    try:
        with _bar(TextColumn("{task.fields[done]}"), TextColumn("{task.fields[left]}")) as bar:
            task = bar.add_task("waiting", total=None, done="", left="")

            def on_update(job: Job) -> None:
                nonlocal said
                left = "" if job.eta_seconds is None else f"{duration(job.eta_seconds)} left"
                if job.layers_total:
                    done, total, done_text = job.layers_done, job.layers_total, "layers"
                else:
                    done, total, done_text = job.done, job.total, ""
                counted = f"{done}/{total} {done_text}".strip() if total else ""
                title = _title(job)
                bar.update(task, description=title, completed=done, total=total or None, done=counted, left=left)
                line = " ".join(part for part in (title, counted) if part)
                if not chatter.is_terminal and line != said:
                    said = line
                    note(" ".join(part for part in (line, left) if part))

            return client.wait(job_id, timeout_s=timeout, on_update=on_update)
    except KeyboardInterrupt:
        note(f"\nNo longer following; the job goes on: duquant job wait {job_id}")
        raise


def _title(job: Job) -> str:
    if job.state == "queued" and job.queue_position is not None:
        return f"queued, place {job.queue_position}"
    return f"{job.state}: {job.phase}" if job.state == "running" and job.phase else job.state


def _report(job: Job, *, as_json: bool, reused: bool | None = None) -> None:
    if as_json:
        print_json(job.raw if reused is None else {**job.raw, "reused": reused})
        return
    print_pairs(
        {
            "job": job.id,
            "state": job.state,
            "reason": job.reason,
            "detail": job.detail,
            "model": job.model,
            "recipe": job.recipe_name,
            "phase": f"{job.phase} {job.done}/{job.total}" if job.phase else None,
            "layers": f"{job.layers_done}/{job.layers_total}" if job.layers_total else None,
            "place in the queue": job.queue_position,
            "time left": None if job.eta_seconds is None else duration(job.eta_seconds),
            "result": json.dumps(job.result) if job.result else None,
        }
    )


def _check(job: Job) -> None:
    if job.state == "failed":
        raise JobFailedError(f"{job.id} failed ({job.reason}): {job.detail}")
    if job.state == "cancelled":
        raise JobFailedError(f"{job.id} was cancelled")
    if job.state != "succeeded":
        raise BadInputError(f"{job.id} ended as {job.state}, which this client does not know; upgrade it")
