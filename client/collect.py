"""`duquant gc`: collects the garbage of the service that `duquant up` runs on this machine."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from client.connection import default_home
from client.errors import EXIT_FAILED, EXIT_OK, EXIT_UNAVAILABLE, BadInputError, ClientError, UnavailableError
from client.home import is_up, load_secrets, read_address, storage_environment
from client.output import Format, note, print_pairs, show, size, with_output


@with_output
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Delete nothing; only say what would be deleted.")] = False,
    home: Annotated[Path | None, typer.Option(help="Folder of `duquant up`. [default: ~/.local/share/duquant]")] = None,
    *,
    output: Format,
) -> int:
    """Delete what nobody needs any more, while `duquant up` runs; exit code 1 when something could not be judged."""
    folder = (home or default_home()).expanduser().resolve()
    report = collect(folder, dry_run=dry_run)
    pairs = {
        "expired artifacts": len(report["artifacts_expired"]),
        "expired, but kept": len(report["artifacts_kept"]) or None,
        "objects": len(report["objects"]),
        "size": size(report["size_bytes"]),
        "unfinished uploads": len(report["uploads"]),
        "old jobs": len(report["jobs"]),
        "not judged": len(report["problems"]) or None,
    }
    note("would be deleted:" if dry_run else "deleted:")
    show(report, output, lambda: print_pairs(pairs))
    for problem in report["problems"]:
        note(f"not judged, and left alone: {problem}")
    return EXIT_FAILED if report["problems"] else EXIT_OK


def collect(home: Path, *, dry_run: bool) -> Mapping[str, Any]:
    """Run the collector on the home of a running `duquant up`; return its report.

    Raises:
        UnavailableError: no `duquant up` runs there, or its parts do not answer.
        BadInputError: a setting of the collector is wrong.
        ClientError: it failed.
    """
    endpoint = read_address(home).get("s3_endpoint")
    if endpoint is None or not is_up(home):
        raise UnavailableError(f"no `duquant up` runs in {home}; start it first, or name its --home")
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("DUQUANT_") or name.startswith(("DUQUANT_GC_", "DUQUANT_LOG_"))
    }
    env = {**inherited, **storage_environment(home, load_secrets(home), endpoint)}
    command = [sys.executable, "-m", "infra.gc", *(["--dry-run"] if dry_run else [])]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    try:
        report: Mapping[str, Any] = json.loads(done.stdout)
    except ValueError:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        kinds = {2: BadInputError, EXIT_UNAVAILABLE: UnavailableError}
        raise kinds.get(done.returncode, ClientError)(lines[-1].removeprefix("error: ")) from None
    return report
