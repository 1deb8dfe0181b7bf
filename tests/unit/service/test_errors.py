"""The catalogue of problems and its page in the documentation."""

import re
from pathlib import Path

from service.errors import CATALOGUE, pointer_of

_PAGE = Path(__file__).parents[3] / "docs" / "reference" / "errors.md"


def test_the_page_lists_exactly_the_problems_that_exist() -> None:
    rows = re.findall(r"^\| `([a-z-]+)` \| (\d{3}) \|", _PAGE.read_text(), flags=re.MULTILINE)
    assert {name: int(status) for name, status in rows} == {name: status for name, (status, _) in CATALOGUE.items()}


def test_pointers_escape_what_rfc_6901_says() -> None:
    assert pointer_of(["a/b", "c~d", 0]) == "/a~1b/c~0d/0"
    assert pointer_of([]) == ""
