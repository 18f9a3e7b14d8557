"""The negative control: which pictures are exchanged, what of it a drafter notices, and that answers stay the same."""

from __future__ import annotations

import pytest
import torch
from tests.drafters.test_eagle import random_weights
from tests.models.tiny_vision import VOCAB, make_image, make_target

from vsdbench.bench.conversation import encode_turn
from vsdbench.bench.exchange import Misled, exchanged_prompts
from vsdbench.decoding.engine import Autoregressive, DecodeSettings, decode
from vsdbench.decoding.interfaces import TreeShape
from vsdbench.errors import ConfigError
from vsdbench.suites.images import reference
from vsdbench.suites.loaders import Suite
from vsdbench.suites.prompts import make_prompt, prompts_sha256
from vsdbench.suites.schema import SuiteConfig, control_of
from vsdbench_drafters.architectures.draft_model import DraftModelDrafter
from vsdbench_drafters.architectures.eagle3 import Eagle3Model
from vsdbench_drafters.architectures.msd import MsdModel
from vsdbench_drafters.architectures.ngram import NgramDrafter
from vsdbench_drafters.architectures.vispec import ViSpecModel

IDS = torch.arange(20, 120)
SHAPE = TreeShape(kind="dynamic", budget=6, depth=3, top_k=2)
SETTINGS = DecodeSettings(max_new_tokens=10, shape=SHAPE, eos_ids=frozenset())


def config(seed=0):
    return SuiteConfig.model_validate(
        {
            "name": "seen",
            "version": 1,
            "description": "x",
            "licence": "x",
            "seed": seed,
            "sources": [{"name": "s", "loader": "scenes", "count": 1, "licence": "x"}],
            "generation": {"max_new_tokens": 8},
            "modes": [{"name": "greedy", "temperature": 0, "rule": "greedy"}],
            "drafters": [{"name": "n", "type": "ngram"}, {"name": "c", "type": "ngram", "images": "shuffled"}],
        }
    )


def suite_of(pictures, **changes):
    """A suite of prompts that show these images, given by number."""
    prompts = tuple(
        make_prompt(
            identifier=f"{n}", category="c", turns=["What?"], source="s", images=[picture(*one) for one in shown]
        )
        for n, shown in enumerate(pictures)
    )
    return Suite(config=config(**changes), prompts=prompts, notes=(), prompts_sha256=prompts_sha256(prompts), path=None)


def picture(number, size=(24, 20)):
    return reference(make_image(number, size), f"picture {number}")


def pixels(prompt):
    return [image.sha256 for image in prompt.images]


@pytest.mark.parametrize("seed", range(4))
def test_every_prompt_shows_as_many_other_pictures(seed):
    suite = suite_of(
        [[(n % 7,)] for n in range(12)] + [[(8,), (9,)], [(9,), (10,)], [(11,), (12,)], [(13,), (14,)], []], seed=seed
    )
    others = exchanged_prompts(suite)
    assert others == exchanged_prompts(suite)
    seeing = [prompt for prompt in suite.prompts if prompt.images]
    assert set(others) == {prompt.id for prompt in seeing}
    for prompt in seeing:
        other = others[prompt.id]
        assert len(other.images) == len(prompt.images)
        assert not set(pixels(other)) & set(pixels(prompt))
        assert (other.turns, other.id, other.category) == (prompt.turns, prompt.id, prompt.category)
    by_own = {tuple(pixels(prompt)): tuple(pixels(others[prompt.id])) for prompt in seeing}
    assert len(set(by_own.values())) == len(by_own)  # everybody's picture is somebody's, once
    assert all(tuple(pixels(others[prompt.id])) == by_own[tuple(pixels(prompt))] for prompt in seeing)


def test_the_seed_decides():
    pictures = [[(n,)] for n in range(6)]
    of_seed = [exchanged_prompts(suite_of(pictures, seed=seed)).values() for seed in range(8)]
    found = {tuple(pixels(other)[0] for other in others) for others in of_seed}
    assert len(found) > 1


def test_pictures_of_other_sizes_are_scaled():
    suite = suite_of([[(0, (24, 20))], [(1, (48, 20))]])
    others = exchanged_prompts(suite)
    for prompt in suite.prompts:
        (image,) = others[prompt.id].images
        assert image.open().size == prompt.images[0].open().size
        assert image.name.endswith("scaled")


def test_what_cannot_be_exchanged_is_one_sentence():
    with pytest.raises(ConfigError, match="this suite has none: leave it out"):
        exchanged_prompts(suite_of([[], []]))
    with pytest.raises(ConfigError, match="those with 1 picture show too few different ones"):
        exchanged_prompts(suite_of([[(0,)], [(0,)], [(1,), (2,)]]))
    with pytest.raises(ConfigError, match="those with 2 pictures show too few different ones"):
        exchanged_prompts(suite_of([[(0,), (1,)], [(1,), (0,)]]))


