"""The runner with methods and a target that are plain functions: order, seeds, conversations, resuming."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vsdbench.bench.methods import Method
from vsdbench.bench.runner import WARMUP_TOKENS, Runner
from vsdbench.decoding.interfaces import Drafted, Generation, StepRecord, TreeShape
from vsdbench.errors import ConfigError
from vsdbench.store.store import RunStore, load_outputs, load_records
from vsdbench.suites.prompts import make_prompt
from vsdbench.suites.schema import Generation as GenerationConfig
from vsdbench.suites.schema import Mode

GREEDY = Mode(name="greedy", temperature=0, rule="greedy")
COUPLED = Mode(name="stochastic", temperature=0.5, rule="coupled", top_p=0.9)
NAMES = ("autoregressive", "hf-generate", "one", "two")


class ToyTarget:
    """Letters are tokens; a replayed prefix gives flat logits, so that every divergence is a tie."""

    name, fingerprint, attention, template_hash = "toy", "0" * 16, "none", "1" * 16
    dtype, max_positions, compiled_layers = torch.float32, 200, None

    def __init__(self):
        self.conversations = []
        self.tokenizer = SimpleNamespace(decode=self.decode)

    @staticmethod
    def decode(ids, skip_special_tokens):
        return "".join(chr(i) for i in ids if not (skip_special_tokens and chr(i) == "$"))

    def encode_chat(self, messages):
        self.conversations.append([(message["role"], message["content"]) for message in messages])
        return [ord(letter) for message in messages for letter in message["content"]]

    def encode_text(self, text, images=()):
        return [ord(letter) for letter in text]

    def prefill(self, tokens, max_length):
        return SimpleNamespace(next_logits=torch.zeros(256))


class Bench:
    """A runner in a folder, with every call of its methods noted."""

    def __init__(self, folder, *, turns=(("ab",), ("cd", "ef")), modes=(GREEDY,), repeats=2, seed=0, once=(), **say):
        generation = GenerationConfig(**({"max_new_tokens": 12} | say))
        config = SimpleNamespace(
            name="toy", version=3, generation=generation, modes=list(modes), repeats=repeats, seed=seed,
            repeats_of=lambda method: 1 if method in once else repeats, compile=False,
        )  # fmt: skip
        prompts = [
            make_prompt(identifier=str(number), category="chat", turns=texts, source="s")
            for number, texts in enumerate(turns)
        ]
        self.suite = SimpleNamespace(config=config, prompts=tuple(prompts))
        self.target, self.calls, self.answers = ToyTarget(), [], {}
        self.methods = [self.method(name) for name in NAMES]
        exists = (folder / "manifest.json").exists()
        self.store = RunStore.open(folder) if exists else RunStore.create(folder, {"run_id": "run-1"})

    def method(self, name):
        def run(prompt, settings):
            self.calls.append((name, list(prompt), settings))
            tokens = self.answers.get(name, [ord("x"), ord("y")])
            steps = [] if name == "hf-generate" else [StepRecord(1, 1, 0, 1, 0.1, 0.2, 0.0)] * (len(tokens) - 1)
            return Generation(token_ids=tokens, stop_reason="eos", prefill_s=0.1, decode_s=0.2, steps=steps)

        kind = "baseline" if name in {"autoregressive", "hf-generate"} else "drafter"
        return Method(name=name, kind=kind, run=run, shape=TreeShape(budget=3, depth=2) if kind == "drafter" else None)

    def run(self, on_progress=None):
        with self.store:
            self.runner = Runner(self.suite, self.target, self.methods, self.store, on_progress)
            self.runner.run()
        return load_records(self.store.directory)

    @property
    def measured(self):
        return [call for call in self.calls if call[2].max_new_tokens != WARMUP_TOKENS]


@pytest.fixture
def bench(tmp_path):
    def make(name="run", **changes):
        return Bench(tmp_path / name, **changes)

    return make


def test_one_record_a_prompt_turn_mode_repeat_and_method(bench):
    run = bench(modes=(GREEDY, COUPLED))
    records = run.run()
    assert run.runner.total == len(records) == 3 * 2 * 2 * 4
    assert len({record.key for record in records}) == len(records)
    assert len(run.measured) == len(records)
    drafted = next(record for record in records if record.method == "one" and record.mode == "stochastic")
    assert (drafted.tree.budget, drafted.tree.depth, drafted.rule, drafted.top_p) == (3, 2, "coupled", 0.9)
    assert all(record.tree is None for record in records if record.kind == "baseline")
    assert {record.suite_version for record in records} == {"3"}


def test_a_slow_baseline_may_be_measured_once(bench):
    run = bench(once=("hf-generate",), repeats=3)
    records = run.run()
    assert run.runner.total == len(records) == 3 * (3 * 3 + 1)
    assert {record.repeat for record in records if record.method == "hf-generate"} == {0}
    assert {record.repeat for record in records if record.method == "one"} == {0, 1, 2}
    measured = len(run.measured)
    assert len(run.run()) == len(records)
    assert len(run.measured) == measured  # nothing was missing


def test_graphs_that_are_compiled_while_times_are_taken_are_counted(bench):
    run = bench(turns=[("ab",)], repeats=2)
    graphs = SimpleNamespace(count=0)
    run.target.compiled_layers = SimpleNamespace(graphs=graphs)
    for method in run.methods:

        def compiling(prompt, settings, plain=method.run):
            graphs.count += 1
            return plain(prompt, settings)

        if method.name == "one":
            object.__setattr__(method, "run", compiling)
    run.run()
    assert run.runner.num_late_graphs == 2, "the warm-up may compile"


@pytest.mark.parametrize(("deepest", "pruned"), [(None, 1), (1, 0)])
def test_what_a_drafter_proposed_is_counted_and_what_a_baseline_did_is_not(bench, deepest, pruned):
    run = bench(turns=[("ab",)], repeats=1)
    for method in run.methods:

        def drafting(prompt, settings, plain=method.run):
            generation = plain(prompt, settings)
            generation.drafted = [Drafted([-1], torch.zeros(1), []) for _ in generation.steps]
            return generation

        if method.name != "two":
            object.__setattr__(method, "run", drafting)
        if method.name == "one" and deepest is not None:
            object.__setattr__(method, "drafter", SimpleNamespace(max_depth=deepest))
    found = {record.method: record.diagnostics for record in run.run()}
    assert [name for name in NAMES if found[name] is not None] == ["one"]
    assert (found["one"].num_steps, found["one"].num_pruned) == (1, pruned)
    assert found["one"].calibration.count[9] == 1


def test_every_method_and_mode_is_warmed_up_before_anything_is_measured(bench):
    run = bench(modes=(GREEDY, COUPLED))
    run.run()
    first = run.calls[:8]
    assert {(name, settings.rule) for name, _, settings in first} == {
        (name, rule) for name in NAMES for rule in ("greedy", "coupled")
    }
    assert {settings.max_new_tokens for _, _, settings in first} == {WARMUP_TOKENS}
    assert {settings.max_new_tokens for _, _, settings in run.calls[8:]} == {12}


def orders_of(records):
    blocks = {}
    for record in records:
        blocks.setdefault((record.prompt_id, record.turn, record.repeat), {})[record.order_in_block] = record.method
    return [tuple(order[place] for place in range(len(NAMES))) for order in blocks.values()]


def test_order_is_shuffled_anew_for_each_block_and_given_by_the_seed(bench):
    turns = [(letter,) for letter in "abcdefgh"]
    first = orders_of(bench("first", turns=turns).run())
    assert orders_of(bench("again", turns=turns).run()) == first
    assert orders_of(bench("other", turns=turns, seed=1).run()) != first
    assert len(set(first)) > 6
    assert {order[0] for order in first} == set(NAMES)


def test_order_in_block_is_the_order_of_the_calls(bench):
    run = bench(turns=[("ab",)], repeats=1)
    (order,) = orders_of(run.run())
    assert [name for name, _, _ in run.measured] == list(order)


def test_seeds_are_shared_by_methods_and_repeats_and_differ_between_prompts_and_turns(bench):
    seeds = {}
    for record in bench().run():
        seeds.setdefault((record.prompt_id, record.turn), set()).add(record.seed)
    assert all(len(found) == 1 for found in seeds.values())
    assert len(set.union(*seeds.values())) == 3


def test_later_turns_carry_the_references_answer_for_every_method(bench):
    run = bench(turns=[("ab", "cd", "ef")], repeats=1, system="sys")
    run.answers = {"one": [1, 2, 3], "hf-generate": [4, 5], "autoregressive": [ord("o"), ord("k")]}
    run.run()
    expected = [
        ("system", "sys"),
        ("user", "ab"),
        ("assistant", "ok"),
        ("user", "cd"),
        ("assistant", "ok"),
        ("user", "ef"),
    ]
    assert run.target.conversations[-1] == expected
    prompts = {name: prompt for name, prompt, _ in run.measured}  # of the last turn
    assert set(map(tuple, prompts.values())) == {tuple(map(ord, "sysabokcdokef"))}


def test_special_tokens_of_an_answer_are_not_said_again(bench):
    run = bench(turns=[("ab", "cd")], repeats=1)
    run.answers = {name: [ord("o"), ord("$")] for name in NAMES}
    run.run()
    assert run.target.conversations[-1] == [("user", "ab"), ("assistant", "o"), ("user", "cd")]


def test_without_a_chat_template_the_bare_turn_is_continued(bench):
    run = bench(turns=[("ab", "cd")], repeats=1, chat=False)
    run.run()
    assert {tuple(prompt) for _, prompt, _ in run.measured} == {tuple(map(ord, "ab")), tuple(map(ord, "cd"))}


def test_answers_are_compared_with_the_reference_wherever_it_stands_in_the_order(bench):
    run = bench(turns=[(letter,) for letter in "abcdefgh"], repeats=2)
    run.answers = {"one": [ord("x"), ord("z")], "two": [ord("x")]}
    verdicts = {}
    for record in run.run():
        verdicts.setdefault(record.method, set()).add(record.lossless)
    assert verdicts == {
        "autoregressive": {"reference"},
        "hf-generate": {"equal"},
        "one": {"near_tie"},
        "two": {"violation"},
    }


def test_progress_counts_up_to_the_total(bench):
    seen = []
    run = bench()
    run.run(seen.append)
    assert [progress.done for progress in seen] == list(range(1, 25))
    assert {progress.total for progress in seen} == {24}


@pytest.mark.parametrize("stop_at", [1, 4, 5, 11, 23])
def test_resuming_decodes_only_what_is_missing(bench, stop_at):
    def stop(progress):
        if progress.done == stop_at:
            raise KeyboardInterrupt

    first = bench()
    with pytest.raises(KeyboardInterrupt):
        first.run(stop)
    before = load_records(first.store.directory)
    assert len(before) == stop_at
    resumed = bench()
    after = resumed.run()
    assert after[:stop_at] == before
    assert len(resumed.measured) == 24 - stop_at
    undisturbed = {record.key: (record.output_sha256, record.order_in_block) for record in bench("whole").run()}
    assert {record.key: (record.output_sha256, record.order_in_block) for record in after} == undisturbed


def test_resuming_uses_the_stored_answer_of_the_reference(bench):
    def stop(progress):
        if progress.record.turn == 0 and progress.record.repeat == 1:
            raise KeyboardInterrupt

    first = bench(turns=[("ab", "cd")])
    first.answers = {name: [ord("o"), ord("k")] for name in NAMES}
    with pytest.raises(KeyboardInterrupt):
        first.run(stop)
    second = bench(turns=[("ab", "cd")])
    second.run()
    assert second.target.conversations[-1] == [("user", "ab"), ("assistant", "ok"), ("user", "cd")]
    assert len(load_outputs(second.store.directory)) == 2


def test_the_reference_of_a_resumed_run_is_its_first_repeat_even_where_a_later_one_differs(bench):
    def stop(progress):
        if progress.record.turn == 0 and progress.record.method == "autoregressive" and progress.record.repeat == 1:
            raise KeyboardInterrupt

    first = bench(turns=[("ab", "cd")])
    first.answers["autoregressive"] = [ord("o"), ord("k")]
    first.methods[0] = first.method("autoregressive")
    plain, calls = first.methods[0].run, []

    def changing(prompt, settings):
        if settings.max_new_tokens != WARMUP_TOKENS:
            calls.append(prompt)
            first.answers["autoregressive"] = [ord("o"), ord("k" if len(calls) == 1 else "x")]
        return plain(prompt, settings)

    object.__setattr__(first.methods[0], "run", changing)
    with pytest.raises(KeyboardInterrupt):
        first.run(stop)
    second = bench(turns=[("ab", "cd")])
    second.run()
    assert second.target.conversations[-1] == [("user", "ab"), ("assistant", "ok"), ("user", "cd")]


def test_a_run_whose_outputs_were_lost_says_which_and_where(bench):
    def stop(progress):
        if progress.done == 5:
            raise KeyboardInterrupt

    first = bench()
    with pytest.raises(KeyboardInterrupt):
        first.run(stop)
    (first.store.directory / "outputs.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"outputs\.jsonl has no output [0-9a-f]{16}.*restore the file"):
        bench().run()


def test_a_finished_run_decodes_nothing_not_even_a_warm_up(bench):
    bench().run()
    again = bench()
    assert len(again.run()) == 24
    assert again.calls == []


def test_a_prompt_longer_than_the_context_is_named_and_what_came_before_is_kept(bench):
    run = bench(turns=[("ab",), ("c" * 200,)], repeats=1)
    with pytest.raises(ConfigError, match=r"'s/1' has 200 tokens at turn 1, but 'toy' holds 200"):
        run.run()
    assert len(load_records(run.store.directory)) == len(NAMES)
