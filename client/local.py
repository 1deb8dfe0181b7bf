"""`duquant quantize | verify | eval | generate`: the algorithm on this machine, without the service.

The algorithm library is imported inside each command, so that the rest of the command line starts without torch.
"""

import json
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import TimeElapsedColumn, TimeRemainingColumn

from client.errors import EXIT_FAILED, EXIT_OK, BadInputError
from client.output import (
    Format,
    chatter,
    duration,
    note,
    print_pairs,
    print_text,
    show,
    size,
    with_output,
)
from client.progress import LAYERS_COLUMN, bar_of
from client.recipes import load_recipe
from client.scores import print_scores
from duquant.config import DEFAULT_PRESET, TextSource, with_calibration
from duquant.errors import DuQuantError
from duquant.evaluation.plan import EvaluationPlan, PerplexityConfig, SpeedConfig, TaskConfig

DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="CPU threads. [default: all]")]
HubOption = Annotated[bool, typer.Option("--allow-hub", help="Let models come from the Hugging Face hub.")]


def parse_text(text: str, *, default_part: str) -> TextSource:
    """Read a text argument: a file's path, or builtin:NAME[:PART].

    Raises:
        BadInputError: there is no such file.
        ConfigError: there is no such built-in text, or part of it.
    """
    kind, colon, rest = text.partition(":")
    if colon and kind == "builtin":
        name, _, part = rest.partition(":")
        return TextSource(kind="builtin", name=name, part=part or default_part)  # type: ignore[arg-type]  # checked there
    path = Path(text).expanduser()
    if not path.is_file():
        raise BadInputError(
            f"there is no text file {text!r}; give a file, builtin:pydoc-topics or builtin:conversations"
        )
    return TextSource(kind="file", name=str(path.resolve()))


def _silence_transformers() -> None:
    """Keep transformers' loading bars out of our own lines."""
    from transformers.utils import logging

    logging.disable_progress_bar()


@with_output
def quantize(
    model: Annotated[str, typer.Argument(help="demo:smollm2-135m, a folder, or hub:OWNER/NAME@COMMIT.")],
    out: Annotated[Path, typer.Option(help="The folder to make.")],
    recipe: Annotated[str, typer.Option(help="A preset, or a recipe file (.json).")] = DEFAULT_PRESET,
    calibration: Annotated[str | None, typer.Option(help="A text or JSONL file, or builtin:NAME[:PART].")] = None,
    samples: Annotated[int | None, typer.Option(help="Windows of calibration text.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens in a window.")] = None,
    input_mode: Annotated[
        str | None, typer.Option(help="What layers are calibrated on: fp, quantized or staged:S.")
    ] = None,
    refine_passes: Annotated[
        int | None, typer.Option(help="Further passes, on what the quantized network gives.")
    ] = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the artifact that is in the folder.")] = False,
    allow_hub: HubOption = False,
    *,
    output: Format,
) -> None:
    """Quantize a model into a packed checkpoint."""
    source = None if calibration is None else parse_text(calibration, default_part="calibration")
    chosen = with_calibration(load_recipe(recipe), source=source, samples=samples, seq_len=seq_len)
    modes: dict[str, Any] = {"input_mode": input_mode, "refine_passes": refine_passes}
    chosen = replace(chosen, **{name: value for name, value in modes.items() if value is not None})
    _check_out(out, force=force)
    # After the checks: importing torch takes seconds, and a typing error should not cost them.
    from duquant.pipeline import quantize_model

    _silence_transformers()

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the half-made folder is removed then, too
    target = out.with_name(f".{out.name}.new") if out.exists() and force else out
    if target is not out:
        shutil.rmtree(target, ignore_errors=True)
    with _layer_bar() as report:
        summary = quantize_model(
            model, target, chosen, device=device, threads=threads, allow_hub=allow_hub, on_progress=report
        )
    if target is not out:
        shutil.rmtree(out)
        target.rename(out)
    pairs = {
        "artifact": out,
        "layers": summary.layers,
        "size": size(summary.size_bytes),
        "time": duration(summary.seconds),
        "peak memory": size(summary.peak_rss_bytes),
    }
    data = {**asdict(summary), "artifact": str(out), "model": model, "recipe": chosen.name}
    show(data, output, lambda: print_pairs(pairs))


