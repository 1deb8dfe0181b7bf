"""LocalExecutor: one worker thread in this process. No Ray, nothing to start, for tests and small models."""

import queue
import threading
from typing import Any

import structlog

from workers.layer_worker import LayerWorker
from workers.tasks import Completion, EvaluationTask, Task

log = structlog.stdlib.get_logger(__name__)


class LocalExecutor:
    """Runs tasks one after the other in a thread, so that the dispatcher can answer cancels meanwhile."""

    slots = 1

    def __init__(self, worker: LayerWorker) -> None:
        self._worker = worker
        self._tasks: queue.Queue[Task | EvaluationTask | None] = queue.Queue()
        self._done: queue.Queue[Completion[Any] | BaseException] = queue.Queue()
        self._in_flight = 0
        self._thread = threading.Thread(target=self._work, name="local-executor", daemon=True)
        self._thread.start()

    def has_room(self) -> bool:
        """Tell whether another task may be submitted."""
        return self._in_flight < 2

    def submit(self, task: Task | EvaluationTask) -> None:
        """Queue a task."""
        self._in_flight += 1
        self._tasks.put(task)

    def collect(self, timeout_s: float) -> list[Completion[Any]]:
        """Return tasks that ended, waiting up to `timeout_s` for the first.

        Raises:
            BaseException: a task met the end of the process (KeyboardInterrupt, SystemExit).
        """
        try:
            ended = [self._done.get(timeout=timeout_s)]
        except queue.Empty:
            return []
        while not self._done.empty():
            ended.append(self._done.get_nowait())
        self._in_flight -= len(ended)
        completions = []
        for item in ended:
            if isinstance(item, BaseException):
                raise item
            completions.append(item)
        return completions

    def abandon(self) -> None:
        """Drop queued tasks and wait for the running one: a thread cannot be stopped in the middle."""
        while True:
            try:
                self._tasks.get_nowait()
            except queue.Empty:
                break
            self._in_flight -= 1
        while self._in_flight:
            self._done.get()
            self._in_flight -= 1

    def close(self) -> None:
        """Abandon everything and end the thread."""
        self.abandon()
        self._tasks.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                self._done.put(self._worker.do(task))
            except Exception as err:  # as on Ray: a bug fails its task, and the dispatcher counts
                log.exception("task_crashed", task=task.label, job_id=task.run.job_id)
                self._done.put(Completion(task, error=f"unexpected error in a worker: {err}", kind="error"))
            except BaseException as err:  # noqa: BLE001  # handed to the dispatcher's thread, which raises it
                self._done.put(err)
