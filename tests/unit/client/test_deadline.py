import itertools
import time

from client.sdk import _until


def test_keep_alives_do_not_outlive_a_deadline():
    deadline = time.monotonic() + 0.05
    lines = list(_until(deadline, itertools.repeat(": keep-alive")))
    assert lines, "it ended before its time"
    assert time.monotonic() >= deadline


def test_without_a_deadline_every_line_comes_through():
    assert list(_until(None, iter(["a", "", "b"]))) == ["a", "", "b"]
