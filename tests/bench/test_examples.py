"""Which examples a run keeps: the prompts at the median, the text of every token, only pictures that may be kept."""

from __future__ import annotations

import io
import json

import pytest
import yaml
from PIL import Image
from tests.models.tiny_vision import make_tokenizer

from vsdbench.bench.examples import (
    MAX_CATEGORIES,
    MAX_CHARACTERS,
    MAX_SIDE,
    choose,
    keep_examples,
    pieces,
    shortened,
    two_best,
)
from vsdbench.bench.spans import drawn
from vsdbench.errors import ConfigError
from vsdbench.pictures.scenes import CATEGORIES, Scene
from vsdbench.store.examples import load_examples
from vsdbench.store.frames import to_frames
from vsdbench.store.records import hash_tokens
from vsdbench.store.store import RunStore, load_records
from vsdbench.suites.loaders import load_suite
from vsdbench.suites.prompts import make_prompt

TEXT = "Grün \N{EN DASH} 見て 🙂\n"


def decoded(ids):
    return bytes(ids).decode("utf-8", errors="replace")


def step(accepted):
    return (7, 4, accepted, accepted + 1, 1.0, 1.0, 0.1)


def test_pieces_join_to_the_text_and_never_hold_half_a_character():
    tokenizer = make_tokenizer()  # a token a byte
    ids = tokenizer.encode(TEXT)
    assert len(ids) == len(TEXT.encode())
    found = pieces([*ids, tokenizer.eos_token_id], tokenizer.decode)
    assert "".join(found) == f"{TEXT}<|end|>"
    assert found[2:4] == ("", "ü")
    assert found.count("") == len(TEXT.encode()) - len(TEXT)
    cut = pieces(ids[:3], tokenizer.decode)
    assert cut == ("G", "r", "\ufffd")  # the limit fell into a character


def test_the_prompt_at_the_median_of_each_category_is_chosen(make_record):
    prompts = [
        make_prompt(identifier=f"{number}", category=category, turns=["x"], source="s")
        for number, category in enumerate(["b", "a", "b", "a", "b", "c"])
    ]
    kept = {"s/0": 3, "s/1": 0, "s/2": 1, "s/3": 2, "s/4": 2}  # the sixth has no answer
    frames = to_frames([make_record(prompt_id=name, steps=[step(count)] * 3) for name, count in kept.items()])
    assert [prompt.id for prompt in choose(frames, prompts)] == ["s/4", "s/3"]
    many = [make_prompt(identifier=f"{n}", category=f"c{n}", turns=["x"], source="s") for n in range(20)]
    frames = to_frames([make_record(prompt_id=prompt.id, steps=[step(1)]) for prompt in many])
    assert choose(frames, many) == many[:MAX_CATEGORIES]


def test_shown_are_the_best_and_the_best_of_another_name(make_record):
    kept = {"kl@0": 3, "kl@1": 2, "ngram": 1, "weak": 0}
    records = [make_record(method=name, steps=[step(count)] * 2) for name, count in kept.items()]
    sampled = [make_record(method="weak", mode="stochastic", temperature=1.0, steps=[step(4)])]
    plain = [
        make_record(method="autoregressive", kind="baseline", steps=[step(4)]),
        make_record(method="peer", num_output_tokens=9),
    ]
    assert two_best(to_frames([*records, *sampled, *plain]), "greedy", 0.0) == ("kl@0", "ngram")
    assert two_best(to_frames(records[:2]), "greedy", 0.0) == ("kl@0",)


