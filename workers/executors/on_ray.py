"""RayExecutor: one actor per slot, at most two tasks in flight each. Ray's own retries are off: we count them."""

import socket
from collections import Counter
from dataclasses import dataclass
from typing import Any

import ray
import structlog
from ray.exceptions import RayActorError, RayError, RayTaskError

from infra.settings import StorageSettings
from infra.storage import ObjectStore
from workers.layer_worker import LayerWorker
from workers.tasks import Completion, EvaluationTask, Task

log = structlog.stdlib.get_logger(__name__)

_OBJECT_STORE_BYTES = 128 * 2**20
"""Only task descriptions and small results pass through it; Ray would take 30 % of memory."""
_IN_FLIGHT_PER_SLOT = 2
_CONNECT_S = 5.0


class _LayerActor:
    """A LayerWorker in a Ray worker process. It reads its storage settings from its own environment."""

    def __init__(self, threads: int) -> None:
        self._worker = LayerWorker(ObjectStore.from_settings(StorageSettings.load()), threads=threads)

    def do(self, task: Task | EvaluationTask) -> Completion[Any]:
        return self._worker.do(task)


@dataclass(frozen=True)
class _InFlight:
    task: Task | EvaluationTask
    slot: int
    actor: Any
    """The actor that got the task; its slot may have another by the time the task ends."""


class RayExecutor:
    """Runs tasks on Ray actors.

    Raises:
        RayError: from the constructor, when the cluster cannot be reached.
    """

    def __init__(self, *, slots: int, threads_per_slot: int, gpus_per_slot: float, address: str | None) -> None:
        self.slots = slots
        self._threads = threads_per_slot
        self._gpus = gpus_per_slot
        if address is None:
            ray.init(
                num_cpus=slots * threads_per_slot,
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                log_to_driver=False,
                configure_logging=False,
                namespace="duquant",
            )
        else:
            _require_reachable(address)
            ray.init(address=address, log_to_driver=False, configure_logging=False, namespace="duquant")
        self._warn_if_too_small()
        self._actors = [self._new_actor() for _ in range(slots)]
        self._in_flight: dict[Any, _InFlight] = {}

    def _warn_if_too_small(self) -> None:
        """Say so when the cluster cannot hold all slots: their tasks would wait, maybe for ever."""
        have = ray.cluster_resources()
        need = {"CPU": self.slots * self._threads, "GPU": self.slots * self._gpus}
        short = {name: (have.get(name, 0.0), amount) for name, amount in need.items() if have.get(name, 0.0) < amount}
        if short:
            log.warning("ray_cluster_too_small", have_and_need=short, slots=self.slots)

    def _new_actor(self) -> Any:
        # max_restarts=0: a dead actor is replaced by us, so that every attempt at a layer is counted.
        actor_class = ray.remote(
            num_cpus=self._threads, num_gpus=self._gpus, max_restarts=0, max_task_retries=0, max_concurrency=1
        )(_LayerActor)
        return actor_class.remote(self._threads)

    def has_room(self) -> bool:
        """Tell whether another task may be submitted."""
        return len(self._in_flight) < self.slots * _IN_FLIGHT_PER_SLOT

    def submit(self, task: Task | EvaluationTask) -> None:
        """Send a task to the least busy actor."""
        load = Counter(entry.slot for entry in self._in_flight.values())
        slot = min(range(self.slots), key=lambda index: load[index])
        actor = self._actors[slot]
        self._in_flight[actor.do.remote(task)] = _InFlight(task, slot, actor)

    def collect(self, timeout_s: float) -> list[Completion[Any]]:
        """Return tasks that ended, waiting up to `timeout_s` for the first."""
        pending = list(self._in_flight)
        if not pending:
            return []
        ready, _ = ray.wait(pending, num_returns=1, timeout=timeout_s)
        if ready:
            ready, _ = ray.wait(pending, num_returns=len(pending), timeout=0)
        return [self._completion(reference) for reference in ready]

    def _completion(self, reference: Any) -> Completion[Any]:
        entry = self._in_flight.pop(reference)
        try:
            completion = ray.get(reference)
        except RayActorError as err:
            if self._actors[entry.slot] is entry.actor:
                log.warning("worker_replaced", slot=entry.slot, task=entry.task.label, job_id=entry.task.run.job_id)
                self._actors[entry.slot] = self._new_actor()
            return Completion(entry.task, error=f"a worker process died: {_first_line(err)}", kind="transient")
        except RayTaskError as err:
            cause = _first_line(err.cause or err)
            return Completion(entry.task, error=f"unexpected error in a worker: {cause}", kind="error")
        except RayError as err:
            return Completion(entry.task, error=f"Ray failed: {_first_line(err)}", kind="transient")
        assert isinstance(completion, Completion)
        return completion

    def abandon(self) -> None:
        """Stop all tasks at once by replacing the actors that have any."""
        for slot in {entry.slot for entry in self._in_flight.values()}:
            ray.kill(self._actors[slot], no_restart=True)
            self._actors[slot] = self._new_actor()
        self._in_flight.clear()

    def close(self) -> None:
        """Kill the actors and leave the cluster; an embedded one stops."""
        for actor in self._actors:
            ray.kill(actor, no_restart=True)
        ray.shutdown()


def _require_reachable(address: str) -> None:
    """Connect once: Ray itself waits for minutes on an address where nothing listens.

    Raises:
        ConnectionError: nothing listens there.
    """
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        return  # "auto" and client addresses are Ray's to judge
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
    except OSError as err:
        raise ConnectionError(f"no Ray cluster answers at {address}: {err}") from err


def _first_line(err: object) -> str:
    return str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
