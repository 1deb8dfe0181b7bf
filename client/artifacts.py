"""`duquant artifact`: finished checkpoints."""

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import DownloadColumn, TransferSpeedColumn

from client.connection import Session, on_service
from client.output import note, print_pairs, size
from client.progress import bar_of

app = typer.Typer(help="Finished checkpoints.", no_args_is_help=True)

ArtifactArgument = Annotated[str, typer.Argument(metavar="ARTIFACT", help="The id of the artifact or of its job.")]


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
