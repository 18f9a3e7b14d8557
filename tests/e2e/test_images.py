"""``vsdbench run`` of a suite with images on a tiny LLaVA from a folder."""

from __future__ import annotations

import json

import pytest
from tests.e2e.workspace import METHODS, Workspace, lines_of
from tests.models.tiny_vision import make_image, make_parts

from vsdbench.store.examples import load_examples
from vsdbench.store.store import load_records

PROMPTS = [
    {"id": "one", "category": "caption", "turns": ["What is it?"], "images": "img/1.png"},
    {"id": "two", "category": "caption", "turns": ["Which is it?", "And why?"], "images": ["img/1.png", "img/2.png"]},
    {"id": "three", "category": "count", "turns": ["How many?"], "images": "img/3.png"},
]
IMAGE_TOKENS = {("one", 0): 16, ("two", 0): 32, ("two", 1): 32, ("three", 0): 16}
FIELDS = {"turns": "turns", "category": "category", "id": "id", "images": "images"}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    model, processor = make_parts("llava")
    model.float().save_pretrained(folder)
    processor.save_pretrained(folder)
    workspace = Workspace(tmp_path_factory.mktemp("images"), folder)
    (workspace.folder / "img").mkdir()
    for number in (1, 2, 3):
        make_image(number).save(workspace.folder / "img" / f"{number}.png")
    workspace.write_prompts(PROMPTS)
    source = {"name": "local", "loader": "jsonl", "path": "prompts.jsonl", "licence": "CC0-1.0", "fields": FIELDS}
    workspace.suite = workspace.write_suite(sources=[source], generation={"max_new_tokens": 12}, repeats=1)
    return workspace


@pytest.fixture(scope="module")
def finished(workspace):
    return workspace.run("--categories")


def test_answers_about_images_are_lossless_in_every_turn(workspace, finished):
    assert finished.code == 0, finished.said
    for words in (*METHODS, "caption", "count"):
        assert words in finished.out
    records = load_records(workspace.only_run)
    assert len(records) == 4 * 2 * len(METHODS)
    assert {record.lossless for record in records} == {"reference", "equal"}
    for record in records:
        assert record.num_image_tokens == IMAGE_TOKENS[record.prompt_id.removeprefix("local/"), record.turn]
        assert record.num_prompt_tokens > record.num_image_tokens
    greedy = [record for record in records if (record.method, record.mode) == ("itself", "greedy")]
    assert sum(sum(record.steps.num_accepted) for record in greedy) > sum(len(record.steps) for record in greedy)


def outputs(run):
    return {
        (line["prompt_id"], line["turn"]): line["output_sha256"]
        for line in lines_of(run)
        if line["method"] == "autoregressive" and line["mode"] == "greedy"
    }


def test_another_picture_has_another_answer(workspace, finished):
    first_run = workspace.only_run
    make_image(9).save(workspace.folder / "img" / "3.png")
    try:
        again = workspace.run(
            "modes=[{name: greedy, temperature: 0, rule: greedy}]", "drafters=[{name: a, type: ngram}]"
        )
    finally:
        make_image(3).save(workspace.folder / "img" / "3.png")
    assert again.code == 0, again.said
    (run,) = [path.parent for path in workspace.runs if path.parent != first_run]
    changed = {key for key, output in outputs(run).items() if output != outputs(first_run)[key]}
    assert changed == {("local/three", 0)}


def test_a_text_target_refuses_them_in_one_sentence(workspace, tiny_model):
    result = workspace.run("--target", str(tiny_model))
    assert result.code == 2
    assert "The prompt has 1 image and" in result.said
    assert "reads text alone" in result.said


def test_a_drafter_that_is_shown_other_pictures_falls_and_answers_stay(workspace):
    rows = [{"id": f"{n}", "category": "c", "turns": ["What is it?"], "images": f"img/{n}.png"} for n in (1, 2, 3)]
    workspace.write_prompts(rows, "seen.jsonl")
    source = {"name": "local", "loader": "jsonl", "path": "seen.jsonl", "licence": "CC0-1.0", "fields": FIELDS}
    itself = {"type": "draft_model", "options": {"model": str(workspace.model)}}
    drafters = [{"name": "itself", **itself}, {"name": "misled", **itself, "images": "shuffled"}]
    greedy = [{"name": "greedy", "temperature": 0, "rule": "greedy"}]
    settings = {"generation": {"max_new_tokens": 12}, "repeats": 1, "baselines": ["autoregressive"], "modes": greedy}
    suite = workspace.write_suite("seen", sources=[source], drafters=drafters, **settings)
    result = workspace.run("--json", suite=suite)
    assert result.code == 0, result.said
    summary = json.loads(result.out)
    (entry,) = summary["image_controls"]
    assert (entry["drafter"], entry["control"], entry["num_prompts"]) == ("itself", "misled", 3)
    assert entry["tau_shuffled"] < entry["tau"]
    (run,) = (path.parent for path in workspace.runs if path.parent.name.startswith("seen-"))
    assert {record.lossless for record in load_records(run)} <= {"reference", "equal"}
    foreign = load_examples(run).prompts[0]
    assert (foreign.num_images, foreign.images) == (1, ())
    few = workspace.run("--limit", "1", suite=suite)
    assert few.code == 2
    assert "show too few different ones: take more prompts" in few.said


def test_what_it_would_take_counts_the_images(workspace):
    result = workspace.run("--dry-run", "--json")
    assert result.code == 0, result.said
    assert json.loads(result.out)["num_prompts"] == 3
