"""What commands print, and the completion of shells."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from client.main import run
from client.output import note, print_json, print_pairs, print_table, print_text, print_yaml


def test_json_yaml_and_the_table_hold_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    said = {}
    for name, options in {"json": ["-o", "json"], "flag": ["--json"], "yaml": ["-o", "yaml"], "table": []}.items():
        assert run(["recipe", "list", *options]) == 0
        said[name] = capsys.readouterr().out
    items = json.loads(said["json"])
    assert json.loads(said["flag"]) == items
    assert yaml.safe_load(said["yaml"]) == items
    assert said["json"].count("\n") == 1
    assert all(item["name"] in said["table"] for item in items["items"])


def test_nothing_that_is_shown_steers_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    name = "k\x1b[31m\ny\x9b2J\u202e\t\x7f"
    shown = "k\\x1b[31m\\ny\\x9b2J\\u202e\\t\\x7f"
    print_table(("name", "state"), [(name, "ok")])
    print_pairs({"name": name})
    print_text(f"{name} is deleted")
    note(f"found {name}")
    said = capsys.readouterr()
    _, row, pair, text = said.out.split("\n", 3)
    assert (row, pair) == (f"{shown}  ok", f"name  {shown}")
    assert text == "k\\x1b[31m\ny\\x9b2J\\u202e\t\\x7f is deleted\n"
    assert "\x1b" not in said.err
    assert "\x9b" not in said.err
    print_json({"name": name})
    assert json.loads(capsys.readouterr().out) == {"name": name}
    print_yaml({"name": name})
    assert yaml.safe_load(capsys.readouterr().out) == {"name": name}
    assert run(["recipe", "show", "a\x1b[31mb"]) == 2
    assert "\x1b" not in capsys.readouterr().err


def test_a_recipe_shown_as_yaml_is_a_recipe_file(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recipe", "show", "duquant", "-o", "yaml"]) == 0
    path = tmp_path / "mine.yaml"
    path.write_text(capsys.readouterr().out)
    assert run(["recipe", "show", str(path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert run(["recipe", "show", "duquant", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == shown


def test_ctrl_c_while_modules_are_imported_is_quiet() -> None:
    program = """
import sys
from client.main import main

class Impatient:
    def find_spec(self, name, path=None, target=None):
        if name == "client.app":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Impatient())
main(["recipe", "list"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_it_calls_itself_by_its_name() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "client.main", "job", "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.lstrip().startswith("Usage: duquant job ")


def test_an_unknown_format_is_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recipe", "list", "-o", "xml"]) == 2
    assert "xml" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "expected"), [("duquant jo", "job"), ("duquant recipe show duq", "duquant-fast")])
def test_shells_complete_nouns_and_presets(words: str, expected: str) -> None:
    program = "import sys; sys.argv[0] = 'duquant'; from client.main import main; main()"
    request = {"_DUQUANT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **request}, capture_output=True, text=True, timeout=60
    )
    assert expected in done.stdout.split(), done
