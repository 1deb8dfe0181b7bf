"""The catalogue of problems."""

from http import HTTPStatus

import pytest

from service.catalogue import CATALOGUE
from service.errors import pointer_of, responses


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_problem_says_when_it_comes_and_what_to_do(name: str) -> None:
    kind = CATALOGUE[name]
    assert HTTPStatus(kind.status) >= HTTPStatus.BAD_REQUEST
    assert all((kind.title, kind.when, kind.remedy))
    example = responses(name)[kind.status]["content"]["application/problem+json"]["examples"][name]["value"]
    assert (example["type"], example["status"]) == (f"urn:duquant:problem:{name}", kind.status)


def test_pointers_escape_what_rfc_6901_says() -> None:
    assert pointer_of(["a/b", "c~d", 0]) == "/a~1b/c~0d/0"
    assert pointer_of([]) == ""
