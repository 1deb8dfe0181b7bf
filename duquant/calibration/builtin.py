"""Texts that are there without a file of one's own."""

from collections.abc import Callable, Mapping
from pathlib import Path

_CONVERSATIONS = Path(__file__).parent / "texts" / "conversations.txt"


def _pydoc_topics() -> str:
    """Return the English text that ships with every CPython: the language reference that help() prints."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _conversations() -> str:
    """Return questions and answers on everyday subjects, which duquant.calibration.conversations has written."""
    return _CONVERSATIONS.read_text(encoding="utf-8")


_TEXTS: Mapping[str, Callable[[], str]] = {"pydoc-topics": _pydoc_topics, "conversations": _conversations}


def builtin_text(name: str) -> str:
    """Return a text by its name in duquant.config.BUILTIN_TEXTS."""
    return _TEXTS[name]()
