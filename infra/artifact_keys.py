"""Names of objects in storage, built only from identifiers: no user's text ever becomes part of a key."""

import re
from dataclasses import dataclass

from infra.errors import InfraError

REPORTS = "reports/"
"""What the keys of all reports start with."""

TEXTS = "texts/"
"""What the keys of all texts start with, also of those that operators have put there themselves."""

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_TEXT_KEY = re.compile(r"texts/[A-Za-z0-9_-]{1,64}/text_[0-9a-f]{32}\.[a-z]{1,16}")
_FILE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")


def _require_id(value: str) -> None:
    if not _ID.fullmatch(value):
        raise InfraError(f"{value!r} cannot be part of an object key")


@dataclass(frozen=True, slots=True)
class ArtifactKeys:
    """The keys of one job's artifact.

    >>> ArtifactKeys("default", "job_1").layer(3, fence=2, attempt=1)
    'artifacts/default/job_1/layers/0003/2-1.safetensors'
    """

    tenant_id: str
    job_id: str

    def __post_init__(self) -> None:
        for value in (self.tenant_id, self.job_id):
            _require_id(value)

    @property
    def prefix(self) -> str:
        """What every key of the artifact starts with."""
        return f"artifacts/{self.tenant_id}/{self.job_id}/"

    @property
    def manifest(self) -> str:
        """Where the manifest is; its existence makes the artifact."""
        return f"{self.prefix}manifest.json"

    def layer(self, layer: int, *, fence: int, attempt: int) -> str:
        """Return the key of one attempt at a layer's shard; layer -1 is the extra shard."""
        if layer < 0:
            return f"{self.prefix}extra/{fence}-{attempt}.safetensors"
        return f"{self.prefix}layers/{layer:04d}/{fence}-{attempt}.safetensors"

    def file(self, name: str, *, fence: int) -> str:
        """Return the key of a small file such as config.json.

        Raises:
            InfraError: the name has characters that do not belong into a key.
        """
        if not _FILE.fullmatch(name):
            raise InfraError(f"{name!r} cannot be part of an object key")
        return f"{self.prefix}files/{fence}/{name}"

    def card(self, name: str, *, job_id: str, fence: int, attempt: int) -> str:
        """Return the key of a file that a later evaluation makes anew: the model card, and the manifest over it.

        >>> ArtifactKeys("default", "job_1").card("README.md", job_id="job_2", fence=1, attempt=3)
        'artifacts/default/job_1/cards/job_2/1-3/README.md'
        """
        _require_id(job_id)
        if not _FILE.fullmatch(name):
            raise InfraError(f"{name!r} cannot be part of an object key")
        return f"{self.cards}{job_id}/{fence}-{attempt}/{name}"

    @property
    def cards(self) -> str:
        """What the keys of all later model cards start with."""
        return f"{self.prefix}cards/"


def report_key(tenant_id: str, job_id: str, name: str) -> str:
    """Return the key of a report on what a job has measured. It outlives the artifact, and the job's own objects.

    >>> report_key("default", "job_1", "3-artifact.html")
    'reports/default/job_1/3-artifact.html'
    """
    for value in (tenant_id, job_id):
        _require_id(value)
    if not _FILE.fullmatch(name):
        raise InfraError(f"{name!r} cannot be part of an object key")
    return f"{REPORTS}{tenant_id}/{job_id}/{name}"


def require_inside(key: str, prefix: str) -> str:
    """Return a key that somebody else has written down, if it names an object below a prefix.

    Raises:
        InfraError: it does not. Some servers take the dots out of keys, and would give what lies elsewhere.
    """
    if not key.startswith(prefix) or {"", ".", ".."} & set(key.split("/")):
        raise InfraError(f"the key {key!r} lies outside {prefix}", key=key)
    return key


def text_key(tenant_id: str, text_id: str, suffix: str) -> str:
    """Return the key of a text that a tenant has uploaded.

    >>> text_key("default", "text_1", ".txt")
    'texts/default/text_1.txt'
    """
    for value in (tenant_id, text_id):
        _require_id(value)
    return f"{TEXTS}{tenant_id}/{text_id}{suffix}"


def is_text_key(key: str) -> bool:
    """Return whether a key is one that `text_key` makes for an uploaded text.

    Operators may put texts beside them by hand: under any other name those are none of ours.

    >>> is_text_key("texts/default/text_0199a1b2c3d47e5f8a9b0c1d2e3f4a5b.txt")
    True
    >>> is_text_key("texts/default/mine.txt")
    False
    """
    return _TEXT_KEY.fullmatch(key) is not None


def text_keys_in(text: str) -> frozenset[str]:
    """Return the keys of uploaded texts that stand somewhere in a text, such as a job's request as JSON.

    >>> sorted(text_keys_in('{"name": "texts/a/text_0199a1b2c3d47e5f8a9b0c1d2e3f4a5b.jsonl", "x": "texts/a/b.txt"}'))
    ['texts/a/text_0199a1b2c3d47e5f8a9b0c1d2e3f4a5b.jsonl']
    """
    return frozenset(_TEXT_KEY.findall(text))


def job_of(key: str) -> str | None:
    """Return the id of the job that an object belongs to; none for objects that are not an artifact's.

    >>> job_of("artifacts/default/job_1/layers/0003/2-1.safetensors")
    'job_1'
    >>> job_of("texts/default/mine.txt") is None
    True
    """
    parts = key.split("/")
    return parts[2] if len(parts) > 3 and parts[0] == "artifacts" else None
