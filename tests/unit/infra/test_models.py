"""Model references: what is allowed, and the tricks that others fell for."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infra.errors import ModelForbidden, ModelNotFound, PathForbidden, PathNotFound
from infra.model_shelf import ModelShelf
from infra.models import ModelCatalog, ModelRef
from infra.paths import find_under

COMMIT = "a" * 40


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    make_model(folder / "llama" / "7b")
    (tmp_path / "secret").mkdir()
    make_model(tmp_path / "secret")
    make_model(tmp_path / "models-private")
    return folder


def make_model(folder: Path, weights: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / weights).write_bytes(b"weights")
    return folder


def local(name: str, revision: str | None = None) -> ModelRef:
    return ModelRef("local", name, revision)


def test_a_model_under_a_root_is_found(root: Path) -> None:
    catalog = ModelCatalog([root])
    assert catalog.local_path(local("llama/7b")) == root / "llama" / "7b"
    assert catalog.check(local("llama/7b")).startswith("local:")


def test_the_first_root_that_has_the_model_wins(root: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    make_model(other / "llama" / "7b")
    make_model(other / "only-here")
    catalog = ModelCatalog([root, other])
    assert catalog.local_path(local("llama/7b")) == root / "llama" / "7b"
    assert catalog.local_path(local("only-here")) == other / "only-here"


TRICKS = [
    # MLflow: the same text parsed twice.
    "//proc/self/root",
    "http:///#/../../../etc/",
    "http:///?/../../etc/",
    "file:///etc",
    "file://localhost/etc",
    "local:/etc",
    "s3://bucket/model",
    # Traversal, plain and dressed up.
    "..",
    "../secret",
    "llama/../../secret",
    "llama/7b/../../../secret",
    "./llama/7b",
    ".",
    "....//secret",
    "..\\secret",
    "llama\\7b",
    "%2e%2e/secret",
    "%2e%2e%2fsecret",
    "..%2fsecret",
    "%252e%252e/secret",
    "..%c0%afsecret",
    "\uff0e\uff0e/secret",
    "\u2025/secret",
    "llama/7b\0.txt",
    "llama/7b\n",
    "/etc/passwd",
    "/",
    "",
    "llama//7b",
    "llama/7b/",
    "~",
    "~root",
    "$HOME",
    "llama/7b?x=1",
    "llama/7b#x",
    "user@host/x",
    "C:/windows",
    "C:x",
    "\\\\server\\share",
    ".git",
    "llama/.hidden",
    # Neural Solution: shell characters, and the no-break space that became a space after the check.
    "x;touch y",
    "x\xa0y",
    "x y",
    "$(id)",
    "`id`",
    "x|id",
    "x&&id",
    "x<y",
    "'; DROP TABLE jobs; --",
    "a" * 600,
    "/".join(["a"] * 400),
]


@pytest.mark.parametrize("name", TRICKS)
def test_tricks_with_names_are_refused(root: Path, name: str) -> None:
    with pytest.raises(ModelForbidden):
        ModelCatalog([root], allow_hub=True).check(local(name))
    with pytest.raises(PathForbidden):
        find_under([root], name)
    with pytest.raises(ModelForbidden):
        ModelCatalog([root], allow_hub=True).check(ModelRef("hub", name, COMMIT))


def test_a_root_is_not_a_prefix_of_text(root: Path) -> None:
    with pytest.raises(ModelNotFound):
        ModelCatalog([root]).check(local("models-private"))


@pytest.mark.parametrize("target", ["../secret", "/etc", "../models-private"])
def test_links_that_lead_out_of_the_root_are_refused(root: Path, target: str) -> None:
    (root / "link").symlink_to(target)
    with pytest.raises(ModelForbidden, match="leads out"):
        ModelCatalog([root]).check(local("link"))


def test_links_inside_a_model_that_lead_out_are_refused(root: Path, tmp_path: Path) -> None:
    (root / "llama" / "7b" / "extra.json").symlink_to(tmp_path / "secret" / "config.json")
    with pytest.raises(ModelForbidden, match=r"extra\.json leads out"):
        ModelCatalog([root]).check(local("llama/7b"))


def test_links_that_stay_inside_the_root_work(root: Path) -> None:
    (root / "alias").symlink_to("llama/7b")
    assert ModelCatalog([root]).local_path(local("alias")) == root / "llama" / "7b"


def test_a_root_may_itself_be_a_link(root: Path, tmp_path: Path) -> None:
    (tmp_path / "by-link").symlink_to(root)
    assert ModelCatalog([tmp_path / "by-link"]).local_path(local("llama/7b")) == root / "llama" / "7b"


def test_without_roots_there_are_no_local_models(root: Path) -> None:
    with pytest.raises(ModelNotFound):
        ModelCatalog([]).check(local("llama/7b"))


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth", "pkl", "ckpt"])
def test_pickled_weights_are_refused_unless_there_are_safe_ones(root: Path, suffix: str) -> None:
    folder = make_model(root / "old", f"pytorch_model.{suffix}")
    with pytest.raises(ModelForbidden, match="convert it to safetensors"):
        ModelCatalog([root]).check(local("old"))
    (folder / "model.safetensors").write_bytes(b"")
    assert ModelCatalog([root]).check(local("old"))


def test_a_checkpoint_that_asks_for_remote_code_is_refused(root: Path) -> None:
    folder = make_model(root / "custom")
    (folder / "config.json").write_text(json.dumps({"model_type": "x", "auto_map": {"AutoModel": "modeling.X"}}))
    with pytest.raises(ModelForbidden, match="remote code"):
        ModelCatalog([root]).check(local("custom"))
    for harmless in ("[]", "{", "\xff", "[" * 100_000):
        (folder / "config.json").write_text(harmless, encoding="latin-1")
        assert ModelCatalog([root]).check(local("custom"))


def test_a_folder_that_becomes_a_link_after_it_was_checked_is_refused_when_it_is_read(
    root: Path, tmp_path: Path
) -> None:
    catalog = ModelCatalog([root])
    catalog.check(local("llama/7b"))
    (root / "llama" / "7b").rename(root / "llama" / "old")
    (root / "llama" / "7b").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelForbidden, match="leads out"):
        catalog.local_path(local("llama/7b"))


_WORDS = ".. . / // \\ %2e %2f %252e # ? ~ link llama 7b secret file: proc self root ; $("
_PIECES = st.sampled_from([*_WORDS.split(), "\0", "\xa0", "\uff0e", "\u2025", "\u202e", " ", "\n"])


@given(name=st.one_of(st.text(max_size=40), st.lists(_PIECES, max_size=8).map("".join)))
@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_name_whatever_leads_out_of_the_root(root: Path, name: str) -> None:
    if not (root / "link").is_symlink():
        (root / "link").symlink_to("../secret")
    try:
        path = find_under([root], name)
    except (PathForbidden, PathNotFound):
        return
    assert path == Path(os.path.realpath(path))
    assert path.is_relative_to(root)


def test_what_is_no_model_is_not_found(root: Path) -> None:
    (root / "empty").mkdir()
    (root / "file").write_text("")
    make_model(root / "no-config")
    (root / "no-config" / "config.json").unlink()
    make_model(root / "no-weights", "notes.txt")
    for name in ("empty", "file", "no-config", "no-weights", "missing"):
        with pytest.raises(ModelNotFound, match=name):
            ModelCatalog([root]).check(local(name))


def test_the_identity_follows_the_files(root: Path) -> None:
    catalog = ModelCatalog([root])
    first = catalog.check(local("llama/7b"))
    assert catalog.check(local("llama/7b")) == first
    weights = root / "llama" / "7b" / "model.safetensors"
    facts = weights.stat()
    os.utime(weights, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    second = catalog.check(local("llama/7b"))
    weights.write_bytes(b"other weights")
    os.utime(weights, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    third = catalog.check(local("llama/7b"))
    (root / "llama" / "7b" / "tokenizer.json").write_text("{}")
    assert len({first, second, third, catalog.check(local("llama/7b"))}) == 4


def test_demo_models_are_a_fixed_list(root: Path) -> None:
    catalog = ModelCatalog([root])
    assert catalog.check(ModelRef("demo", "smollm2-135m")) == "demo:smollm2-135m"
    with pytest.raises(ModelNotFound, match="smollm2-135m"):
        catalog.check(ModelRef("demo", "../secret"))
    with pytest.raises(ModelForbidden):
        catalog.check(ModelRef("demo", "smollm2-135m", "main"))
    with pytest.raises(ModelForbidden):
        catalog.local_path(ModelRef("demo", "smollm2-135m"))


def test_hub_models_are_off_by_default_and_pinned_to_a_commit() -> None:
    ref = ModelRef("hub", "meta-llama/Llama-3.1-8B", COMMIT)
    with pytest.raises(ModelForbidden, match="DUQUANT_ALLOW_HUB"):
        ModelCatalog([]).check(ref)
    catalog = ModelCatalog([], allow_hub=True)
    assert catalog.check(ref) == f"hub:meta-llama/Llama-3.1-8B@{COMMIT}"
    for revision in (None, "main", "a" * 39, "A" * 40, COMMIT + "\n", "refs/pr/1"):
        with pytest.raises(ModelForbidden, match="40 hexadecimal"):
            catalog.check(ModelRef("hub", ref.name, revision))


def test_text_files_are_found_the_same_way(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("text")
    assert find_under([tmp_path / "texts"], "a.txt") == tmp_path / "texts" / "a.txt"
    with pytest.raises(PathNotFound, match=r"b\.txt"):
        find_under([tmp_path / "texts"], "b.txt")


def test_the_shelf_is_looked_over_once_a_second_however_many_ask(root: Path) -> None:
    now = 0.0
    shelf = ModelShelf([root], ModelCatalog([root]), clock=lambda: now)
    names = [model.ref.name for model in shelf.list()]
    make_model(root / "late")
    assert [model.ref.name for model in shelf.list()] == names
    now = 1.0
    assert {model.ref.name for model in shelf.list()} == {*names, "late"}
