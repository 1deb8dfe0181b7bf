"""A text that no recipe was tuned on or is calibrated on: quotations from Debian's package `fortunes`.

It is neither encyclopaedia, nor documentation, nor questions: sayings, verse, dialogue and jokes of many people.
"""

from itertools import chain, zip_longest
from pathlib import Path

NAME = "Debian's fortunes"
FOLDER = Path("/usr/share/games/fortunes")
_COLLECTIONS = ("law", "people", "science", "wisdom")
_BETWEEN = "\n%\n"


def quotations(folder: Path = FOLDER) -> str:
    """Return one of each collection in turn; nothing where the package is not installed."""
    files = [folder / name for name in _COLLECTIONS]
    if not all(file.is_file() for file in files):
        return ""
    collections = [file.read_text(encoding="utf-8").split(_BETWEEN) for file in files]
    in_turn = chain.from_iterable(zip_longest(*collections, fillvalue=""))
    return "\n\n".join(text.strip() for text in in_turn if text.strip()) + "\n"
