"""Types of command-line options, so that a run of hours does not end on what a look could have told."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

from duquant.errors import DuQuantError
from duquant.models.references import resolve_model


def count(text: str) -> int:
    """Read a whole number above 0."""
    return _whole(text, least=1)


def seed(text: str) -> int:
    """Read a seed, 0 or more."""
    return _whole(text, least=0)


def model(text: str) -> str:
    """Return a reference to a model that is here; one that has to be converted is, for good."""
    with told():
        resolve_model(text)
    return text


@contextmanager
def told() -> Iterator[None]:
    """Let argparse say what is wrong with an option's value."""
    try:
        yield
    except DuQuantError as err:
        raise argparse.ArgumentTypeError(str(err)) from err


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} on")
    return value
