"""Schedule: which steps of a run are ready, running, or done. No I/O."""

from collections.abc import Iterable

from duquant.pipeline.steps import Step, StepId, StepKind


class Schedule:
    """Hands out ready steps in plan order, so that layers finish one after the other and scratch files stay few."""

    def __init__(self, steps: Iterable[Step]) -> None:
        self._waiting = {step.id: step for step in steps}
        self._running: dict[StepId, Step] = {}
        self._done: set[StepId] = set()

    def next_ready(self) -> StepId | None:
        """Return the first step whose needs are met, now running; None when nothing is ready."""
        for step in self._waiting.values():
            if all(need in self._done for need in step.needs):
                del self._waiting[step.id]
                self._running[step.id] = step
                return step.id
        return None

    def finish(self, step: StepId) -> None:
        """Record that a running step is done."""
        del self._running[step]
        self._done.add(step)

    def retry(self, step: StepId) -> None:
        """Make a running step ready again, before all others."""
        self._waiting = {step: self._running.pop(step), **self._waiting}

    def count_left(self, *kinds: StepKind) -> int:
        """Return how many steps of these kinds are not done."""
        return sum(step.kind in kinds for step in (*self._waiting, *self._running))

    @property
    def is_over(self) -> bool:
        """Whether every step is done."""
        return not self._waiting and not self._running
