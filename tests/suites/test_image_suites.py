"""Suites with images: columns, wording and limits; what is kept; and every shipped one on rows of its data's form."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from tests.suites.pictures import encoded, image_dataset, picture

from vsdbench.errors import ConfigError
from vsdbench.suites import rows as row_sources
from vsdbench.suites.images import pixels_sha256
from vsdbench.suites.loaders import Suite, load_suite

SHIPPED = Path(__file__).parents[2] / "suites"
ONE = datasets.Image()
MANY = datasets.List(datasets.Image())
MakeSuite = Callable[..., Path]
LOCAL = {"name": "local", "loader": "jsonl", "path": "rows.jsonl", "licence": "MIT"}
FIELDS = {"prompt": "text", "images": "image", "id": "key"}
HUB = {"name": "hub", "loader": "hub", "repo": "o/d", "split": "test", "licence": "MIT", "fields": FIELDS}


@pytest.fixture
def make_suite(tmp_path: Path) -> MakeSuite:
    def make(source: dict[str, Any], rows: list[dict[str, Any]] | None = None) -> Path:
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows or [])))
        data = {
            "name": "tiny",
            "version": 1,
            "description": "A few prompts.",
            "licence": "MIT",
            "sources": [source],
            "generation": {"max_new_tokens": 8},
            "modes": [{"name": "greedy", "temperature": 0, "rule": "greedy"}],
            "drafters": [{"name": "ngram", "type": "ngram"}],
        }
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(data))
        return path

    return make


def _refused(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_suite(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _shown(suite: Suite) -> list[list[str]]:
    return [[image.sha256 for image in prompt.images] for prompt in suite.prompts]


def _sha(number: int) -> str:
    return pixels_sha256(picture(number))


# ---- local files ----


def test_files_are_relative_to_the_suite_and_rows_without_are_left_out(make_suite: MakeSuite, tmp_path: Path) -> None:
    (tmp_path / "img").mkdir()
    for number in range(3):
        picture(number).save(tmp_path / "img" / f"{number}.png")
    rows = [
        {"key": "a", "text": "One?", "image": "img/0.png"},
        {"key": "b", "text": "Two?", "image": ["img/1.png", "img/2.png"]},
        {"key": "c", "text": "Three?", "image": None},
        {"key": "d", "text": "Four?", "image": []},
        {"key": "e", "text": "Five?", "image": [None]},
    ]
    suite = load_suite(make_suite({**LOCAL, "fields": FIELDS}, rows))
    assert [prompt.id for prompt in suite.prompts] == ["local/a", "local/b"]
    assert _shown(suite) == [[_sha(0)], [_sha(1), _sha(2)]]
    assert suite.notes == ("3 of 5 rows of 'local' have no image and are left out.",)
    assert suite.prompts[1].images[1].open().tobytes() == picture(2).tobytes()
    picture(9).save(tmp_path / "img" / "0.png")
    assert load_suite(tmp_path / "tiny.yaml").prompts_sha256 != suite.prompts_sha256


def test_several_columns_keep_their_order(make_suite: MakeSuite, tmp_path: Path) -> None:
    for number in range(2):
        picture(number).save(tmp_path / f"{number}.png")
    rows = [{"text": "Which?", "second": "0.png", "first": "1.png", "third": None}]
    source = {**LOCAL, "fields": {"prompt": "text", "images": ["first", "second", "third"]}}
    assert _shown(load_suite(make_suite(source, rows))) == [[_sha(1), _sha(0)]]
    assert "no column 'fourth'" in _refused(tmp_path / "tiny.yaml", "sources.local.fields.images=[first,fourth]")


def test_a_wrong_image_names_its_source_and_column(make_suite: MakeSuite) -> None:
    path = make_suite({**LOCAL, "fields": FIELDS}, [{"key": "a", "text": "One?", "image": "none.png"}])
    assert "source 'local', column 'image': the image '" in _refused(path)
    path = make_suite({**LOCAL, "fields": FIELDS}, [{"key": "a", "text": "One?", "image": "https://x.org/a.png"}])
    assert "'https://x.org/a.png' is an address" in _refused(path)
    path = make_suite({**LOCAL, "fields": FIELDS}, [{"key": "a", "text": "One?", "image": None}])
    assert "the suite has no prompts" in _refused(path)


def test_one_file_of_a_wheel_has_no_images(make_suite: MakeSuite) -> None:
    wheel = {"loader": "wheel", "package": "a==1", "file": "f", "sha256": "0" * 64, "format": "jsonl"}
    assert "has no images beside it" in _refused(make_suite({"name": "w", "licence": "MIT", "fields": FIELDS, **wheel}))


# ---- wording ----


def _worded(make_suite: MakeSuite, source: dict[str, Any], *rows: dict[str, Any]) -> list[str]:
    local = {**LOCAL, "fields": {"prompt": "text"}, **source}
    return [prompt.turns[0] for prompt in load_suite(make_suite(local, list(rows))).prompts]


def test_choices_come_from_a_list_a_written_list_or_columns(make_suite: MakeSuite) -> None:
    lettered = {"template": "{text}\n{choices}", "choices": {"columns": "options"}}
    as_list = {"text": "Which?", "options": ["$6", "", "{7}"]}
    as_text = {"text": "Which?", "options": "['it\\'s', 'b']"}
    assert _worded(make_suite, lettered, as_list, as_text) == ["Which?\nA. $6\nB. {7}", "Which?\nA. it's\nB. b"]
    columns = {"columns": ["a", "b", "c"], "line": "({letter}) {choice}", "separator": " "}
    assert _worded(
        make_suite, {"template": "{prompt} {choices}", "choices": columns}, {"text": "?", "a": "x", "b": 3, "c": None}
    ) == ["? (A) x (B) 3"]


def test_empty_columns_and_suffixes(make_suite: MakeSuite) -> None:
    source = {"template": "{hint}\n{prompt}\n", "empty": {"hint": "N/A"}, "suffix": "\nExplain."}
    rows = [{"text": "a?", "hint": " "}, {"text": "b?", "hint": "Look."}, {"text": "c?", "hint": None}]
    assert _worded(make_suite, source, *rows) == ["N/A\na?\nExplain.", "Look.\nb?\nExplain.", "N/A\nc?\nExplain."]


def test_rows_are_filtered_by_what_columns_say(make_suite: MakeSuite, tmp_path: Path) -> None:
    rows = [{"text": f"{n}?", "kind": "ab"[n % 2], "level": n // 2} for n in range(4)]
    assert _worded(make_suite, {"where": {"equals": {"kind": "b", "level": "1"}}}, *rows) == ["3?"]
    assert "no column 'sort'" in _refused(tmp_path / "tiny.yaml", "sources.local.where.equals={sort: b}")


@pytest.mark.parametrize(
    ("source", "rows", "expected"),
    [
        ({"choices": {"columns": "o"}}, [], "the template has no {choices} to show them"),
        ({"choices": {"columns": []}, "template": "{choices}"}, [], "'sources.0.choices.columns' is []"),
        ({"choices": {"columns": "o", "line": "{letter}"}, "template": "{choices}"}, [], "must have {choice} in it"),
        ({"choices": {"columns": "o", "line": "{choice} {x}"}, "template": "{choices}"}, [], "beside that only"),
        ({"empty": {"hint": "N/A"}}, [], "'empty' is about 'hint', which is not in the template"),
        ({"choices": {"columns": "o"}, "template": "{choices}"}, [{"text": "?", "o": "a, b"}], "a list of choices"),
        ({"choices": {"columns": "o"}, "template": "{choices}"}, [{"text": "?", "o": []}], "are 0; 1 to 26"),
        ({"template": "Describe it."}, [], "the template must have {prompt} or another column in it"),
        ({"images_from": {}}, [], "unknown key 'sources.0.images_from'"),
    ],
)
def test_wrong_wording_is_refused(
    make_suite: MakeSuite, source: dict[str, Any], rows: list[dict[str, Any]], expected: str
) -> None:
    assert expected in _refused(make_suite({**LOCAL, "fields": {"prompt": "text"}, **source}, rows))


# ---- the hub ----


def _hub_rows(count: int) -> datasets.Dataset:
    rows = [{"key": f"k{n}", "text": "What is it?", "image": picture(n) if n % 5 else None} for n in range(count)]
    return image_dataset(rows, {"image": ONE})


def test_images_of_the_hub_are_opened_only_where_they_are_chosen(
    make_suite: MakeSuite, image_hub: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    image_hub["o/d", None, "test"] = _hub_rows(60)
    full, read = row_sources.HubImageRows.full, list[int]()
    monkeypatch.setattr(row_sources.HubImageRows, "full", lambda self, n: read.append(n) or full(self, n))
    suite = load_suite(make_suite({**HUB, "limit": 5}))
    assert (len(suite.prompts), len(suite.spare), len(read)) == (5, 16, 21)
    assert suite.notes == ("12 of 60 rows of 'hub' have no image and are left out.",)
    for prompt in (*suite.prompts, *suite.spare):
        assert [image.sha256 for image in prompt.images] == [_sha(int(prompt.id.removeprefix("hub/k")))]
    assert load_suite(make_suite({**HUB, "limit": 5})).prompts == suite.prompts
    others = load_suite(make_suite({**HUB, "limit": 5}), ["seed=42"])
    assert {prompt.id for prompt in others.prompts} != {prompt.id for prompt in suite.prompts}


def test_without_the_hub_the_kept_images_are_used(
    make_suite: MakeSuite, image_hub: dict[Any, Any], tmp_path: Path
) -> None:
    image_hub["o/d", None, "test"] = _hub_rows(12)
    path = make_suite({**HUB, "limit": 4})
    fresh = load_suite(path)
    image_hub["reachable"] = False
    again = load_suite(path)
    assert again.prompts == fresh.prompts
    assert again.prompts_sha256 == fresh.prompts_sha256
    assert "copy of 'hub' kept from an earlier run" in again.notes[0]
    image = again.prompts[0].images[0]
    assert image.open().tobytes() == fresh.prompts[0].images[0].open().tobytes()
    (tmp_path / "cache" / "prompts" / "images" / f"{image.sha256}.png").unlink()
    with pytest.raises(ConfigError, match=r"the kept image .* is not there"):
        image.open()


def test_images_are_found_by_their_key_in_another_table(make_suite: MakeSuite, image_hub: dict[Any, Any]) -> None:
    image_hub["o/d", "words", "test"] = datasets.Dataset.from_list(
        [{"key": f"k{n}", "text": f"{n}?", "image": f"i{n // 2}"} for n in range(4)]
    )
    image_hub["o/d", "pictures", "all"] = image_dataset(
        [{"id": f"i{n}", "image": picture(n)} for n in (1, 0)], {"image": ONE}
    )
    table = {"config": "pictures", "split": "all", "key": "id", "image": "image"}
    path = make_suite({**HUB, "config": "words", "images_from": table})
    assert _shown(load_suite(path)) == [[_sha(0)], [_sha(0)], [_sha(1)], [_sha(1)]]
    assert "'images_from' of 'hub' has no column 'ID'" in _refused(path, "sources.hub.images_from.key=ID")
    assert "needs 'fields.images'" in _refused(path, "sources.hub.fields={prompt: text}")
    image_hub["o/d", "pictures", "all"] = image_hub["o/d", "pictures", "all"].select([0])
    assert "there is no image 'i0'" in _refused(path)


def test_lists_of_images_and_empty_ones(make_suite: MakeSuite, image_hub: dict[Any, Any]) -> None:
    shown = {"a": [picture(1), picture(2)], "d": [picture(3)], "h": None, **{key: [] for key in "bcefg"}}
    rows = [{"key": key, "text": "?", "image": shown[key]} for key in "abcdefgh"]
    image_hub["o/d", None, "test"] = image_dataset(rows, {"image": MANY})
    suite = load_suite(make_suite({**HUB, "limit": 2}))
    assert _shown(suite) == [[_sha(1), _sha(2)], [_sha(3)]]
    assert suite.notes == ("6 of 8 rows of 'hub' have no image and are left out.",)


def test_columns_that_are_bytes_are_images_too(make_suite: MakeSuite, image_hub: dict[Any, Any]) -> None:
    rows = [{"key": "a", "text": "?", "image": encoded(picture(1))}]
    image_hub["o/d", None, "test"] = datasets.Dataset.from_list(rows)
    assert _shown(load_suite(make_suite(HUB))) == [[_sha(1)]]
    assert "no column 'picture'" in _refused(make_suite(HUB), "sources.hub.fields.images=picture")
