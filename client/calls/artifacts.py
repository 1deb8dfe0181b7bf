"""Calls about what jobs make."""

from typing import Any

from client.calls.requests import Call, get, of_kinds, same
from client.errors import BadInputError
from client.models import Artifact, ArtifactInfo, Page


def _artifact(name: str) -> str:
    return of_kinds(name, "artifact", "art_")


def _tag(name: str) -> str:
    if not name.isascii() or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise BadInputError(f"{name!r} is no tag; it has letters, digits, dots, dashes and underscores")
    return name


def artifact_files(name: str) -> Call[Artifact]:
    """Read an artifact's files, by its id or its job's, with fresh links."""
    if name.startswith("art_"):
        return get(f"/v1/artifacts/{_artifact(name)}/files", Artifact.from_json)
    return get(f"/v1/jobs/{_artifact(name)}/artifact", Artifact.from_json)


def get_artifact(name: str) -> Call[ArtifactInfo]:
    """Read an artifact."""
    return get(f"/v1/artifacts/{_artifact(name)}", ArtifactInfo.from_json)


def list_artifacts(**filters: Any) -> Call[Page[ArtifactInfo]]:
    """Read a page of artifacts; filters as in the API: model, recipe, tag, created_from, created_until."""
    return get("/v1/artifacts", Page.of(ArtifactInfo.from_json), **filters)


def compare_artifacts(a: str, b: str) -> Call[Any]:
    """Read how two artifacts differ."""
    return get(f"/v1/artifacts/{_artifact(a)}/comparison", same, **{"with": _artifact(b)})


def tag_artifact(name: str, tag: str) -> Call[ArtifactInfo]:
    """Give an artifact a tag."""
    path = f"/v1/artifacts/{_artifact(name)}/tags/{_tag(tag)}"
    return Call(method="PUT", path=path, read=ArtifactInfo.from_json)


def untag_artifact(name: str, tag: str) -> Call[ArtifactInfo]:
    """Take a tag away."""
    path = f"/v1/artifacts/{_artifact(name)}/tags/{_tag(tag)}"
    return Call(method="DELETE", path=path, read=ArtifactInfo.from_json)


def keep_artifact(name: str, until: str | None) -> Call[ArtifactInfo]:
    """Say when an artifact may be deleted (RFC 3339); none is never."""
    path = f"/v1/artifacts/{_artifact(name)}"
    return Call(method="PATCH", path=path, read=ArtifactInfo.from_json, body={"expires_at": until})


def delete_artifact(name: str, *, force: bool = False) -> Call[None]:
    """Delete an artifact; one with tags only with `force`."""
    path = f"/v1/artifacts/{_artifact(name)}"
    return Call(method="DELETE", path=path, read=lambda _: None, params={"force": str(force).lower()})
