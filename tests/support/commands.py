"""What a command of the command line gave back."""

import json
from typing import Any


def data(answer: tuple[int, str, str], status: int = 0) -> Any:
    """Return what a command printed with --json: one line."""
    assert answer[0] == status, answer
    assert answer[1].count("\n") == 1, answer
    return json.loads(answer[1])
