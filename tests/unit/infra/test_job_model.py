"""The table of transitions."""

from infra.jobs import ACTIVE, TRANSITIONS, JobState
from infra.schema import jobs


def test_every_state_has_its_row_and_can_be_reached() -> None:
    assert set(TRANSITIONS) == set(JobState)
    reached = {JobState.BLOCKED, JobState.QUEUED}
    for _ in JobState:
        reached |= {after for state in reached for after in TRANSITIONS[state]}
    assert reached == set(JobState)


def test_every_active_state_can_end() -> None:
    for state in ACTIVE:
        seen = {state}
        for _ in JobState:
            seen |= {after for known in seen for after in TRANSITIONS[known]}
        assert any(after.is_terminal for after in seen), state


def test_no_state_leads_to_itself_and_the_end_is_the_end() -> None:
    assert all(state not in after for state, after in TRANSITIONS.items())
    assert {state for state in JobState if state.is_terminal} == {
        JobState.SUCCEEDED,
        JobState.FAILED,
        JobState.CANCELLED,
    }


def test_the_database_knows_the_same_states() -> None:
    (check,) = [item for item in jobs.constraints if str(item.name).endswith("state_known")]
    assert all(f"'{state}'" in str(check.sqltext) for state in JobState)
