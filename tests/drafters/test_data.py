"""Training data must be the same however often making it was interrupted, and complete or absent, never half."""

from __future__ import annotations

import errno
import io
import itertools
import shutil

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig

from vsdbench.errors import ConfigError
from vsdbench.models.fused import FusedLayers
from vsdbench.models.packed import can_pack, pack
from vsdbench_drafters.training import data as data_module
from vsdbench_drafters.training import generate
from vsdbench_drafters.training.answers import shared_prefix
from vsdbench_drafters.training.data import DataConfig, data_key, ensure_data
from vsdbench_drafters.training.grounded import GROUNDED_VERSION
from vsdbench_drafters.training.kept import Keeps
from vsdbench_drafters.training.prompts import Article, split_of
from vsdbench_drafters.training.shards import Answer, DataFolder
from vsdbench_drafters.training.spool import FeatureSpool

ARTICLES = [Article(f"Topic{i:03d}", f"It was found in {1000 + i}.") for i in range(300)]
CONFIG = DataConfig(num_tokens=900, max_new_tokens=24, max_prompt_tokens=400, slots=8, num_heldout=5, seed=4)


class ByteTarget:
    """A tiny random model that reads bytes."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=300,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        self.model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
        for parameter in self.model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        self.tokenizer = None
        self.eos_ids = frozenset({2, 17})
        self.fingerprint = "tiny"
        self.template_hash = "bytes"
        self.dtype = torch.float32
        self.fused_layers = None

    def encode_chat(self, messages):
        turns = [[290, *(3 + byte for byte in message["content"].encode()), 291] for message in messages]
        return [280, 281, *itertools.chain(*turns), 292]


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny products gain nothing from threads, and lose much where other processes hold a core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def target():
    return ByteTarget()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VSDBENCH_CACHE", str(tmp_path))
    return tmp_path


def make(target, config=CONFIG, **more):
    return ensure_data(config, target, articles=ARTICLES, excluded=frozenset(), **more)


def as_lists(sequences):
    return [(s.index, s.prompt_len, s.temperature, s.stop, s.ids.tolist()) for s in sequences]


def test_budget_split_and_order(target):
    made = make(target)
    assert made.num_response_tokens >= CONFIG.num_tokens
    last = made.sequences[-1]
    assert made.num_response_tokens - (len(last.ids) - last.prompt_len) < CONFIG.num_tokens
    assert len(made.heldout) == CONFIG.num_heldout
    indices = [sequence.index for sequence in made.sequences]
    assert indices == sorted(indices)
    assert made.next_index == indices[-1] + 1
    assert made.meta["licence"] == "CC BY-SA 4.0"
    assert made.sequences.lengths.tolist() == [len(sequence.ids) for sequence in made.sequences]
    assert as_lists(made.sequences[2:4]) == as_lists(made.sequences)[2:4]
    for sequence in made.sequences:
        assert sequence.temperature == CONFIG.temperatures[sequence.index % 2]
        assert sequence.ids[sequence.prompt_len - 1] == 292
        assert (sequence.stop == "eos") == (int(sequence.ids[-1]) in target.eos_ids)


def test_responses_are_distinct_and_heldout_articles_apart(target):
    made = make(target)
    responses = [tuple(s.ids[s.prompt_len :].tolist()) for s in (*made.sequences, *made.heldout)]
    assert len(set(responses)) == len(responses)

    def text(sequences):
        return " ".join(bytes(int(t) - 3 for t in s.ids[: s.prompt_len] if 3 <= t < 259).decode() for s in sequences)

    heldout = [article.title for article in ARTICLES if split_of(article.title) == "heldout"]
    assert not any(title in text(made.sequences) for title in heldout)


def test_second_call_reads_the_cache(target, monkeypatch):
    first = make(target)
    monkeypatch.setattr(generate.SlotGenerator, "stream", lambda *_: pytest.fail("made again"))
    second = make(target)
    assert as_lists(second.sequences) == as_lists(first.sequences)
    assert second.fingerprint == first.fingerprint
    assert not list(first.path.glob("shard-*"))


@pytest.mark.parametrize("kill_after", [1, 9, 30])
def test_interrupted_run_continues_to_the_same_data(target, tmp_path, monkeypatch, kill_after):
    expected = make(target)
    monkeypatch.setenv("VSDBENCH_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(data_module, "_SHARD_S", 0.0)
    stream, answered = generate.SlotGenerator.stream, []

    def killed(self, requests, **more):
        for count, response in enumerate(stream(self, requests, **more)):
            if count == kill_after:
                raise KeyboardInterrupt
            yield response

    def counted(self, requests, **more):
        for response in stream(self, requests, **more):
            answered.append(response.request.index)
            yield response

    monkeypatch.setattr(generate.SlotGenerator, "stream", killed)
    with pytest.raises(KeyboardInterrupt):
        make(target)
    monkeypatch.setattr(generate.SlotGenerator, "stream", counted)
    resumed = make(target)
    assert as_lists(resumed.sequences) == as_lists(expected.sequences)
    assert as_lists(resumed.heldout) == as_lists(expected.heldout)
    assert resumed.fingerprint == expected.fingerprint
    assert len(answered) <= len(expected.sequences) + len(expected.heldout) + 3 * CONFIG.slots - kill_after


@pytest.mark.skipif(not can_pack(torch.device("cpu"), torch.float32), reason="no packed products in this torch")
@pytest.mark.parametrize("kill_after", [9, 30])
def test_features_come_with_the_answers_whatever_happens_in_between(tmp_path, monkeypatch, kill_after):
    target = ByteTarget()
    pack(target.model)
    decoder = target.model.get_decoder()
    target.fused_layers = FusedLayers(decoder, decoder.layers, target.model.config)
    monkeypatch.setattr(data_module, "_SHARD_S", 0.0)
    keeps = Keeps((1, 0, 1))

    def spools():
        return {name: FeatureSpool(tmp_path / name, keeps) for name in ("train", "heldout")}

    stream = generate.SlotGenerator.stream

    def killed(self, requests, **more):
        for count, response in enumerate(stream(self, requests, **more)):
            if count == kill_after:
                raise KeyboardInterrupt
            yield response

    monkeypatch.setattr(generate.SlotGenerator, "stream", killed)
    with pytest.raises(KeyboardInterrupt):
        make(target, spools=spools())
    monkeypatch.setattr(generate.SlotGenerator, "stream", stream)
    made = make(target, spools=spools())
    width, plain = 4 * target.model.config.hidden_size, ByteTarget().model.model
    for spool, sequences in zip(spools().values(), (made.sequences, made.heldout), strict=True):
        found = dict(spool.take([s.ids for s in sequences], torch.float32, width, None))
        assert sorted(found) == list(range(len(sequences)))
        for index, features in found.items():
            ids = torch.tensor([sequences[index].ids.astype(np.int64).tolist()])
            with torch.no_grad():
                output = plain(input_ids=ids, output_hidden_states=True)
            entering = [output.hidden_states[layer] for layer in (1, 0, 1)]
            expected = torch.cat([*entering, output.last_hidden_state], dim=-1)[0]
            torch.testing.assert_close(features.states, expected, rtol=1e-3, atol=1e-3)


def test_torn_shard_and_torn_result_are_made_again(target):
    expected = make(target)
    before = as_lists(expected.sequences)  # read now: the map does not survive the truncation
    (expected.path / "shard-torn.npz").write_bytes(b"PK\x03\x04 torn")
    with (expected.path / "tokens.npy").open("r+b") as stream:
        stream.truncate(200)
    again = make(target)
    assert as_lists(again.sequences) == before
    assert not list(again.path.glob("shard-*"))


@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_a_process_that_is_killed_loses_no_more_than_some_seconds(target, tmp_path, monkeypatch, seconds):
    monkeypatch.setenv("VSDBENCH_CACHE", str(tmp_path))
    monkeypatch.setattr(data_module, "_SHARD_S", seconds)
    stream, on_disk = generate.SlotGenerator.stream, []

    def watched(self, requests, **more):
        for response in stream(self, requests, **more):
            on_disk.append(len(list(tmp_path.glob("data/*/shard-*"))))
            yield response

    monkeypatch.setattr(generate.SlotGenerator, "stream", watched)
    make(target)
    assert len(on_disk) > 3
    if seconds:
        assert set(on_disk) == {0}
    else:
        assert all(found >= count for count, found in enumerate(on_disk))


def test_a_shard_that_cannot_be_read_now_is_not_lost(tmp_path, monkeypatch):
    folder = DataFolder(tmp_path)
    folder.save_shard([Answer(3, np.arange(4, dtype=np.int32), 2, 0.0, "eos")])

    def busy(*_args, **_kwargs):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr("vsdbench_drafters.training.shards.np.load", busy)
        with pytest.raises(OSError, match="Too many open files"):
            folder.load_shards()
    assert list(folder.load_shards()) == [3]


def test_later_stage_gets_fresh_prompts_and_the_same_heldout(target):
    first = make(target)
    later = make(target, CONFIG.model_copy(update={"start_index": first.next_index, "num_tokens": 300}))
    assert later.sequences[0].index == first.next_index
    assert as_lists(later.heldout) == as_lists(first.heldout)


def test_slots_change_nothing_but_speed(target, tmp_path, monkeypatch):
    first = make(target)
    slower = CONFIG.model_copy(update={"slots": 3})
    assert data_key(slower, target) == data_key(CONFIG, target)
    monkeypatch.setenv("VSDBENCH_CACHE", str(tmp_path / "other"))
    assert as_lists(make(target, slower).sequences) == as_lists(first.sequences)


def test_key_depends_on_what_determines_the_data(target):
    keys = {data_key(CONFIG, target)}
    for change in ({"seed": 5}, {"num_tokens": 901}, {"temperatures": (0.0,)}, {"start_index": 1}):
        keys.add(data_key(CONFIG.model_copy(update=change), target))
    keys.add(data_key(CONFIG.model_copy(update={"source": "grounded"}), target))
    other = ByteTarget()
    other.fingerprint = "another"
    keys.add(data_key(CONFIG, other))
    assert len(keys) == 7


def test_key_of_the_first_source_is_what_it_was(target):
    """Data that took hours to make is found again: a new source must not change the key of an old one."""
    assert data_key(CONFIG, target) == "032157b49077e009"


def test_grounded_data_is_made_from_grounded_prompts(target):
    articles = [Article(article.title, f"{article.title} is {article.lead}") for article in ARTICLES]
    config = CONFIG.model_copy(update={"source": "grounded", "num_tokens": 200, "num_heldout": 1})
    made = ensure_data(config, target, articles=articles, excluded=frozenset())
    assert made.meta["config"]["source"] == "grounded"
    assert made.meta["prompts_version"] == GROUNDED_VERSION
    for sequence in made.sequences:
        text = bytes(int(t) - 3 for t in sequence.ids[: sequence.prompt_len] if 3 <= t < 259).decode()
        assert "It was found in" in text  # every one gives the lead


def test_a_target_that_says_nothing_new_ends_in_one_sentence(monkeypatch):
    silent = ByteTarget()
    silent.eos_ids = frozenset(range(300))  # every answer is its end
    monkeypatch.setattr(data_module, "_MAX_IDLE", 40)
    with pytest.raises(ConfigError, match=r"of \d+ answers the last 40 were empty or had been given before"):
        make(silent)


def test_prompts_that_never_fit_are_an_error(target, monkeypatch):
    monkeypatch.setattr(data_module, "_MAX_SKIPPED", 30)
    with pytest.raises(ConfigError, match="max_prompt_tokens"):
        make(target, CONFIG.model_copy(update={"max_prompt_tokens": 10}))


def test_some_long_prompts_are_left_out(target):
    made = make(target, CONFIG.model_copy(update={"max_prompt_tokens": 150}))
    assert max(sequence.prompt_len for sequence in made.sequences) <= 150
    assert len(made.sequences) < made.next_index


def test_shared_prefix(target):
    assert shared_prefix(target) == [280, 281, 290]


def test_progress_is_shown_with_speed(target):
    stream = io.StringIO()
    make(target, console=Console(file=stream, force_terminal=True, width=100))
    assert "Training data" in stream.getvalue()
    assert "tokens" in stream.getvalue()


def test_progress_counts_answers_that_are_under_way(target, monkeypatch):
    done = []
    monkeypatch.setattr(
        data_module.Bars, "update", lambda _self, _task, completed, rate: done.append((completed, rate))
    )
    made = make(target)
    counts = [count for count, _ in done]
    assert counts[0] <= CONFIG.slots
    assert max(counts) == CONFIG.num_tokens
    assert len(set(counts)) > 2 * len(made.sequences)  # not only where an answer ends
    assert all(rate > 0 for _, rate in done)


def test_large_vocabularies_keep_their_ids(tmp_path):
    answer = Answer(3, np.array([70_000, 5], dtype=np.int32), 1, 0.0, "eos")
    made = DataFolder(tmp_path / "large").finish([answer], next_index=4, meta={})
    assert made.sequences[0].ids.tolist() == [70_000, 5]
    assert made.sequences[0].ids.dtype == np.int32


def test_data_that_another_process_makes_are_waited_for(target, cache, held_elsewhere, monkeypatch):
    def made_there():
        with monkeypatch.context() as patch:
            patch.setenv("VSDBENCH_CACHE", str(cache / "elsewhere"))
            there = make(target).path
        shutil.copytree(there, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".lock"))
        monkeypatch.setattr(data_module, "_Maker", None)

    folder = cache / "data" / data_key(CONFIG, target)
    console = held_elsewhere(folder / ".lock", made_there)
    with pytest.raises(ConfigError, match=r"The training data are being made by another process \(pid \d+\); wait"):
        make(target)
    assert make(target, console=console).num_response_tokens >= CONFIG.num_tokens
    assert "The training data are being made by another process" in console.file.getvalue()
