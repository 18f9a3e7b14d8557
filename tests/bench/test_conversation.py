"""A prompt's images are shown with its first turn, and only there."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vsdbench.bench.conversation import check_prompts, encode_turn
from vsdbench.errors import ConfigError
from vsdbench.suites.prompts import make_prompt
from vsdbench.suites.schema import Generation

IMAGES = tuple(SimpleNamespace(sha256=word, open=lambda word=word: word) for word in ("first", "second"))


class Noting:
    """A target that says what it was asked to encode."""

    name, max_positions = "noting", 3

    def encode_chat(self, messages):
        return [(message["role"], message["content"], message.get("images", ())) for message in messages]

    def encode_text(self, text, images=()):
        return [text, list(images)]


def prompt(*turns, images=()):
    return make_prompt(identifier="0", category="c", turns=turns, source="s", images=images)


def test_images_stand_with_the_first_turn():
    generation = Generation(max_new_tokens=4, system="sys")
    seeing = prompt("a", "b", images=IMAGES)
    first = [("system", "sys", ()), ("user", "a", ["first", "second"])]
    assert encode_turn(Noting(), seeing, generation) == first
    assert encode_turn(Noting(), seeing, generation, ["x"]) == [*first, ("assistant", "x", ()), ("user", "b", ())]
    assert encode_turn(Noting(), prompt("a"), Generation(max_new_tokens=4)) == [("user", "a", ())]


def test_without_chat_each_turn_stands_alone():
    bare = Generation(max_new_tokens=4, chat=False)
    seeing = prompt("a", "b", images=IMAGES)
    assert encode_turn(Noting(), seeing, bare) == ["a", ["first", "second"]]
    assert encode_turn(Noting(), seeing, bare, ["x"]) == ["b", []]


def test_a_suite_with_images_is_tried_before_anything_else():
    class Blind(Noting):
        def encode_chat(self, messages):
            if any("images" in message for message in messages):
                raise ConfigError("blind")
            return messages

    config = SimpleNamespace(generation=Generation(max_new_tokens=4))
    check_prompts(Blind(), SimpleNamespace(config=config, prompts=[prompt("a")]))
    with pytest.raises(ConfigError, match="blind"):
        check_prompts(Blind(), SimpleNamespace(config=config, prompts=[prompt("a"), prompt("b", images=IMAGES)]))


@pytest.mark.parametrize(
    ("tokens", "words"), [([], "has no tokens at turn 1"), ([1] * 3, "has 3 tokens at turn 1, but 'noting' holds 3")]
)
def test_prompts_without_tokens_or_room_are_named_before_anything_else(tokens, words):
    class Fixed(Noting):
        def encode_chat(self, messages):
            return tokens if messages[-1]["content"] == "b" else [1, 1]

    config = SimpleNamespace(generation=Generation(max_new_tokens=4))
    with pytest.raises(ConfigError, match=f"The prompt 's/0' {words}"):
        check_prompts(Fixed(), SimpleNamespace(config=config, prompts=[prompt("a"), prompt("b")]))
