"""`duquant evaluation`: measure artifacts and models on a running service."""

from pathlib import Path
from typing import Annotated, Any

import typer

from client import calls
from client.connection import Session, on_service
from client.errors import BadInputError
from client.job_views import check_job, report_job
from client.jobs import PriorityOption, TimeoutOption, WaitFlag, ignored_options
from client.lists import CursorOption, LimitOption, OfModel, tell_of_ignored, tell_of_more
from client.measures import FewshotOption, QuestionsOption, SpeedFlag, TasksOption, TextOption, measuring
from client.models import Evaluation
from client.output import note, number, print_pairs, print_table, print_text, size
from client.progress import follow_job
from client.scores import print_scores
from client.times import ago, at

app = typer.Typer(help="Measure artifacts and models.", no_args_is_help=True)


@app.command()
@on_service
def submit(
    session: Session,
    what: Annotated[str, typer.Argument(help="The id of an artifact or of its job, or a model as demo:NAME.")],
    text: TextOption = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens in a window.")] = None,
    windows: Annotated[int | None, typer.Option(help="Windows from the start of the text; 0 for all of it.")] = None,
    tasks: TasksOption = None,
    num_fewshot: FewshotOption = None,
    limit: QuestionsOption = None,
    speed: SpeedFlag = False,
    priority: PriorityOption = None,
    force: Annotated[bool, typer.Option("--force", help="Measure again even if this was measured already.")] = False,
    wait_for_it: WaitFlag = False,
    timeout: TimeoutOption = None,
) -> None:
    """Submit an evaluation of an artifact or of an unquantized model: perplexity, accuracy on tasks, speed."""
    settings = measuring(
        session,
        text,
        seq_len=seq_len,
        windows=windows,
        tasks=tasks,
        num_fewshot=num_fewshot,
        limit=limit,
        speed=speed,
    )
    target: dict[str, Any] = {"model": what} if ":" in what else {"artifact": what}
    if priority is not None:
        settings["priority"] = priority
    job = session.client.run(calls.submit_evaluation(**target, force=force, **settings))
    note(f"{'found' if job.reused else 'submitted'} {job.id} ({job.state})")
    if job.reused:
        tell_of_ignored(ignored_options(job, priority=priority), job.id)
    if not wait_for_it:
        report_job(session, job, reused=job.reused)
        return
    job = follow_job(session.client, job.id, timeout)
    if job.state == "succeeded":
        _report(session, session.client.run(calls.get_evaluation(job.id)))
    else:
        report_job(session, job)
    check_job(job)


@app.command("list")
@on_service
def list_evaluations(
    session: Session,
    artifact: Annotated[str | None, typer.Option(help="Only what was measured on this artifact.")] = None,
    model: OfModel = None,
    limit: LimitOption = 50,
    cursor: CursorOption = None,
) -> None:
    """List what was measured, newest first."""
    page = session.client.run(calls.list_evaluations(artifact=artifact, model=model, limit=limit, cursor=cursor))
    rows = [
        (
            each.id,
            each.model_name,
            _what(each),
            number(each.perplexity),
            each.metrics.get("windows"),
            ago(each.raw["created_at"]),
        )
        for each in page.items
    ]
    columns = ("evaluation", "model", "artifact", "perplexity", "windows", "made")
    session.show(page.raw, lambda: print_table(columns, rows))
    tell_of_more("evaluation list", page.next_cursor)


@app.command()
@on_service
def get(
    session: Session,
    name: Annotated[str, typer.Argument(metavar="EVALUATION", help="The id of the evaluation or of its job.")],
) -> None:
    """Show what was measured."""
    _report(session, session.client.run(calls.get_evaluation(name)))


@app.command()
@on_service
def report(
    session: Session,
    name: Annotated[str, typer.Argument(metavar="EVALUATION", help="The id of the evaluation or of its job.")],
    out: Annotated[Path | None, typer.Option(help="The file to write. [default: EVALUATION.html]")] = None,
) -> None:
    """Fetch the report: a page of HTML with tables and plots."""
    target = out or Path(f"{name}.html")
    page = session.client.report(name)
    try:
        target.write_bytes(page)
    except OSError as error:
        raise BadInputError(f"cannot write {target}: {error.strerror}") from error
    session.show({"out": str(target), "size_bytes": len(page)}, lambda: print_pairs({"report": target}))


def _what(evaluation: Evaluation) -> str:
    """Return the artifact; or the job whose artifact missed its quality gate."""
    return evaluation.artifact_id or evaluation.raw.get("artifact_job_id") or "unquantized"


def _report(session: Session, evaluation: Evaluation) -> None:
    metrics = evaluation.metrics
    pairs = {
        "evaluation": evaluation.id,
        "model": evaluation.model_name,
        "artifact": _what(evaluation),
        "perplexity": number(evaluation.perplexity),
        "tokens": metrics.get("tokens"),
        "windows": metrics.get("windows"),
        "tokens per second": number(metrics.get("tokens_per_second")),
        "model size": size(metrics["model_bytes"]) if "model_bytes" in metrics else None,
        "made": at(evaluation.raw["created_at"]),
        "report": "yes" if evaluation.raw.get("has_report") else None,
    }

    def people() -> None:
        print_pairs(pairs)
        for name, part in evaluation.raw.get("parts", {}).items():
            if part["state"] != "done":
                print_text(f"{name}: {part.get('error') or 'not measured'}")
        print_scores(metrics)

    session.show(evaluation.raw, people)
