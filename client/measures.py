"""Options that say what is measured and on which texts, and what they mean to the service."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from client import calls
from client.connection import Session

_TASK_FILES = (".yaml", ".yml", ".jsonl")
"""A task's name that ends in one of these is a file."""

TextOption = Annotated[
    str | None,
    typer.Option(help="The id of an uploaded text, a file below the server's roots, or builtin:NAME[:PART]."),
]
TasksOption = Annotated[
    list[str] | None,
    typer.Option(
        "--tasks",
        metavar="TASK",
        help="A task of lm-eval (piqa), a task file below the server's roots, or the id of an uploaded one. "
        "Repeat for more.",
    ),
]
FewshotOption = Annotated[
    int | None, typer.Option(min=0, help="Solved examples before each question. [default: the task's]")
]
QuestionsOption = Annotated[int | None, typer.Option("--limit", min=1, help="Questions of each task. [default: all]")]
SpeedFlag = Annotated[bool, typer.Option("--speed", help="Time the kernels beside bfloat16.")]


def measuring(
    session: Session,
    text: str | None,
    *,
    seq_len: int | None = None,
    windows: int | None = None,
    tasks: Sequence[str] | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    speed: bool = False,
) -> dict[str, Any]:
    """Return the settings of an evaluation that options name; what they leave out has the service's default."""
    settings: dict[str, Any] = {}
    if text == "none":
        settings["perplexity"] = False
    elif text is not None:
        settings["text"] = text_source(session, text, "evaluation")
    if seq_len is not None:
        settings["seq_len"] = seq_len
    if windows is not None:
        settings["windows"] = windows or None
    if tasks:
        asked = {"num_fewshot": num_fewshot, "limit": limit}
        settings["tasks"] = [{**_task(session, name), **asked} for name in tasks]
    if speed:
        settings["speed"] = {}
    return settings


def _task(session: Session, name: str) -> dict[str, str]:
    """Return what a task option means: an uploaded text, a task file below the server's roots, or lm-eval's name."""
    if _is_text_id(name):
        source = session.client.run(calls.get_text(name))["source"]
        return {"kind": source["kind"], "name": source["name"]}
    return {"kind": "file" if name.endswith(_TASK_FILES) else "hub", "name": name}


def text_source(session: Session, text: str, default_part: str) -> Mapping[str, str]:
    """Return what a text option means to the service: builtin:NAME[:PART], a text's id, or a file below its roots."""
    if _is_text_id(text):
        source: Mapping[str, str] = session.client.run(calls.get_text(text))["source"]
        return source
    kind, _, rest = text.partition(":")
    if kind == "builtin":
        name, _, part = rest.partition(":")
        return {"kind": kind, "name": name, "part": part or default_part}
    return {"kind": "file", "name": text}


def _is_text_id(name: str) -> bool:
    return name.startswith("text_") and "." not in name and "/" not in name
