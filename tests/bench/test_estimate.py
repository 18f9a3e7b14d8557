"""The estimate: arithmetic with the timings given, and timings of a tiny model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig

from vsdbench import registry
from vsdbench.bench import estimate as module
from vsdbench.bench.run import RunOptions
from vsdbench.errors import ConfigError, EnvironmentProblemError
from vsdbench.models.target import Target
from vsdbench.suites.prompts import make_prompt
from vsdbench.suites.schema import DrafterEntry

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def target():
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=128, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, **shape)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return Target(model, None, name="toy", fingerprint="0" * 16)


@pytest.fixture
def config(monkeypatch, target):
    """A suite of two prompts with three turns, whose drafters a test may set."""
    config = SimpleNamespace(
        name="toy",
        target="toy",
        modes=["greedy", "stochastic"],
        repeats=2,
        generation=SimpleNamespace(max_new_tokens=20),
        baselines=["autoregressive", "hf-generate"],
        batch_sizes=[1],
        drafters=[DrafterEntry(name="ngram", type="ngram")],
        peers=[],
        once=[],
        repeats_of=lambda method: 1 if method in config.once else config.repeats,
    )
    prompts = [
        make_prompt(identifier=str(number), category="c", turns=turns, source="s")
        for number, turns in enumerate([("one",), ("two", "three")])
    ]
    suite = SimpleNamespace(config=config, prompts=prompts)
    monkeypatch.setattr(module, "open_suite", lambda name, options, console: suite)
    monkeypatch.setattr(module, "load_target", lambda name, options, console: target)
    return config


@pytest.fixture
def timings(monkeypatch):
    """A prefill of 0.5 s, a step of 0.1 s, a tree forward of 0.2 s."""
    monkeypatch.setattr(module, "_autoregressive", lambda target, context: (0.5, 0.1))
    monkeypatch.setattr(module, "_tree_forward_s", lambda target, budget: 0.2)


@pytest.fixture
def trainers(monkeypatch, target):
    """Recipes that cost 100 s of training and share 40 s of data; 'done' is in the cache."""
    real = registry.load
    monkeypatch.setattr(module, "product_flops", lambda device, dtype: 1e11)
    monkeypatch.setattr(module, "TRAINED_FOR", sum(p.numel() for p in target.model.parameters()))

    def load(group, name):
        if (group, name) == ("vsdbench.trainers", "load"):
            return lambda recipe, overrides: recipe
        if (group, name) == ("vsdbench.trainers", "estimate"):
            return lambda recipe, flops: {
                "training_s": 1e13 / flops,
                "data_s": 40.0,
                "data_key": "shared",
                "cached": recipe == "done",
                "bytes": 5,
                "slot_columns": 0 if recipe == "done" else 1000,
                "keeps_states": recipe != "bare",
            }
        return real(group, name)

    monkeypatch.setattr(registry, "load", load)


def seconds(result):
    return {method["name"]: method["seconds"] for method in result["methods"]}


def test_time_is_decodes_times_what_one_was_measured_to_take(config, timings):
    result = module.estimate("toy", RunOptions(), QUIET)
    decodes = 3 * 2 * 2  # turns x modes x repeats
    tokens = decodes * 20 * module.ANSWER_FILL
    plain = decodes * 0.5 + tokens * 0.1
    drafted = decodes * 0.5 + tokens / module.TAU_UNTRAINED * 0.2
    assert seconds(result) == pytest.approx({"autoregressive": plain, "hf-generate": plain, "ngram": drafted})
    assert result["num_decodes"] == decodes * 3
    assert result["seconds"] == pytest.approx(2 * plain + drafted + module.SECONDS_OUTSIDE)
    assert result["training"] == []


def test_a_baseline_that_is_measured_once_takes_half_of_the_time(config, timings):
    config.once = ["hf-generate"]
    result = module.estimate("toy", RunOptions(), QUIET)
    found = seconds(result)
    assert found["hf-generate"] == pytest.approx(found["autoregressive"] / 2)
    assert result["num_decodes"] == 3 * 2 * (2 + 1 + 2)  # turns x modes x repeats of each method


def test_a_drafter_with_a_model_pays_for_drafting_and_accepts_more(config, timings):
    config.drafters = [DrafterEntry(name="m", type="draft_model", options={"model": "x"})]
    tokens = 12 * 20 * module.ANSWER_FILL
    step = 0.2 + module.DRAFT_SHARE * 0.1 * 4
    expected = 12 * 0.5 + tokens / module.TAU_TRAINED * step
    assert seconds(module.estimate("toy", RunOptions(), QUIET))["m"] == pytest.approx(expected)


def test_batches_are_added(config, timings):
    config.batch_sizes = [1, 4]
    tokens = 12 * 20 * module.ANSWER_FILL
    expected = 4 * 12 * 0.5 + tokens * 0.2 * (1 + 1 / 4) * (1 + 1 / module.TAU_UNTRAINED)
    result = module.estimate("toy", RunOptions(), QUIET)
    assert seconds(result)["in batches"] == pytest.approx(expected)
    assert result["num_decodes"] == 12 * 3


def test_shared_data_is_counted_once_and_what_is_cached_not_at_all(config, timings, trainers):
    config.drafters = [
        DrafterEntry(name=name, type="eagle3", recipe=recipe, checkpoint=checkpoint)
        for name, recipe, checkpoint in [("a", "new", None), ("b", "other", None), ("c", "done", None), ("d", "x", "y")]
    ]
    result = module.estimate("toy", RunOptions(), QUIET)
    assert [(t["recipe"], t["seconds"], t["cached"]) for t in result["training"]] == [
        ("new", 140.0, False),
        ("other", 100.0, False),
        ("done", 100.0, True),
    ]
    assert result["seconds"] == pytest.approx(sum(seconds(result).values()) + 240 + module.SECONDS_OUTSIDE)


def test_training_takes_longer_for_larger_targets(config, timings, trainers, monkeypatch):
    monkeypatch.setattr(module, "TRAINED_FOR", module.TRAINED_FOR / 3)
    config.drafters = [DrafterEntry(name="a", type="eagle3", recipe="new")]
    [training] = module.estimate("toy", RunOptions(), QUIET)["training"]
    assert training["seconds"] == pytest.approx(3 * 100 + 40)


def test_memory_has_room_for_the_answers_that_are_made_side_by_side(config, timings, trainers, target, monkeypatch):
    monkeypatch.setattr(module, "TRAINING_BYTES", 0)
    layers, heads, width, hidden = 3, 2, 8, 16
    keys, states = 1000 * layers * 2 * heads * width * 4, 1000 * 4 * hidden * 4  # float32

    def more(*names):
        config.drafters = [DrafterEntry(name=name, type="eagle3", recipe=name) for name in names]
        training = module.estimate("toy", RunOptions(), QUIET)["training"]
        return module._memory_bytes(target, 64, training, 0) - module._memory_bytes(target, 64, [], 0)

    assert (more("new"), more("bare"), more("done")) == (keys + states, keys, 0)
    assert more("bare", "new", "other") == keys + states  # one after the other


def test_an_unknown_drafter_is_refused_before_the_target_is_loaded(config, monkeypatch):
    monkeypatch.setattr(module, "load_target", lambda *_: pytest.fail("the target was loaded"))
    config.drafters = [DrafterEntry(name="a", type="ngran")]
    with pytest.raises(ConfigError, match="Did you mean 'ngram'"):
        module.estimate("toy", RunOptions(), QUIET)


def test_measured_for_real_everything_is_positive_and_finite(config, target):
    result = module.estimate("toy", RunOptions(), QUIET)
    assert all(0 < value < 60 for value in seconds(result).values())
    assert (result["target"], result["device"], result["dtype"]) == ("toy", "cpu", "float32")
    weights = sum(parameter.nbytes for parameter in target.model.parameters())
    assert weights < result["memory_bytes"] < module.loaded_bytes(target.device) + 1e9


def test_memory_of_a_target_without_grouped_heads(target, monkeypatch):
    plain = SimpleNamespace(hidden_size=16, num_attention_heads=2)
    monkeypatch.setattr(target, "config", plain)
    alone = module._memory_bytes(target, 64, [], 0)
    both_caches = 2 * 2 * 3 * 2 * 8 * 64 * 4  # K and V of 64 rows, ours and the one of generate
    assert module._memory_bytes(target, 128, [], 0) - alone == both_caches
    assert module._memory_bytes(target, 64, [], 1) > alone


def test_the_table_has_a_line_a_step(config, timings, trainers, capsys):
    config.drafters = [DrafterEntry(name=name, type="eagle3", recipe=name) for name in ("new", "done")]
    module.print_estimate(module.estimate("toy", RunOptions(), QUIET), Console(width=120))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["train", "new", "2.3", "min"] in lines
    assert ["train", "done", "in", "the", "cache"] in lines
    assert [line[:2] for line in lines if line[:1] == ["decode"]] == [
        ["decode", name] for name in ("autoregressive", "hf-generate", "new", "done")
    ]


def test_a_target_that_is_not_built_is_not_built_for_an_estimate(config, monkeypatch, tmp_path):
    monkeypatch.setenv("VSDBENCH_CACHE", str(tmp_path))
    config.target = "smolvision"
    with pytest.raises(EnvironmentProblemError, match=r"'smolvision' is not built.*vsdbench models build smolvision"):
        module.estimate("toy", RunOptions(), QUIET)