# --- what a drafter notices ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def target():
    return make_target("llava", dtype=torch.float32)


@pytest.fixture(scope="module")
def prompts(target):
    """The same words with one picture and with another."""
    suite = suite_of([[(0,)], [(1,)]])
    other = exchanged_prompts(suite)[suite.prompts[0].id]
    return [encode_turn(target, prompt, suite.config.generation) for prompt in (suite.prompts[0], other)]


MAKERS = {
    "eagle3": lambda target: random_weights(Eagle3Model.from_target(target, IDS, seed=0)).drafter(torch.float32),
    "msd": lambda target: random_weights(MsdModel.from_target(target, IDS, seed=0)).drafter(torch.float32),
    "vispec": lambda target: random_weights(ViSpecModel.from_target(target, IDS, seed=0)).drafter(torch.float32),
    "draft_model": lambda target: DraftModelDrafter(make_target("llava", dtype=torch.float32), target.vocab_size),
    "ngram": lambda _target: NgramDrafter(VOCAB),
}


class Watched:
    """A drafter whose proposals are kept."""

    def __init__(self, drafter):
        self.drafter, self.name, self.trees = drafter, drafter.name, []

    def begin(self, state, max_length):
        self.drafter.begin(state, max_length)

    def propose(self, state, shape, **options):
        tree = self.drafter.propose(state, shape, **options)
        self.trees.append((tree.tokens.tolist(), tree.log_probs.tolist()))
        return tree

    def commit(self, state, num_accepted, features):
        self.drafter.commit(state, num_accepted, features)


def decoded(target, drafter, prompt, shown=None):
    """The answer to a prompt and all that was proposed for it, the drafter shown another one."""
    watched = Watched(drafter)
    misled = Misled(target, watched)
    if shown is not None:
        misled.show(shown)
    return decode(target, misled, prompt, SETTINGS).token_ids, watched.trees


@pytest.mark.parametrize("name", MAKERS)
def test_who_sees_drafts_otherwise_and_the_answer_is_the_same(target, prompts, name):
    drafter = MAKERS[name](target)
    plain = decode(target, Autoregressive(), prompts[0], SETTINGS).token_ids
    answer, trees = decoded(target, drafter, prompts[0])
    same, same_trees = decoded(target, drafter, prompts[0], shown=prompts[0])
    assert (same, same_trees) == (answer, trees)  # the detour alone changes nothing
    misled, other_trees = decoded(target, drafter, prompts[0], shown=prompts[1])
    assert misled == answer == plain
    assert (other_trees == trees) == (name == "ngram")
    again, again_trees = decoded(target, drafter, prompts[0])
    assert (again, again_trees) == (answer, trees)  # what was shown is gone with its sequence


def test_a_model_that_drafts_for_itself_falls_when_it_is_misled(target, prompts):
    drafter = MAKERS["draft_model"](target)
    seeing, misled = Misled(target, drafter), Misled(target, drafter)
    misled.show(prompts[1])
    accepted = [
        sum(step.num_accepted for step in decode(target, one, prompts[0], SETTINGS).steps) for one in (seeing, misled)
    ]
    assert accepted[0] > accepted[1]


def test_other_tokens_are_refused(target, prompts):
    longer = prompts[1].followed_by([30])
    with pytest.raises(ConfigError, match=f"has {len(longer) - 1} tokens with its own pictures and {len(longer)} with"):
        decoded(target, MAKERS["ngram"](target), prompts[0], shown=longer)


# --- in a suite ----------------------------------------------------------------------------------------------------


def entry(**changes):
    return config().drafters[0].model_copy(update=changes)


def test_a_control_belongs_to_the_twin_that_sees_its_own_pictures():
    recipe = {"type": "msd", "recipe": "contest-pictures:msd-kl@0"}
    drafters = [
        entry(name="kl@0", **recipe),
        entry(name="kl@1", type="msd", recipe="contest-pictures:msd-kl@1"),
        entry(name="kl-blind@0", images="shuffled", **recipe),
        entry(name="other", images="shuffled", type="vispec"),
    ]
    assert [control_of(drafter, drafters) for drafter in drafters] == [None, None, "kl@0", None]


def test_own_pictures_go_without_saying_so_that_old_runs_are_the_same():
    written = config().model_dump(mode="json")["drafters"]
    assert "images" not in written[0]
    assert written[1]["images"] == "shuffled"
    assert SuiteConfig.model_validate(config().model_dump(mode="json")) == config()


def test_an_automatic_tree_would_not_be_the_same_one():
    content = config().model_dump(mode="json")
    content["drafters"][1]["tree"] = {"kind": "auto"}
    with pytest.raises(ValueError, match="an automatic tree is chosen by measuring"):
        SuiteConfig.model_validate(content)