def test_long_prompts_keep_their_beginning_and_their_end():
    text = "Begin. " + "middle " * 300 + "The end."
    short = shortened(text)
    assert len(short) <= MAX_CHARACTERS
    assert short.startswith("Begin. ")
    assert short.endswith("The end.")
    assert shortened("  short ") == "short"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A suite of eight scenes, and of the same pictures as somebody's files."""
    folder = tmp_path_factory.mktemp("suite")
    scenes = {"name": "scenes", "loader": "scenes", "count": 8, "licence": "Apache-2.0"}
    fields = {"prompt": "q", "id": "id", "images": ["image"]}
    files = {"name": "files", "loader": "jsonl", "path": "rows.jsonl", "licence": "unknown", "fields": fields}
    Image.new("RGB", (40, 30), (200, 30, 30)).save(folder / "red.png")
    row = {"id": "red", "q": "Which colour?", "image": "red.png"}
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    suite = {
        "name": "seen", "version": 1, "description": "x", "licence": "x", "sources": [scenes, files],
        "generation": {"max_new_tokens": 8}, "modes": [{"name": "greedy", "temperature": 0, "rule": "greedy"}],
        "drafters": [{"name": "ngram", "type": "ngram"}],
    }  # fmt: skip
    (folder / "seen.yaml").write_text(yaml.safe_dump(suite), encoding="utf-8")
    return load_suite(folder / "seen.yaml")


@pytest.fixture
def write(tmp_path, make_record, pictures):
    """Write a run of the suite, in which every drafter says ``TEXT``."""

    def write(manifest=(), **methods):
        ids = list(TEXT.encode())
        with RunStore.create(tmp_path / "run", {"run_id": "r", **dict(manifest)}) as store:
            for prompt in pictures.prompts:
                for method, (kind, steps) in methods.items():
                    about = {"run_id": "r", "prompt_id": prompt.id, "category": prompt.category, "method": method}
                    about |= {"kind": kind, "num_output_tokens": len(ids), "output_sha256": hash_tokens(ids)}
                    store.append(make_record(steps=steps, **about), ids)
        return store.directory

    return write


def test_a_run_keeps_small_copies_of_drawn_pictures_alone(write, pictures):
    steps = [step(1)] * 10 + [step(0)] * (len(TEXT.encode()) - 21)
    run = write(ngram=("drafter", steps), autoregressive=("baseline", [step(0)] * (len(TEXT.encode()) - 1)))
    kept = keep_examples(run, pictures, decoded)
    assert kept == load_examples(run)
    assert (kept.drafters, kept.mode, kept.temperature) == (("ngram",), "greedy", 0.0)
    assert ["".join(found) for found in kept.pieces.values()] == [TEXT]
    assert [prompt.category for prompt in kept.prompts][: len(CATEGORIES)] == list(CATEGORIES)
    for prompt in kept.prompts[: len(CATEGORIES)]:
        (name,) = prompt.images
        data = (run / name).read_bytes()
        assert len(data) < 20_000
        original = Scene(int(prompt.prompt_id.removeprefix("scenes/")), "suite").image()
        image = Image.open(io.BytesIO(data))
        assert max(image.size) <= MAX_SIDE
        assert image.size == original.size
        assert image.convert("RGB").tobytes() == original.tobytes()
    foreign = kept.prompts[-1]
    assert (foreign.prompt_id, foreign.num_images, foreign.images) == ("files/red", 1, ())
    assert len(list((run / "examples").iterdir())) == len(CATEGORIES)


def test_a_control_that_was_shown_other_pictures_is_not_chosen_but_can_be_asked_for(write, pictures):
    rest = len(TEXT.encode()) - 1
    best, control = [step(2)] * (rest // 3) + [step(0)] * (rest % 3), [step(4)] * (rest // 5) + [step(0)] * (rest % 5)
    manifest = {"methods": [{"name": "blind", "images": "shuffled", "control_of": "best"}, {"name": "best"}]}
    run = write(manifest, blind=("drafter", control), best=("drafter", best))
    kept = keep_examples(run, pictures, decoded)
    assert kept.drafters == ("best",)
    frames = to_frames(load_records(run))
    assert [answer.drafter for answer in drawn(frames, kept, ["blind"])[0].answers] == ["blind"]


def test_without_a_drafter_that_recorded_steps_there_are_none(write, pictures):
    run = write(peer=("drafter", ()))
    assert keep_examples(run, pictures, decoded) is None
    assert load_examples(run) is None
    assert not (run / "examples").exists()


def test_a_spoilt_file_is_one_sentence(tmp_path):
    (tmp_path / "examples.json").write_text('{"schema": 2}', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"examples\.json is not a file of examples of schema 1: schema"):
        load_examples(tmp_path)
