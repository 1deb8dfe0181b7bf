"""Text sources, windows, and what is wrong with bad text."""

import hashlib
import json
import logging
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from duquant.calibration.text import (
    calibration_windows,
    consecutive_windows,
    evenly_spaced_windows,
    first_token,
    load_tokenizer,
    read_text,
    tokenize,
)
from duquant.config import CalibrationConfig, TextSource
from duquant.errors import CalibrationError, ConfigError, SourceError


def file_source(path: Path) -> TextSource:
    return TextSource(kind="file", name=str(path))


def test_halves_are_disjoint_and_cover_the_text(text_file: Path) -> None:
    whole, first, second = (
        read_text(TextSource(kind="file", name=str(text_file), part=part))
        for part in ("all", "calibration", "evaluation")
    )
    assert first + second == whole
    assert first.endswith("\n")
    assert abs(len(first) - len(second)) < len(whole) / 10


def test_builtin_text_is_long_and_the_same_every_time() -> None:
    text = read_text(TextSource())
    assert len(text) > 300_000
    assert text == read_text(TextSource())


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"cannot read text file .*absent\.txt: No such file"):
        read_text(file_source(tmp_path / "absent.txt"))


def test_directory_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="cannot read text file"):
        read_text(file_source(tmp_path))


@pytest.mark.parametrize("content", ["", "\n \t\n"])
@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl"])
def test_empty_text_is_named(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(CalibrationError, match=f"text source file:.*{name} is empty"):
        read_text(file_source(path))


def test_text_that_is_not_utf_8_is_named_with_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(CalibrationError, match=r"latin\.txt is not UTF-8 \(byte 3\)"):
        read_text(file_source(path))


def test_documents_of_jsonl_are_joined_by_an_empty_line(tmp_path: Path) -> None:
    path = tmp_path / "docs.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two", "id": 2}\n')
    assert read_text(file_source(path)) == "one\n\ntwo"


