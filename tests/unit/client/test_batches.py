"""The batch file."""

import re
from pathlib import Path

import pytest

from client.batches import _may_succeed, _why, read_zoo

PAGE = Path(__file__).parents[3] / "docs" / "how-to" / "quantize-a-zoo.md"


def test_the_file_of_the_documentation_is_read(tmp_path: Path) -> None:
    block = re.search(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    (tmp_path / "zoo.yaml").write_text(block[1])
    (tmp_path / "mine.yaml").write_text("name: mine\nseed: 3\n")
    zoo = read_zoo(tmp_path / "zoo.yaml")
    assert zoo["models"][:3] == [
        {"source": "demo", "name": "smollm2-135m", "revision": None},
        {"source": "local", "prefix": "llama/"},
        {"tag": "prod-*"},
    ]
    assert zoo["recipes"] == ["rtn", "duquant", {"name": "mine", "seed": 3}]
    assert zoo["evaluate"] == {"windows": 16, "baseline": True}


@pytest.mark.parametrize(
    ("changes", "why", "is_worth_a_try"),
    [
        ({}, None, False),
        ({"state": "failed", "reason": "error", "detail": "a bug"}, "error: a bug", True),
        ({"state": "refused", "detail": "no such model"}, "no such model", False),
        ({"evaluation_state": "failed", "evaluation_reason": "bad_input"}, "evaluation: bad_input: too short", False),
        ({"evaluation_state": "failed", "evaluation_reason": "error"}, "evaluation: error: too short", True),
        ({"evaluation_state": "failed"}, "evaluation: too short", True),
        ({"evaluation_state": "cancelled"}, "evaluation: cancelled", True),
        ({"state": "cancelled", "evaluation_state": "cancelled"}, None, True),
    ],
    ids=str,
)
def test_a_row_says_why_it_or_its_evaluation_did_not_succeed(
    changes: dict[str, str], why: str | None, is_worth_a_try: bool
) -> None:
    plain = {"state": "succeeded", "reason": None, "detail": None, "evaluation_state": None}
    row = {**plain, "evaluation_detail": "too short", **changes}
    assert (_why(row), _may_succeed(row)) == (why, is_worth_a_try)
