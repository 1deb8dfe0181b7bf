"""The commands of `duquant`. Exit codes and JSON are documented in docs/reference/cli.md and do not change."""

import os
import sys
from collections.abc import Mapping, Sequence
from typing import cast

import typer

from client import (
    account,
    artifacts,
    batches,
    collect,
    demo,
    doctor,
    evaluations,
    jobs,
    keys,
    local,
    operations,
    profiles,
    projects,
    recipes,
    texts,
    up,
    webhooks,
)
from client.errors import (
    EXIT_BAD_INPUT,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    ApiError,
    ClientError,
)
from client.output import note
from duquant.errors import (
    ArtifactError,
    CalibrationError,
    ConfigError,
    DuQuantError,
    EvaluationError,
    ShapeError,
    SourceError,
    UnsupportedModelError,
)

app = typer.Typer(
    name="duquant",
    help="Turn Hugging Face language models into packed INT4 checkpoints.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(jobs.app, name="job")
app.add_typer(batches.app, name="batch")
app.add_typer(artifacts.app, name="artifact")
app.add_typer(evaluations.app, name="evaluation")
app.add_typer(texts.app, name="text")
app.add_typer(recipes.app, name="recipe")
app.add_typer(operations.models, name="model")
app.add_typer(operations.queues, name="queue")
app.add_typer(operations.workers, name="worker")
app.add_typer(projects.app, name="project")
app.add_typer(keys.app, name="key")
app.add_typer(webhooks.app, name="webhook")
app.add_typer(account.audit, name="audit")
app.add_typer(profiles.app, name="profile")
app.command()(up.up)
app.command()(collect.gc)
app.command()(local.quantize)
app.command()(local.verify)
app.command("eval")(local.evaluate)
app.command()(local.generate)
app.command()(account.quota)
app.command()(account.usage)
app.command()(operations.failures)
app.command()(account.status)
app.command()(doctor.doctor)
app.command()(demo.demo)

# Some versions of typer carry click inside, others import it; the base of its errors has no name common to both.
_UsageError = cast(
    "type[typer.BadParameter]", next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")
)
_BAD_INPUT = (ConfigError, ShapeError, SourceError, UnsupportedModelError, CalibrationError, EvaluationError)


def run_app(arguments: Sequence[str]) -> int:
    """Run a command; return the exit code. Every error is one line on stderr."""
    try:
        # By this name also in `python -m client.main --help`.
        status = app(list(arguments), prog_name="duquant", standalone_mode=False)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            return EXIT_BAD_INPUT
        return _fail(error.format_message(), EXIT_BAD_INPUT)
    except (typer.Abort, EOFError):
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone; Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except ApiError as error:
        return _fail(_api_text(error), error.exit_code)
    except ClientError as error:
        return _fail(str(error), error.exit_code)
    except DuQuantError as error:
        bad_input = isinstance(error, _BAD_INPUT) and not isinstance(error, ArtifactError)
        return _fail(str(error), EXIT_BAD_INPUT if bad_input else EXIT_FAILED)
    except ImportError as error:
        return _fail(f"a part is not installed ({error}); pip install 'duquant[torch]'", EXIT_FAILED)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", EXIT_FAILED)
    return status if isinstance(status, int) else EXIT_OK


def _api_text(error: ApiError) -> str:
    # What is wrong with the whole of a request has an empty pointer, and names what it means.
    fields = [(_where(each.get("pointer") or "", error.options), each.get("detail") or error) for each in error.errors]
    text = "; ".join(f"{where}: {detail}" if where else str(detail) for where, detail in fields) or str(error)
    return f"{text} (request {error.request_id})" if error.status >= 500 and error.request_id else text


def _where(pointer: str, options: Mapping[str, str]) -> str:
    """Return the option that has filled a field, or the pointer to one that no option has."""
    field = pointer.removeprefix("/")
    while field:
        if field in options:
            return options[field]
        field = field.rpartition("/")[0]
    return pointer


def _fail(message: str, status: int) -> int:
    line = " ".join(message.split())
    note(f"duquant: error: {line}")
    return status
