"""A quantization in a process of its own, for a test to kill."""

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from duquant.config import Recipe

_CONTEXT = multiprocessing.get_context("forkserver")
# What is imported once, by the server, costs each process nothing.
_CONTEXT.set_forkserver_preload(["support.killed", "duquant.pipeline", "transformers.models.llama"])


@contextmanager
def quantizing(
    model: Path, out: Path, recipe: Recipe, *, pause_s: float = 0
) -> Iterator[tuple[Any, ForkServerProcess]]:
    """Run it; give the steps as it says them, through a connection that ends with it, and the process."""
    here, there = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_quantize, args=(model, out, recipe, there, pause_s))
    process.start()
    there.close()
    try:
        yield here, process
    finally:
        process.kill()
        process.join()
        here.close()


def _quantize(model: Path, out: Path, recipe: Recipe, said: Connection, pause_s: float) -> None:
    import time

    from duquant.pipeline import quantize_model

    def progress(step: Any) -> None:
        said.send(f"{step.phase} {step.message}")
        time.sleep(pause_s)

    quantize_model(str(model), out, recipe, device="cpu", threads=1, on_progress=progress)
