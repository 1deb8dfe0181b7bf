"""How jobs and their events are shown, where it takes an older or a newer service to see it."""

import pytest

from client.job_views import _fact, _full


@pytest.mark.parametrize(
    ("queue", "used", "limit", "held"),
    [
        ({"max_running": 2, "busy": 2}, 0, None, ["queue q, which has 2 of 2 GPU slots taken"]),
        ({"max_running": 2, "busy": 1}, 0, None, []),
        ({"max_running": None, "busy": 9}, 0, None, []),
        ({"max_running": 2, "running": 2}, 0, None, []),
        ({"max_running": None}, 3, 3, ["project p, which has 3 of 3 GPU slots taken"]),
        (
            {"max_running": 1, "busy": 1},
            4,
            3,
            ["queue q, which has 1 of 1 GPU slot taken", "project p, which has 4 of 3 GPU slots taken"],
        ),
    ],
)
def test_only_bounds_that_are_known_to_be_reached_are_named(
    queue: dict[str, int | None], used: int, limit: int | None, held: list[str]
) -> None:
    assert _full({"name": "q", **queue}, {"tenant": "p", "running": {"used": used, "limit": limit}}) == held


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("run_at", 1795419286759, "2026-11-23T07:34:46Z"),
        ("run_at", "2026-11-23T08:34:46.759+01:00", "2026-11-23T07:34:46Z"),
        ("run_at", "soon", "soon"),
        ("run_at", 10**30, str(10**30)),
        ("deadline_at", None, "none"),
        ("forced", False, "false"),
        ("changes", {"run_at": 0, "on": True, "label": None}, "run_at:1970-01-01T00:00:00Z,on:true,label:none"),
        ("gpu_seconds", 1.23456789, "1.23457"),
    ],
)
def test_facts_are_written_alike(name: str, value: object, shown: str) -> None:
    assert str(_fact(name, value)) == shown
