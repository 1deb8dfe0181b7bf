"""Settings of the dispatcher and of the workers it starts."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from infra.settings import InfraSettings


class WorkerSettings(InfraSettings):
    """What the dispatcher needs, from DUQUANT_* variables."""

    executor: Literal["local", "ray"] = "local"
    """local: in this process; ray: actors on a Ray cluster."""
    slots: int = Field(default=1, ge=1, le=1024)
    """Ray actors: one per GPU, or one per group of CPU threads."""
    threads_per_slot: int = Field(default=2, ge=1, le=512)
    """CPU threads of one slot. Floating-point sums depend on it: keep it equal for byte-equal artifacts."""
    device: str = "auto"
    """auto, cpu, or cuda."""
    ray_address: str | None = None
    """A running Ray cluster; none starts an embedded one."""
    lease_seconds: float = Field(default=60, gt=1)
    """A job whose dispatcher is silent for this long goes back to the queue."""
    beat_seconds: float = Field(default=15, gt=0)
    """Time between two heartbeats; well below lease_seconds."""
    poll_seconds: float = Field(default=1, gt=0)
    """Time between two looks at an empty queue."""
    retry_seconds: float = Field(default=10, ge=0)
    """Longest wait before the second try of a job that hit an outage; it doubles with every try, up to five minutes."""
    work_dir: Path | None = None
    """Scratch files; none means `work` in the home. Workers on several machines need a shared one."""
    model_cache: Path | None = None
    """Converted and downloaded models; none means `models` in the home."""

    def told(self, text: str) -> str:
        """Return a message for users, without the folders that it lies in here: they are nobody else's business."""
        folders = {*self.model_roots, *self.text_roots, self.models, self.scratch, self.home}
        for folder in sorted({str(place) for each in folders for place in (each, each.resolve())}, key=len)[::-1]:
            text = text.replace(f"{folder.rstrip('/')}/", "")
        return text

    @property
    def scratch(self) -> Path:
        """Return the directory of scratch files."""
        return self.work_dir or self.home / "work"

    @property
    def models(self) -> Path:
        """Return the directory of converted and downloaded models."""
        return self.model_cache or self.home / "models"
