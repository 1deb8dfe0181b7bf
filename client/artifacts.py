"""`duquant artifact`: finished checkpoints."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import DownloadColumn, TransferSpeedColumn

from client import calls
from client.connection import Session, on_service
from client.lists import (
    CreatedFrom,
    CreatedUntil,
    CursorOption,
    LimitOption,
    OfModel,
    OfRecipe,
    WithTag,
    read_time,
    tell_of_more,
)
from client.models import ArtifactInfo
from client.output import Format, note, number, print_pairs, print_table, print_text, show, size, with_output
from client.progress import bar_of
from client.push import push as send
from client.times import ago, at

app = typer.Typer(help="Finished checkpoints.", no_args_is_help=True)

ArtifactArgument = Annotated[str, typer.Argument(metavar="ARTIFACT", help="The id of the artifact or of its job.")]
TagArgument = Annotated[str, typer.Argument(metavar="TAG", help="Letters, digits, dots, dashes and underscores.")]


@app.command()
@on_service
def pull(
    session: Session,
    artifact_id: ArtifactArgument,
    out: Annotated[Path | None, typer.Option(help="The folder to fill. [default: the id]")] = None,
    parallel: Annotated[int, typer.Option(min=1, max=32, help="Connections at a time.")] = 4,
) -> None:
    """Fetch a finished checkpoint, every file verified. Run it again to go on after a break."""
    with bar_of(DownloadColumn(), TransferSpeedColumn()) as bar:
        task = bar.add_task("fetching", total=None)

        def on_bytes(present: int, total: int) -> None:
            bar.update(task, completed=present, total=total)

        summary = session.client.pull(artifact_id, out or Path(artifact_id), parallel=parallel, on_bytes=on_bytes)
    data = {
        "out": str(summary.out),
        "files": summary.files,
        "size_bytes": summary.size_bytes,
        "fetched_bytes": summary.fetched_bytes,
    }
    pairs = {"artifact": summary.out, "files": summary.files, "size": size(summary.size_bytes)}
    note(f"{summary.files} files, {size(summary.size_bytes)}, all checksums match: {summary.out}")
    session.show(data, lambda: print_pairs(pairs))


@app.command("list")
@on_service
def list_artifacts(
    session: Session,
    model: OfModel = None,
    recipe: OfRecipe = None,
    tag: WithTag = None,
    created_from: CreatedFrom = None,
    created_until: CreatedUntil = None,
    limit: LimitOption = 50,
    cursor: CursorOption = None,
) -> None:
    """List artifacts, newest first."""
    filters = {"model": model, "recipe": recipe, "tag": tag}
    period = {"created_from": created_from, "created_until": created_until}
    page = session.client.run(calls.list_artifacts(**filters, **period, limit=limit, cursor=cursor))
    rows = [
        (
            each.id,
            each.model_name,
            each.recipe_name,
            size(each.size_bytes),
            _measured(each),
            ",".join(each.tags),
            ago(each.raw["created_at"]),
        )
        for each in page.items
    ]
    columns = ("artifact", "model", "recipe", "size", "perplexity", "tags", "made")
    session.show(page.raw, lambda: print_table(columns, rows))
    tell_of_more("artifact list", page.next_cursor)


@app.command()
@on_service
def get(session: Session, artifact_id: ArtifactArgument) -> None:
    """Show an artifact."""
    _report(session, session.client.run(calls.get_artifact(artifact_id)))


@app.command()
@on_service
def files(session: Session, artifact_id: ArtifactArgument) -> None:
    """List the files of an artifact; -o json has links to them that work for some minutes."""
    found = session.client.artifact(artifact_id)
    rows = [(file.name, size(file.size_bytes), file.sha256) for file in found.files]
    session.show(found.raw, lambda: print_table(("file", "size", "sha256"), rows))


@app.command()
@on_service
def compare(
    session: Session,
    a: Annotated[str, typer.Argument(metavar="A", help="An artifact.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another.")],
) -> None:
    """Show how two artifacts differ: recipes, measures and files."""
    answer = session.client.run(calls.compare_artifacts(a, b))
    sides = (answer["a"], answer["b"])
    rows: list[tuple[object, ...]] = [
        (label, *(each[name] for each in sides))
        for label, name in (("model", "model_name"), ("recipe", "recipe_name"))
        if sides[0][name] != sides[1][name]
    ]
    rows += [(each["field"], *_cells(each)) for each in (*answer["recipe"], *answer["measures"])]
    files = answer["files"]
    rows += [("files that are equal", files["same"], files["same"])]
    rows += [("files that differ", len(files["changed"]), len(files["changed"]))]
    rows += [("files of one only", len(files["only_a"]), len(files["only_b"]))]

    def people() -> None:
        print_table(("", sides[0]["id"], sides[1]["id"]), rows)
        for label, names in (
            ("differ", files["changed"]),
            (f"only {sides[0]['id']}", files["only_a"]),
            (f"only {sides[1]['id']}", files["only_b"]),
        ):
            for name in names:
                print_text(f"{label}: {name}")

    session.show(answer, people)


@app.command()
@on_service
def tag(session: Session, artifact_id: ArtifactArgument, name: TagArgument) -> None:
    """Give an artifact a tag; the artifact that had it loses it."""
    _report(session, session.client.run(calls.tag_artifact(artifact_id, name)))


@app.command()
@on_service
def untag(session: Session, artifact_id: ArtifactArgument, name: TagArgument) -> None:
    """Take a tag away."""
    _report(session, session.client.run(calls.untag_artifact(artifact_id, name)))


@app.command()
@on_service
def keep(
    session: Session,
    artifact_id: ArtifactArgument,
    until: Annotated[
        str | None,
        typer.Option(
            metavar="TIME", parser=read_time, help="2027-01-31T00:00:00Z, +90d. [default: for ever]", show_default=False
        ),
    ] = None,
) -> None:
    """Say when an artifact may be deleted."""
    _report(session, session.client.run(calls.keep_artifact(artifact_id, until)))


@app.command()
@on_service
def delete(
    session: Session,
    artifact_id: ArtifactArgument,
    force: Annotated[bool, typer.Option("--force", help="Delete it also when it has tags.")] = False,
) -> None:
    """Delete an artifact."""
    session.client.run(calls.delete_artifact(artifact_id, force=force))
    session.show({"deleted": artifact_id}, lambda: print_text(f"{artifact_id} is deleted"))


def _cells(difference: Mapping[str, Any]) -> tuple[object, object]:
    """Return both values of a difference, for people."""

    def cell(value: Any) -> object:
        return size(value) if difference["field"] == "size_bytes" and value is not None else number(value)

    return cell(difference["a"]), cell(difference["b"])


def _measured(artifact: ArtifactInfo) -> str | None:
    perplexity = artifact.evaluations[0].perplexity if artifact.evaluations else None
    return None if perplexity is None else f"{perplexity:.2f}"


def _report(session: Session, artifact: ArtifactInfo) -> None:
    pairs = {
        "artifact": artifact.id,
        "job": artifact.job_id,
        "model": artifact.model_name,
        "recipe": artifact.recipe_name,
        "size": size(artifact.size_bytes),
        "perplexity": _measured(artifact),
        "tags": ", ".join(artifact.tags) or None,
        "outdated by": artifact.outdated,
        "kept until": at(artifact.expires_at),
        "made": at(artifact.raw["created_at"]),
    }
    session.show(artifact.raw, lambda: print_pairs(pairs))


@app.command()
@with_output
def push(
    folder: Annotated[Path, typer.Argument(help="The folder of a checkpoint, as `artifact pull` makes it.")],
    to: Annotated[str, typer.Option(help="s3://BUCKET/PREFIX or hub:OWNER/NAME.")],
    endpoint: Annotated[str | None, typer.Option(help="URL of an S3 server that is not AWS.")] = None,
    allow_hub: Annotated[bool, typer.Option("--allow-hub", help="Let checkpoints go to the Hugging Face hub.")] = False,
    *,
    output: Format,
) -> None:
    """Send a checkpoint to a bucket of your own or to the hub, with your credentials on this machine."""
    with bar_of(DownloadColumn()) as bar:
        task = bar.add_task("sending", total=None)
        summary = send(
            folder,
            to,
            endpoint=endpoint,
            allow_hub=allow_hub,
            on_bytes=lambda present, total: bar.update(task, completed=present, total=total),
        )
    pairs = {"to": summary.to, "files": summary.files, "size": size(summary.size_bytes)}
    show({**asdict(summary)}, output, lambda: print_pairs(pairs))
