"""Identifiers sort by the time they were made."""

import time

from infra.ids import new_id, uuid7


def test_an_id_is_a_version_7_uuid_of_now() -> None:
    before = time.time_ns() // 1_000_000
    made = uuid7()
    assert (made.version, made.variant) == (7, "specified in RFC 4122")
    assert before <= made.int >> 80 <= time.time_ns() // 1_000_000


def test_ids_of_one_process_rise_and_differ() -> None:
    ids = []
    for _ in range(200):
        ids.append(new_id("job"))
        now = time.time_ns()
        while time.time_ns() - now < 1_000:  # the clock part of an id counts in steps of 244 ns
            pass
    assert ids == sorted(ids)
    assert len({new_id("job") for _ in range(10_000)}) == 10_000
    assert all(made.startswith("job_") and len(made) == 36 for made in ids)
