from hypothesis import given
from hypothesis import strategies as st

from duquant.pipeline import plan
from workers.schedule import Schedule


@given(
    layers=st.integers(1, 6),
    shards=st.integers(1, 4),
    finished=st.sets(st.integers(-1, 5)),
    choices=st.lists(st.integers(0, 5), max_size=200),
)
def test_any_order_of_completions_runs_every_step_once_after_its_needs(layers, shards, finished, choices):
    steps = plan(layers=layers, shards=shards, finished_layers=frozenset(finished))
    needs = {step.id: set(step.needs) for step in steps}
    schedule, running, done = Schedule(steps), [], []
    picks = iter(choices)
    while not schedule.is_over:
        while len(running) < 3 and (step := schedule.next_ready()) is not None:
            assert needs[step] <= set(done)
            running.append(step)
        ended = running.pop(next(picks, 0) % len(running))
        if next(picks, 1) == 0:
            schedule.retry(ended)
        else:
            schedule.finish(ended)
            done.append(ended)
    assert sorted(done) == sorted(needs)


def test_steps_come_in_plan_order_so_that_few_layers_are_open_at_a_time():
    steps = plan(layers=3, shards=2)
    schedule, order = Schedule(steps), []
    while (step := schedule.next_ready()) is not None:
        order.append(step)
        schedule.finish(step)
    assert order == [step.id for step in steps]