def _check_out(out: Path, *, force: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not force:
        raise BadInputError(f"{out} exists; choose another --out, or replace it with --force")
    # --force replaces artifacts; a mistyped folder of somebody's own must survive it.
    if not out.is_dir() or out.is_symlink() or not _is_artifact(out):
        raise BadInputError(f"{out} is not an artifact of ours; --force does not replace it")


def _is_artifact(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("format") == "duquant"


@contextmanager
def _layer_bar() -> Iterator[Callable[[Any], None]]:
    """Show the library's progress on stderr: a bar for a person, else a line for each phase."""
    said = ""
    with bar_of(LAYERS_COLUMN, TimeElapsedColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task("starting", total=None)

        def report(progress: Any) -> None:
            nonlocal said
            bar.update(task, description=progress.phase, completed=progress.done, total=progress.total or None)
            if not chatter.is_terminal and progress.phase != said:
                said = progress.phase
                note(f"{progress.phase} ...")

        yield report


@with_output
def verify(artifact: Annotated[Path, typer.Argument(help="The artifact's folder.")], *, output: Format) -> int:
    """Check an artifact against its manifest; exit code 1 when anything differs."""
    if not artifact.is_dir():
        raise BadInputError(f"there is no folder {artifact}")
    from duquant.artifact import verify as check

    report = check(artifact)
    words = f"{artifact} is whole: {report.files} files, as the manifest says"
    if not report.ok:
        words = "\n".join([f"{artifact} is damaged:", *(f"  {problem}" for problem in report.problems)])
    data = {"artifact": str(artifact), "ok": report.ok, "files": report.files, "problems": report.problems}
    show(data, output, lambda: print_text(words))
    return EXIT_OK if report.ok else EXIT_FAILED


@with_output
def evaluate(
    model: Annotated[str, typer.Argument(help="An artifact, a model folder, or demo:smollm2-135m.")],
    text: Annotated[str, typer.Option(help="A text or JSONL file, builtin:NAME[:PART], or none.")] = (
        "builtin:pydoc-topics:evaluation"
    ),
    seq_len: Annotated[int, typer.Option(min=8, help="Tokens in a window.")] = 2048,
    windows: Annotated[
        int | None, typer.Option(min=1, help="Windows, from the start of the text. [default: all]")
    ] = 16,
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="A task of lm-eval (piqa), or a task file (.yaml, .jsonl). Repeat for more."),
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Solved examples before each question. [default: the task's]")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each task. [default: all]")] = None,
    speed: Annotated[bool, typer.Option("--speed", help="Time the kernels beside bfloat16.")] = False,
    speed_seconds: Annotated[float, typer.Option(min=1, help="About how long the timing may take.")] = 60.0,
    report: Annotated[Path | None, typer.Option(help="A folder for a report with plots.")] = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    allow_hub: HubOption = False,
    *,
    output: Format,
) -> None:
    """Measure perplexity on a text, accuracy on tasks, and speed."""
    plan = EvaluationPlan(
        perplexity=None
        if text == "none"
        else PerplexityConfig(text=parse_text(text, default_part="evaluation"), seq_len=seq_len, windows=windows),
        tasks=tuple(TaskConfig.named(name, num_fewshot=num_fewshot, limit=limit) for name in tasks or ()),
        speed=SpeedConfig(seconds=speed_seconds) if speed else None,
    )
    _check_task_files(plan)
    from duquant.evaluation.run import evaluate_plan

    _silence_transformers()
    measured: dict[str, Any] = {}
    with chatter.status("evaluating") as status:

        def progress(phase: str, done: int, total: int) -> None:
            status.update(f"evaluating: {done}/{total} {phase}")

        try:
            evaluate_plan(
                model,
                plan,
                device=device,
                threads=threads,
                allow_hub=allow_hub,
                on_progress=progress,
                on_part=lambda _part, metrics: measured.update(metrics),
            )
        except DuQuantError:
            if measured:
                note(f"measured before the error: {json.dumps(measured)}")
            raise
    if report is not None:
        from duquant.evaluation.report import write_report

        files = write_report(report, {Path(model).name or model: measured}, title=f"Evaluation of {model}")
        note(f"written: {files[0]}")
    data = {**measured, "model": model, "text": text}
    show(data, output, lambda: _print_metrics(measured))


def _check_task_files(plan: EvaluationPlan) -> None:
    """Refuse a mistyped file before minutes are spent on what comes before it."""
    for task in plan.tasks:
        if task.kind == "file" and not Path(task.name).expanduser().is_file():
            raise BadInputError(f"there is no task file {task.name!r}")


def _print_metrics(metrics: Mapping[str, Any]) -> None:
    pairs: dict[str, Any] = {}
    if "perplexity" in metrics:
        pairs["perplexity"] = f"{metrics['perplexity']:.4f}"
        pairs |= {name: metrics[name] for name in ("tokens", "windows")}
    print_pairs({**pairs, "model size": size(metrics["model_bytes"]), "time": duration(metrics["seconds"])})
    print_scores(metrics)


@with_output
def generate(
    artifact: Annotated[Path, typer.Argument(help="The artifact's folder.")],
    prompt: Annotated[str, typer.Option(help="How the text begins.")] = "The capital of France is",
    max_new_tokens: Annotated[int, typer.Option(min=1, max=4096, help="Tokens to generate.")] = 32,
    seed: Annotated[int | None, typer.Option(help="Sample with this seed. [default: the likeliest words]")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto to spread it over the devices.")] = "cpu",
    *,
    output: Format,
) -> None:
    """Generate text with a quantized model."""
    if not artifact.is_dir():
        raise BadInputError(f"there is no folder {artifact}")
    if not prompt.strip():
        raise BadInputError("--prompt is empty")
    from duquant.inference import generate_text

    _silence_transformers()

    with chatter.status("generating"):
        text = generate_text(artifact, prompt, max_new_tokens=max_new_tokens, seed=seed, device=device)
    show({"artifact": str(artifact), "prompt": prompt, "text": text}, output, lambda: print_text(text))
