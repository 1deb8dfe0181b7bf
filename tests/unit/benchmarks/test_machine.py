"""What stands beside a result: whether the code that was measured is the commit's."""

import subprocess
from pathlib import Path

import pytest

from benchmarks import machine


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("benchmarks/results/a.json", "docs/results/a.md", "duquant/a.py", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("before\n")
    identity = ("-c", "user.name=n", "-c", "user.email=n@example.org")
    for command in (("init", "-q"), ("add", "."), (*identity, "commit", "-q", "-m", "first")):
        subprocess.run(("git", *command), cwd=tmp_path, check=True)
    monkeypatch.setattr(machine, "REPOSITORY", tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["benchmarks/results/a.json", "docs/results/a.md", "README.md"])
def test_results_of_an_earlier_benchmark_are_no_change(repository: Path, name: str) -> None:
    (repository / name).write_text("after\n")
    assert not machine.describe()["has_uncommitted_changes"]


def test_changed_code_is_a_change(repository: Path) -> None:
    (repository / "duquant/a.py").write_text("after\n")
    assert machine.describe()["has_uncommitted_changes"]
