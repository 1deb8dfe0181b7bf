"""How commands speak: data on stdout (a table, one line of JSON, or YAML), everything else on stderr."""

import functools
import inspect
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

_STEERING = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""C0 and C1 control characters, line and paragraph separators, and what turns the direction of writing."""
chatter = Console(stderr=True, highlight=False)
"""For people: progress, notes, errors."""


class Format(StrEnum):
    """How data is written on stdout."""

    TABLE = "table"
    JSON = "json"
    YAML = "yaml"


OutputOption = Annotated[
    Format | None,
    typer.Option("--output", "-o", help="How to print the data. [default: table]", show_default=False),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Short for -o json: one line of JSON on stdout.")]


def add_options(function: Callable[..., Any], replaced: str, options: Mapping[str, Any]) -> inspect.Signature:
    """Return the signature of a command whose parameter `replaced` is made from `options` instead of being one."""
    signature = inspect.signature(function, eval_str=True)
    kept = [each for name, each in signature.parameters.items() if name != replaced]
    extra = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=False if name == "as_json" else None, annotation=kind
        )
        for name, kind in options.items()
    ]
    return signature.replace(parameters=[*kept, *extra])


def with_output(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options -o and --json; it gets the chosen format as `output`."""

    @functools.wraps(function)
    def command(*arguments: Any, **options: Any) -> Any:
        output = chosen(options.pop("output"), as_json=options.pop("as_json"))
        return function(*arguments, **options, output=output)

    signature = add_options(function, "output", {"output": OutputOption, "as_json": JsonFlag})
    command.__signature__ = signature  # type: ignore[attr-defined]  # what inspect, and so typer, looks at
    command.__annotations__ = {name: each.annotation for name, each in signature.parameters.items()}
    return command


def chosen(output: Format | None, *, as_json: bool) -> Format:
    """Return the format that the two options ask for."""
    return output or (Format.JSON if as_json else Format.TABLE)


def show(value: object, output: Format, people: Callable[[], None]) -> None:
    """Print data in the chosen format; `people` prints the table."""
    match output:
        case Format.JSON:
            print_json(value)
        case Format.YAML:
            print_yaml(value)
        case Format.TABLE:
            people()


def print_json(value: object) -> None:
    """Print one line of JSON on stdout."""
    _write(json.dumps(value, default=str))


def print_yaml(value: object) -> None:
    """Print a document of YAML on stdout."""
    # Through JSON, so that both have the same types.
    plain = json.loads(json.dumps(value, default=str))
    _write(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=120).rstrip("\n"))


def visible(value: object, *, keep: str = "") -> str:
    r"""Return text in which nothing steers the terminal: control characters are written out, but for those to keep.

    Names and messages come from others: a line break in one would break a table, an escape could hide a line.

    >>> visible("k\x1b[31m\ny"), visible("a\tb", keep="\t"), visible("é\u202e")
    ('k\\x1b[31m\\ny', 'a\tb', 'é\\u202e')
    """
    return _STEERING.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], str(value))


def print_text(text: str) -> None:
    """Print a result for people on stdout; of its control characters only line breaks and tabs work."""
    _write(visible(text, keep="\n\t"))


def _write(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table for people on stdout. Nothing is cut or folded, so that `grep` and `cut` work on it."""
    cells = [list(columns), *([("" if cell is None else visible(cell)) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(columns))]
    for row in cells:
        print_text("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_pairs(values: Mapping[str, Any]) -> None:
    """Print names and values for people on stdout."""
    known = {visible(name): visible(value) for name, value in values.items() if value is not None}
    width = max(map(len, known), default=0)
    for name, value in known.items():
        print_text(f"{name:<{width}}  {value}")


def note(text: str) -> None:
    """Say something to a person."""
    chatter.print(visible(text, keep="\n"), markup=False, soft_wrap=True)


def counted(count: int, what: str) -> str:
    """Write how many of something there are.

    >>> counted(1, "job"), counted(0, "job")
    ('1 job', '0 jobs')
    """
    return f"{count} {what}{'' if count == 1 else 's'}"


def duration(seconds: float) -> str:
    """Write a length of time for people.

    >>> duration(4.2), duration(75), duration(7322)
    ('4.2 s', '1 min 15 s', '2 h 2 min')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def number(value: object) -> object:
    """Round a number for people to six digits; leave everything else as it is.

    >>> number(21.123456789), number(1234567), number("x")
    ('21.1235', 1234567, 'x')
    """
    return f"{value:.6g}" if isinstance(value, float) else value


def size(count: int) -> str:
    """Write a number of bytes for people.

    >>> size(1_500_000)
    '1.5 MB'
    """
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
