"""LayerWorker: does tasks. A plain class that touches only files and object storage; executors wrap it."""

import errno
import tempfile
import time
from pathlib import Path
from typing import Any

import structlog
import torch
from transformers.utils import logging as transformers_logging

from duquant.config import Recipe
from duquant.errors import DuQuantError, KernelUnavailableError, ScratchError
from duquant.models.devices import resolve_device
from duquant.models.references import resolve_model
from duquant.pipeline import ModelRun
from infra.errors import InfraError, TransientError
from infra.storage import ObjectStore
from workers.measure import measure
from workers.tasks import Completion, EvaluationTask, RunSpec, Task, TaskT

_LONGEST_NAME = 64


class LayerWorker:
    """Runs one task after the other with a fixed number of threads."""

    def __init__(self, storage: ObjectStore, *, threads: int) -> None:
        torch.set_num_threads(threads)
        # A worker's standard error is its log, one event a line; bars are for terminals.
        transformers_logging.disable_progress_bar()
        self._storage = storage
        self._spec: RunSpec | None = None
        self._run: ModelRun | None = None

    def do(self, task: TaskT) -> Completion[TaskT]:
        """Run a task; every foreseeable error becomes a completion that says whether another try makes sense."""
        # In a thread or process of its own: what is logged down there shall still say for which job.
        with structlog.contextvars.bound_contextvars(job_id=task.run.job_id, task=task.label):
            return self._outcome(task)

    def _outcome(self, task: TaskT) -> Completion[TaskT]:
        try:
            began = time.perf_counter()
            result = self._evaluate(task) if isinstance(task, EvaluationTask) else self._do(task)
            seconds = time.perf_counter() - began
            return Completion(task, result=result, device=_device_name(task.run.device), seconds=seconds)
        except KernelUnavailableError as err:
            return Completion(task, error=str(err), kind="error")
        except ScratchError as err:
            return Completion(task, error=str(err), kind="transient")
        except DuQuantError as err:
            return Completion(task, error=str(err), kind="bad_input")
        except TransientError as err:
            return Completion(task, error=str(err), kind="transient")
        except InfraError as err:
            local = err.__cause__  # a file that cannot be written is a matter of this machine's disk
            if isinstance(local, OSError):
                return _disk_error(task, local)
            return Completion(task, error=str(err), kind="error")
        except torch.OutOfMemoryError as err:
            return Completion(task, error=f"out of device memory: {err}", kind="error")
        except OSError as err:
            return _disk_error(task, err)

    def _evaluate(self, task: EvaluationTask) -> dict[str, Any]:
        # The model that is measured needs the memory of the skeleton that is kept open.
        self._run = self._spec = None
        return measure(self._storage, task.run)

    def _do(self, task: Task) -> dict[str, Any]:
        run = self._run_for(task.run)
        if run.runs_shard(task.step) and not (packed := run.packed(task.step.layer)).exists():
            # Committed by a claim whose work directory is gone, or deleted behind the first that ran it.
            assert task.key is not None
            self._storage.get_file(task.key, packed)
        with tempfile.TemporaryDirectory(prefix="shard-", dir=task.run.work_dir) as scratch:
            out = Path(scratch)
            outcome = run.do(task.step, out)
            if outcome is None:
                return {}
            assert task.key is not None
            sha256, size = self._storage.put_file(task.key, out / outcome.shard.name)
            if (sha256, size) != (outcome.shard.sha256, outcome.shard.size_bytes):
                raise TransientError(f"{outcome.shard.name} changed on the way to object storage")
        return outcome.to_dict()

    def _run_for(self, spec: RunSpec) -> ModelRun:
        """Return the run of a spec; the last one is kept, with its open model skeleton."""
        if self._run is None or self._spec != spec:
            text_file = spec.text_file
            if spec.text_key is not None:
                # The suffix tells JSONL from plain text.
                text_file = spec.work_dir / f"calibration-text{Path(spec.text_key).suffix}"
                if not text_file.exists():
                    self._storage.get_file(spec.text_key, text_file)
            self._run = ModelRun(
                resolve_model(spec.model, cache=spec.model_cache, allow_hub=spec.allow_hub),
                Recipe.from_dict(spec.recipe),
                spec.work_dir,
                device=resolve_device(spec.device),
                text_file=text_file,
            )
            self._spec = spec
        return self._run


def _device_name(setting: str) -> str:
    device = resolve_device(setting)
    return torch.cuda.get_device_name(device)[:_LONGEST_NAME] if device.type == "cuda" else device.type


def _disk_error(task: Task | EvaluationTask, err: OSError) -> Completion[Any]:
    full = err.errno in (errno.ENOSPC, errno.EDQUOT)
    what = "the disk is full" if full else (err.strerror or str(err))
    kind = "scarce" if full else "transient"
    return Completion(task, error=f"{what}: {err.filename or task.run.work_dir}", kind=kind)
