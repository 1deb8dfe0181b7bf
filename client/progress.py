"""Bars on stderr for what takes time; where nobody looks, a line for each change."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from client.models import Job
from client.output import chatter, duration, note
from client.sdk import Client

LAYERS_COLUMN = TextColumn("{task.completed:.0f}/{task.total} layers")


@contextmanager
def bar_of(*columns: Any) -> Iterator[Progress]:
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


class Teller:
    """Shows how far something is: in a bar for a person, else a line whenever the words change."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task = bar.add_task("waiting", total=None, done="", left="")
        self._said = ""

    def tell(
        self, title: str, done: int, total: int, unit: str = "", left: str = "", *, words: str | None = None
    ) -> None:
        """Show it; `words` say how much is done where one number of one unit does not."""
        counted = (words or f"{done}/{total} {unit}").strip() if total else ""
        self._bar.update(self._task, description=title, completed=done, total=total or None, done=counted, left=left)
        line = " ".join(part for part in (title, counted) if part)
        if not chatter.is_terminal and line != self._said:
            self._said = line
            note(" ".join(part for part in (line, left) if part))


@contextmanager
def teller(detached: str) -> Iterator[Teller]:
    """A Teller; Ctrl-C says `detached`, since what was followed goes on."""
    with detaching(detached), bar_of(TextColumn("{task.fields[done]}"), TextColumn("{task.fields[left]}")) as bar:
        yield Teller(bar)


@contextmanager
def detaching(words: str) -> Iterator[None]:
    """Say on Ctrl-C that what was followed goes on."""
    try:
        yield
    except KeyboardInterrupt:
        note(f"\n{words}")
        raise


def follow_job(client: Client, job_id: str, timeout: float | None) -> Job:
    """Wait until a job has ended."""
    with teller(f"No longer following; the job goes on: duquant job wait {job_id}") as shown:

        def on_update(job: Job) -> None:
            left = "" if job.eta_seconds is None else f"{duration(job.eta_seconds)} left"
            if job.layers_total:
                shown.tell(_title(job), job.layers_done, job.layers_total, "layers", left)
            else:
                shown.tell(_title(job), job.done, job.total, "", left)

        return client.wait(job_id, timeout_s=timeout, on_update=on_update)


def _title(job: Job) -> str:
    if job.state == "queued" and job.queue_position is not None:
        return f"queued, place {job.queue_position}"
    return f"{job.state}: {job.phase}" if job.state == "running" and job.phase else job.state
