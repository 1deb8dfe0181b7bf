"""Scratch directories of jobs. Their names carry the fence, so that taking a job over shuts the last claim out."""

import shutil
from collections.abc import Container
from pathlib import Path

from infra.jobs import Claim


class Scratch:
    """The directories below one root, `JOB.FENCE`."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def take(self, claim: Claim) -> Path:
        """Return this claim's directory, with what an earlier claim of the job left.

        The earlier directory is renamed: a worker that lost its lease and writes on finds its paths gone and fails,
        instead of mixing its files with ours.
        """
        self._root.mkdir(parents=True, exist_ok=True)
        mine = self._root / f"{claim.job.id}.{claim.fence}"
        earlier = sorted(self._root.glob(f"{claim.job.id}.*"), key=lambda path: int(path.suffix[1:]))
        if earlier and not mine.exists():
            earlier.pop().rename(mine)
        for path in earlier:
            if path != mine:
                shutil.rmtree(path, ignore_errors=True)
        mine.mkdir(exist_ok=True)
        for left in (*mine.rglob(".*.part"), *mine.glob("shard-*"), *mine.glob("small-*")):
            # What the last claim was writing when it ended.
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
        return mine

    def drop(self, job_id: str) -> None:
        """Delete a job's directories."""
        for path in self._root.glob(f"{job_id}.*"):
            shutil.rmtree(path, ignore_errors=True)

    def clean(self, active: Container[str]) -> None:
        """Delete the directories of jobs that are not active any more."""
        for path in self._root.glob("job_*.*"):
            if path.stem not in active:
                shutil.rmtree(path, ignore_errors=True)