def test_other_text_field_is_read(tmp_path: Path) -> None:
    path = tmp_path / "docs.jsonl"
    path.write_text('{"body": "one", "text": "two"}\n')
    assert read_text(TextSource(kind="file", name=str(path), text_field="body")) == "one"


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_line_separators_inside_a_document_do_not_end_it(tmp_path: Path, separator: str) -> None:
    path = tmp_path / "docs.jsonl"
    path.write_text(json.dumps({"text": f"one{separator}two"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_text(file_source(path)) == f"one{separator}two"


def test_windows_line_ends_are_understood(tmp_path: Path) -> None:
    path = tmp_path / "docs.jsonl"
    path.write_bytes(b'{"text": "one"}\r\n{"text": "two"}\r\n')
    assert read_text(file_source(path)) == "one\n\ntwo"


@pytest.mark.parametrize(
    "line", ["{", "[1]", "3", '{"body": "x"}', "plain words", "null", '{"text": 3}', '{"text":null}']
)
def test_bad_line_of_jsonl_is_numbered(tmp_path: Path, line: str) -> None:
    path = tmp_path / "docs.jsonl"
    path.write_text(f'{{"text": "good"}}\n{line}\n')
    with pytest.raises(CalibrationError, match=r"docs\.jsonl line 2: no JSON object with a text in field 'text'"):
        read_text(file_source(path))


def test_object_that_was_not_fetched_says_so(tmp_path: Path, text_file: Path) -> None:
    source = TextSource(kind="object", name="texts/a.txt")
    with pytest.raises(CalibrationError, match=r"'texts/a\.txt' was not fetched"):
        read_text(source)
    assert read_text(source, local_file=text_file) == text_file.read_text()


@pytest.mark.parametrize("kind", ["random", "self"])
def test_generated_sources_have_no_text(kind: str) -> None:
    with pytest.raises(CalibrationError, match=f"a {kind} source has no text"):
        read_text(TextSource(kind=kind))  # type: ignore[arg-type]


@pytest.mark.parametrize(("total", "samples"), [(100, 5), (100, 1), (20, 1), (20, 4), (35, 3)])
def test_windows_are_evenly_spaced_over_the_whole_text(total: int, samples: int) -> None:
    tokens = torch.arange(total)
    windows = evenly_spaced_windows(tokens, samples=samples, seq_len=20)
    assert windows.shape == (samples, 20)
    starts = windows[:, 0].tolist()
    assert all(torch.equal(w, tokens[s : s + 20]) for w, s in zip(windows, starts, strict=True))
    assert starts[0] == 0
    if samples > 1:
        assert starts[-1] == total - 20
        gaps = [b - a for a, b in pairwise(starts)]
        assert max(gaps) - min(gaps) <= 1


def test_overlapping_windows_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        evenly_spaced_windows(torch.arange(40), samples=2, seq_len=20)
        assert not caplog.records
        evenly_spaced_windows(torch.arange(39), samples=2, seq_len=20)
    assert "overlap" in caplog.text


def test_text_shorter_than_a_window_is_an_error() -> None:
    with pytest.raises(CalibrationError, match="has 19 tokens; one window of 20 needs more text"):
        evenly_spaced_windows(torch.arange(19), samples=1, seq_len=20)
    with pytest.raises(CalibrationError, match="has 19 tokens; one window of 20 needs more text"):
        consecutive_windows(torch.arange(19), seq_len=20, limit=None)


@pytest.mark.parametrize(("limit", "count"), [(None, 4), (2, 2), (9, 4)])
def test_consecutive_windows_drop_the_tail(limit: int | None, count: int) -> None:
    windows = consecutive_windows(torch.arange(97), seq_len=20 + 2, limit=limit)
    assert torch.equal(windows.reshape(-1), torch.arange(count * 22))


@pytest.mark.parametrize(("seq_len", "limit"), [(1, None), (0, None), (20, 0), (20, -1)])
def test_windows_that_predict_nothing_are_an_error(seq_len: int, limit: int | None) -> None:
    with pytest.raises(ConfigError):
        consecutive_windows(torch.arange(97), seq_len=seq_len, limit=limit)


def test_tokens_are_those_of_the_text_without_special_ones(tiny_model: Callable[..., Path]) -> None:
    tokenizer = load_tokenizer(tiny_model())
    tokens = tokenize(tokenizer, "héllo\n")
    assert tokens.dtype == torch.int64
    assert len(tokens) == len("héllo\n".encode())
    assert int(tokens.min()) > 2
    assert tokenizer.decode(tokens) == "héllo\n"


def test_directory_without_a_tokenizer_is_named(own_model: Callable[..., Path]) -> None:
    model = own_model()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (model / file).unlink()
    with pytest.raises(SourceError, match=f"{model} has no tokenizer"):
        load_tokenizer(model)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": {}}'])
def test_broken_tokenizer_is_named(own_model: Callable[..., Path], content: str) -> None:
    model = own_model()
    (model / "tokenizer.json").write_text(content)
    with pytest.raises(SourceError, match=f"{model} has no tokenizer"):
        load_tokenizer(model)


def windows_of(model: Path, kind: str, seed: int = 0, name: str = "x") -> torch.Tensor:
    source = TextSource(kind=kind, name=name)  # type: ignore[arg-type]
    return calibration_windows(model, CalibrationConfig(source=source, samples=3, seq_len=16), seed=seed)


@pytest.mark.parametrize("kind", ["random", "self"])
def test_generated_windows_depend_on_the_seed_alone(tiny_model: Callable[..., Path], kind: str) -> None:
    model = tiny_model()
    torch.manual_seed(1)
    first = windows_of(model, kind)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert torch.equal(first, windows_of(model, kind))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first, windows_of(model, kind, seed=1))
    assert first.shape == (3, 16)
    assert 0 <= int(first.min()) <= int(first.max()) < 259


def test_self_source_samples_what_the_model_finds_likely(tiny_model: Callable[..., Path]) -> None:
    model_path = tiny_model()
    model = AutoModelForCausalLM.from_pretrained(model_path)

    def loss(windows: torch.Tensor) -> float:
        with torch.no_grad():
            return float(model(windows, labels=windows).loss)

    sampled = windows_of(model_path, "self")
    assert sampled[:, 0].tolist() == [1, 1, 1]  # <bos>
    assert loss(sampled) < loss(windows_of(model_path, "random"))


CHAT = "{{ bos_token }}User: {% for each in messages %}{{ each['content'] }}{% endfor %} End"


@pytest.mark.parametrize(
    ("template", "begins"), [(CHAT, "<bos>User: "), ("no turns", "<bos>"), ("{{ messages[5]['content'].x }}", "<bos>")]
)
def test_a_chat_model_writes_from_where_the_user_speaks(
    own_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, template: str, begins: str
) -> None:
    monkeypatch.setattr("duquant.calibration.written.DOCUMENT", 24)
    model = own_model()
    (model / "chat_template.jinja").write_text(template)
    calibration = CalibrationConfig(source=TextSource(kind="self"), samples=2, seq_len=60)
    windows = calibration_windows(model, calibration, seed=0)
    assert windows.shape == (2, 60)
    tokenizer = load_tokenizer(model)
    # Three documents to a window, the last one cut.
    starts = [tokenizer.decode(window[at:])[: len(begins)] for window in windows for at in (0, 24, 48)]
    assert starts == [begins] * 6
    documents = [*windows[:, :24], *windows[:, 24:48]]
    assert len({tuple(each.tolist()) for each in documents}) == 4


def test_file_windows_come_from_the_text(tiny_model: Callable[..., Path], text_file: Path) -> None:
    model = tiny_model()
    windows = windows_of(model, "file", name=str(text_file))
    text, tokenizer = text_file.read_text(), load_tokenizer(model)
    assert all(tokenizer.decode(window) in text for window in windows)


def test_too_short_file_says_how_short(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("short")
    with pytest.raises(CalibrationError, match="has 5 tokens; one window of 16 needs more text"):
        windows_of(tiny_model(), "file", name=str(path))


@pytest.mark.parametrize("samples", [1, 3])
def test_evenly_spaced_windows_may_start_with_a_token(samples: int) -> None:
    tokens = torch.arange(100)
    windows = evenly_spaced_windows(tokens, samples=samples, seq_len=20, first=777)
    assert windows.shape == (samples, 20)
    assert windows[:, 0].tolist() == [777] * samples
    assert torch.equal(windows[:, 1:], evenly_spaced_windows(tokens, samples=samples, seq_len=19))


@pytest.mark.parametrize(("limit", "count"), [(None, 4), (2, 2)])
def test_consecutive_windows_with_a_first_token_lose_no_text(limit: int | None, count: int) -> None:
    windows = consecutive_windows(torch.arange(97), seq_len=22, limit=limit, first=777)
    assert windows.shape == (count, 22)
    assert windows[:, 0].tolist() == [777] * count
    assert windows[:, 1:].reshape(-1).tolist() == list(range(count * 21))


@pytest.mark.parametrize("kind", ["file", "random", "self"])
def test_windows_of_every_source_start_with_bos_where_the_model_needs_it(
    tiny_model: Callable[..., Path], text_file: Path, kind: str
) -> None:
    source = TextSource(kind=kind, name=str(text_file))  # type: ignore[arg-type]
    calibration = CalibrationConfig(source=source, samples=3, seq_len=16)
    windows = calibration_windows(tiny_model(), calibration, seed=0, starts_with_bos=True)
    assert windows.shape == (3, 16)
    assert windows[:, 0].tolist() == [1] * 3
    if kind == "file":
        assert 1 not in calibration_windows(tiny_model(), calibration, seed=0)


def test_windows_of_several_sources_lie_one_after_the_other(tiny_model: Callable[..., Path], text_file: Path) -> None:
    source = TextSource(kind="file", name=str(text_file))
    shares = {"builtin_share": 0.25, "conversation_share": 0.125, "self_share": 0.25}
    windows = calibration_windows(
        tiny_model(), CalibrationConfig(source=source, samples=8, seq_len=16, **shares), seed=0
    )
    alone = [CalibrationConfig(source=source, samples=3, seq_len=16)]
    alone += [CalibrationConfig(samples=int(8 * share), seq_len=16, **{name: 1.0}) for name, share in shares.items()]
    assert torch.equal(windows, torch.cat([calibration_windows(tiny_model(), each, seed=0) for each in alone]))
    decode = load_tokenizer(tiny_model()).decode
    assert all(decode(window) in read_text(TextSource(part="calibration")) for window in windows[3:5])
    assert decode(windows[5]) in read_text(TextSource(name="conversations"))


def test_conversations_are_plain_text_that_fills_all_default_windows_of_a_usual_tokenizer() -> None:
    text = read_text(TextSource(name="conversations"))
    assert "<|" not in text
    assert "\ufffd" not in text
    # Recipes name it and equal recipes give equal bytes: another text needs another name, or another ALGORITHM_VERSION.
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "e86a863fb7cef782589e7212fb98cf5d47ecc87910922cdc88e5c5577b4c6a24"
    )
    default, characters_per_token = CalibrationConfig(), 4
    assert len(text) >= default.samples * default.seq_len * characters_per_token


def test_a_text_that_is_shared_and_the_source_is_cut_once() -> None:
    builtin = TextSource(part="calibration")
    assert CalibrationConfig(source=builtin, samples=8, builtin_share=0.5).windows == ((builtin, 8),)
    assert CalibrationConfig(samples=1, self_share=0.5).windows == ((builtin, 1),)
    source = TextSource(kind="random")
    assert CalibrationConfig(source=source, samples=5, builtin_share=0.5).windows == ((source, 3), (builtin, 2))


def test_shares_of_more_than_all_windows_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"self_share are 0.75, 0.25, 0.125; together .* at most 1"):
        CalibrationConfig(builtin_share=0.75, conversation_share=0.25, self_share=0.125)
    with pytest.raises(ConfigError, match=r"builtin_share is -0\.1; it must be between 0\.0"):
        CalibrationConfig(builtin_share=-0.1)


def test_tokenizer_without_the_bos_token_that_the_model_needs_is_an_error(tiny_model: Callable[..., Path]) -> None:
    tokenizer = load_tokenizer(tiny_model())
    tokenizer.bos_token = None
    assert first_token(tokenizer, starts_with_bos=False) is None
    with pytest.raises(SourceError, match="needs every text to start with its BOS token"):
        first_token(tokenizer, starts_with_bos=True)
