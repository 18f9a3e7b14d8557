"""Suite files: every shipped one is valid, and a mistake is answered with what would be right."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from vsdbench.config import parse
from vsdbench.decoding.interfaces import TreeShape
from vsdbench.errors import ConfigError
from vsdbench.suites.schema import DrafterEntry, SuiteConfig, json_schema
from vsdbench.suites.sources import template_columns

MINIMAL: dict[str, Any] = {
    "name": "tiny",
    "version": 1,
    "description": "Two prompts.",
    "licence": "MIT",
    "sources": [
        {"name": "local", "loader": "jsonl", "path": "x.jsonl", "licence": "MIT", "fields": {"prompt": "text"}},
    ],
    "generation": {"max_new_tokens": 8},
    "modes": [{"name": "greedy", "temperature": 0, "rule": "greedy"}],
    "drafters": [{"name": "lookup", "type": "ngram"}],
}
VARIANT = {"category": "c", "template": "Say {prompt}"}
HUB = {"name": "h", "loader": "hub", "repo": "o/d", "split": "test", "licence": "MIT", "fields": {"prompt": "text"}}


def _suite(**changes: object) -> SuiteConfig:
    return parse(SuiteConfig, {**copy.deepcopy(MINIMAL), **changes}, where="tiny.yaml")


def test_the_defaults_are_the_documented_ones() -> None:
    suite = _suite()
    assert suite.target == "smollm2-135m-q4"
    assert suite.baselines == ["autoregressive", "hf-generate"]
    assert (suite.repeats, suite.seed, suite.generation.chat, suite.sources[0].template) == (2, 0, True, "{prompt}")
    tree = suite.drafters[0].tree
    assert (tree.kind, tree.budget, tree.depth, tree.top_k) == ("dynamic", 7, 4, 4)


def test_what_is_compiled_is_one_row_and_the_trees() -> None:
    sized = [{"name": "a", "type": "ngram", "tree": {"budget": 11}}, {"name": "b", "type": "ngram"}]
    assert _suite(drafters=sized).compiled_rows == []
    assert _suite(drafters=sized, compile=True).compiled_rows == [1, 8, 12]
    sized[0]["tree"] = {"kind": "auto", "budget": 14}
    assert _suite(drafters=sized, compile=True).compiled_rows == [1, 4, 8, 15]
    with pytest.raises(ConfigError, match="leave compile out"):
        _suite(compile=True, batch_sizes=[1, 2])


@pytest.mark.parametrize(
    ("name", "temperature", "rule", "expected"),
    [
        ("greedy", 0, "coupled", "temperature 0 does not go with the rule 'coupled'"),
        ("stochastic", 1, "greedy", "temperature 1 does not go with the rule 'greedy'"),
        ("greedy", 0.7, "rejection", "a mode with temperature 0.7 is named 'stochastic', not 'greedy'"),
        ("stochastic", 0, "greedy", "a mode with temperature 0 is named 'greedy', not 'stochastic'"),
        ("stochastic", -1, "coupled", "'modes.0.temperature' is -1"),
    ],
)
def test_temperature_rule_and_name_of_a_mode_agree(name: str, temperature: float, rule: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _suite(modes=[{"name": name, "temperature": temperature, "rule": rule}])
    assert expected in str(caught.value)


@pytest.mark.parametrize("rule", ["coupled", "rejection", "traversal"])
def test_the_stochastic_rules_are_accepted(rule: str) -> None:
    suite = _suite(modes=[{"name": "stochastic", "temperature": 1, "rule": rule, "top_p": 0.9, "sampling_top_k": 50}])
    assert suite.modes[0].rule == rule


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"drafters": [{"name": "a", "type": "ngram"}] * 2}, "the name 'a' is used twice among the drafters"),
        ({"drafters": [{"name": "hf-generate", "type": "ngram"}]}, "the name 'hf-generate' is used twice"),
        ({"sources": MINIMAL["sources"] * 2}, "the name 'local' is used twice among the sources"),
        ({"baselines": ["autoregressive"] * 2}, "the name 'autoregressive' is used twice"),
        ({"baselines": ["hf-generate"]}, "baselines is ['hf-generate']: 'autoregressive' must be among them"),
        (
            {"baselines": ["autoregressive"], "once": ["hf-generate"]},
            "once is ['hf-generate'], but 'hf-generate' is not among the baselines ['autoregressive']: add it there",
        ),
        ({"sources": []}, "'sources' is []"),
        ({"drafters": [{"name": "a b", "type": "ngram"}]}, "'drafters.0.name' is 'a b': it should match pattern"),
        ({"drafters": [{"name": "a", "type": "ngram", "tree": {"depth": 8}}]}, "depth 8 does not fit a budget of 7"),
        (
            {"drafters": [{"name": "a", "type": "ngram", "tree": {"kind": "chain", "min_node_prob": 0.1}}]},
            "a tree of kind 'chain' does not grow by probabilities: min_node_prob and min_level_prob are for 'dynamic'",
        ),
        (
            {"drafters": [{"name": "a", "type": "ngram", "tree": {"kind": "auto", "min_level_prob": 0.1}}]},
            "a tree of kind 'auto' finds its own: min_node_prob and min_level_prob are for 'dynamic' and 'coupled'",
        ),
        (
            {"drafters": [{"name": "a", "type": "ngram", "tree": {"min_node_prob": 1.5}}]},
            "'drafters.0.tree.min_node_prob' is 1.5: it should be less than 1",
        ),
        (
            {"drafters": [{"name": "a", "type": "ngram", "tree": {"kind": "Auto"}}]},
            "'drafters.0.tree.kind' is 'Auto': it should be 'chain', 'static', 'dynamic', 'coupled', 'sampled' or "
            "'auto'",
        ),
        (
            {"drafters": [{"name": "a", "type": "ngram", "tree": "Auto"}]},
            "'drafters.0.tree' is 'Auto': it should be 'auto', or a mapping such as {kind: dynamic, budget: 7}",
        ),
        (
            {
                "drafters": [{"name": "a", "type": "ngram", "tree": {"kind": "coupled"}}],
                "modes": [{"name": "stochastic", "temperature": 1, "rule": "rejection"}],
            },
            "drafter 'a' has a tree of kind 'coupled', which reads the numbers of the rule 'coupled', but mode "
            "'stochastic' has the rule 'rejection'",
        ),
        ({"generation": 7}, "'generation' is 7: it should be a mapping of keys to values"),
        ({"repeats": 0}, "'repeats' is 0: it should be greater than or equal to 1"),
        ({"sources": [{**HUB, "fields": {}}]}, "exactly one of 'prompt' (a text column) and 'turns'"),
        ({"sources": [{**HUB, "fields": {"prompt": "a", "turns": "b"}}]}, "exactly one of 'prompt'"),
        (
            {"sources": [{**HUB, "fields": {"prompt": "a", "category": "b", "constant_category": "c"}}]},
            "'category' (a column) and 'constant_category' exclude each other",
        ),
        ({"sources": [{**HUB, "where": {"part": "suite"}}]}, "'part_by' (a column) and 'part'"),
        ({"sources": [{**HUB, "where": {}}]}, "keeps every row; leave it out"),
        ({"sources": [{**HUB, "variants": [VARIANT], "template": "Say {prompt}"}]}, "leave 'template' and those out"),
        (
            {"sources": [{**HUB, "variants": [VARIANT], "fields": {"prompt": "a", "category": "b"}}]},
            "'variants' have templates and categories of their own",
        ),
        ({"sources": [{**HUB, "variants": [{**VARIANT, "template": "none"}]}]}, "the template must have {prompt}"),
        ({"sources": [{**HUB, "variants": [{**VARIANT, "name": "x"}]}]}, "unknown key 'sources.0.variants.0.name'"),
        (
            {"sources": [{**HUB, "max_characters": 9, "fields": {"turns": "a"}}]},
            "are about the column 'fields.prompt'; name one",
        ),
        ({"sources": [{**HUB, "template": "no column"}]}, "the template must have {prompt}"),
        ({"sources": [{**HUB, "template": "{prompt.x}"}]}, "'{prompt.x}' is not a plain column name"),
        ({"sources": [{**HUB, "template": "{prompt"}]}, "'sources.0.template' is '{prompt'"),
        (
            {"sources": [{**HUB, "fallback": {**MINIMAL["sources"][0], "name": "h"}}]},
            "it must not have the source's name 'h' too",
        ),
        ({"sources": [{**HUB, "fallback": {**HUB, "name": "i"}}]}, "'sources.0.fallback.loader' is 'hub'"),
        (
            {"sources": [{**HUB, "revison": "v1"}]},
            "unknown key 'sources.0.revison' (value 'v1'). Did you mean 'revision'?",
        ),
    ],
)
def test_a_mistake_is_answered_with_what_would_be_right(changes: dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _suite(**changes)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_template_columns_reads_braces_and_lets_doubled_ones_be() -> None:
    assert template_columns("{prompt} \\boxed{{}} {context}") == ["prompt", "context"]


def test_the_json_schema_describes_every_key() -> None:
    schema = json_schema()
    assert set(schema["properties"]) == set(SuiteConfig.model_fields)
    assert schema["additionalProperties"] is False
    assert {"HubSource", "WheelSource", "JsonlSource"} <= set(schema["$defs"])


def test_a_resolved_suite_reads_back_the_same(tmp_path: Path) -> None:
    suite = _suite()
    assert parse(SuiteConfig, suite.model_dump(mode="json"), where="again") == suite


def test_options_that_are_not_used_leave_no_trace_in_what_is_hashed() -> None:
    """Runs and kept prompts are found again by this content, also those from before the options came."""
    plain = parse(SuiteConfig, MINIMAL, where="tiny.yaml").model_dump(mode="json")["sources"][0]
    assert set(plain) == {"name", "licence", "fields", "template", "limit", "max_turns", "loader", "path"}
    source = {**MINIMAL["sources"][0], "where": {"min_characters": 3}, "max_characters": 9, "variants": [VARIANT]}
    suite = _suite(sources=[source])
    dumped = suite.model_dump(mode="json")
    assert dumped["sources"][0]["variants"] == [VARIANT]
    assert dumped["sources"][0]["where"] == {"part_by": None, "part": None, "min_characters": 3}
    assert set(dumped["sources"][0]["fields"]) == {"prompt", "turns", "category", "constant_category", "id"}
    assert parse(SuiteConfig, dumped, where="again") == suite


def test_thresholds_are_written_only_where_there_are_some():
    plain = DrafterEntry(name="a", type="ngram", tree={"budget": 9}).model_dump()["tree"]
    assert plain == {"kind": "dynamic", "budget": 9, "depth": 4, "top_k": 4}
    least = DrafterEntry(name="a", type="ngram", tree={"budget": 9, "min_node_prob": 0.1})
    assert least.model_dump()["tree"] == {**plain, "min_node_prob": 0.1}
    assert least.tree.shape() == TreeShape(budget=9, min_node_prob=0.1)


def test_a_suite_that_repeats_all_is_written_as_before() -> None:
    assert "once" not in _suite().model_dump(mode="json")
    suite = _suite(once=["hf-generate"], repeats=3)
    assert suite.model_dump(mode="json")["once"] == ["hf-generate"]
    assert [suite.repeats_of(name) for name in ("autoregressive", "hf-generate")] == [3, 1]
