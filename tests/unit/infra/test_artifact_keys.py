"""Object keys are built from identifiers only."""

import pytest

from infra.artifact_keys import ArtifactKeys
from infra.errors import InfraError


def test_keys_follow_the_layout() -> None:
    keys = ArtifactKeys("default", "job_1")
    assert keys.layer(7, fence=3, attempt=2) == "artifacts/default/job_1/layers/0007/3-2.safetensors"
    assert keys.layer(-1, fence=3, attempt=1) == "artifacts/default/job_1/extra/3-1.safetensors"
    assert keys.file("model.safetensors.index.json", fence=3) == (
        "artifacts/default/job_1/files/3/model.safetensors.index.json"
    )
    assert keys.manifest == "artifacts/default/job_1/manifest.json"
    assert keys.manifest.startswith(keys.prefix)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/a", "a\\b", "a%2fb", "a b", "a\n", "a\0", ".hidden", "é"]
)
def test_names_that_could_lead_elsewhere_are_refused(name: str) -> None:
    with pytest.raises(InfraError):
        ArtifactKeys("default", "job_1").file(name, fence=1)
    with pytest.raises(InfraError):
        ArtifactKeys(name, "job_1")
    with pytest.raises(InfraError):
        ArtifactKeys("default", name)
