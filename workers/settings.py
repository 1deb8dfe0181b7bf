"""Settings of the dispatcher and of the workers it starts."""

import re
from pathlib import Path
from typing import Literal

from pydantic import Field
from sqlalchemy import make_url

from infra.settings import InfraSettings

_PEER = re.compile(r' at "[^"]*"(?: \([^)]*\))?, port \d+')
"""How PostgreSQL's library names the server that it cannot reach."""


def _shown(database_url: str) -> str:
    """Return a database's URL as errors of ours show it."""
    return make_url(database_url).render_as_string(hide_password=True) if database_url else ""


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
        """Return a message for users, without where things lie here: folders and servers are nobody else's business."""
        for server in (self.s3_endpoint and f"at {self.s3_endpoint}", _shown(self.database_url)):
            text = text.replace(f" {server}", "") if server else text
        text = _PEER.sub("", text)
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
