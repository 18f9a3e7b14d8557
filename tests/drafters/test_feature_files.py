"""Features kept in files are those of a forward now; with keys and values kept, drafted tokens get the same states."""

from __future__ import annotations

import errno
import io
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from tests.decoding.tiny import make_prompt, make_target
from tests.drafters.path_tools import Sequence, make_drafter_model

from vsdbench.errors import ConfigError, EnvironmentProblemError
from vsdbench.models.branching import branch_states
from vsdbench_drafters.objectives.vsd.objective import VSD
from vsdbench_drafters.training import feature_files
from vsdbench_drafters.training.feature_choice import feature_source, heldout_source
from vsdbench_drafters.training.feature_files import cached_features
from vsdbench_drafters.training.features import BatchMaker, Features, OnlineFeatures
from vsdbench_drafters.training.kept import Keeps
from vsdbench_drafters.training.loop import TrainingLoop
from vsdbench_drafters.training.recipe import RecipeConfig, TrainingConfig
from vsdbench_drafters.training.spool import FeatureSpool
from vsdbench_drafters.training.train import estimate

SEQUENCES = [Sequence(make_prompt(n, i), p) for i, (n, p) in enumerate([(14, 5), (20, 8), (9, 3), (16, 4)])]
VSD_OPTIONS = {"ttt_steps": 2, "anchors": 3, "paths": 3, "depth": 3, "m_steps": 2}


@pytest.fixture(scope="module")
def target():
    return make_target()


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_cached_features_are_the_online_ones(tmp_path, toy_target, toy_sequences):
    done = []
    make = {"fingerprint": "d", "progress": done.append}
    cached = cached_features(toy_target, toy_sequences, tmp_path, **make)
    assert sum(done) == sum(len(s.ids) for s in toy_sequences)
    online = OnlineFeatures(toy_target, toy_sequences)
    found = cached.read([4, 0])
    torch.testing.assert_close(found.states, online.read([4, 0]).states, rtol=1e-4, atol=1e-5)
    assert found.keys == ()
    cached_features(toy_target, toy_sequences, tmp_path, **make)
    assert sum(done) == sum(len(s.ids) for s in toy_sequences)  # read, not made again
    assert [name.partition(".")[2] for name in names(tmp_path)] == ["bin"]


def test_a_full_disk_while_caching(tmp_path, toy_target, toy_sequences, monkeypatch):
    def full(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(feature_files, "_write", full)
    with pytest.raises(EnvironmentProblemError, match="features=online"):
        cached_features(toy_target, toy_sequences, tmp_path, fingerprint="d")
    with pytest.raises(EnvironmentProblemError, match="keys=false"):
        cached_features(toy_target, toy_sequences, tmp_path, fingerprint="d", keys=True)
    assert names(tmp_path) == []


@pytest.fixture
def made(tmp_path, target):
    """A file of features."""
    cached_features(target, SEQUENCES, tmp_path / "elsewhere", fingerprint="d")
    return next((tmp_path / "elsewhere").glob("*.bin"))


def test_files_that_another_process_makes_are_waited_for(tmp_path, target, made, held_elsewhere):
    folder, seen = tmp_path / "features", []
    console = held_elsewhere(folder / f".{made.stem}.lock", lambda: shutil.copy(made, folder))
    with pytest.raises(ConfigError, match="features are being made by another process"):
        cached_features(target, SEQUENCES, folder, fingerprint="d")
    cached_features(target, SEQUENCES, folder, fingerprint="d", console=console, progress=seen.append)
    assert "The target's features are being made by another process" in console.file.getvalue()
    assert (names(folder), seen) == ([made.name], [])


def test_what_a_killed_process_left_is_written_over(tmp_path, target, made, held_elsewhere):
    folder = tmp_path / "features"
    console = held_elsewhere(folder / f".{made.stem}.lock")
    (folder / f"{made.name}.partial").write_bytes(bytes(10_000_000))
    cached_features(target, SEQUENCES, folder, fingerprint="d", console=console)
    assert (folder / made.name).read_bytes() == made.read_bytes()
    assert names(folder) == [made.name]


def test_kept_keys_are_those_of_a_plain_forward(tmp_path, target):
    cached = cached_features(target, SEQUENCES, tmp_path, fingerprint="d", keys=True)
    online = OnlineFeatures(target, SEQUENCES, keys=True)
    for source in (cached, online):
        found = source.read([2, 1])
        assert [key.shape[3] for key in found.keys] == [9, 20]
        with torch.inference_mode(), target.as_shipped() as model:
            cache = model.get_decoder()(input_ids=torch.tensor([SEQUENCES[1].ids]), use_cache=True).past_key_values
        for kept, layer in zip(found.keys[1], cache.layers, strict=True):
            torch.testing.assert_close(kept, torch.stack([layer.keys[0], layer.values[0]]), rtol=1e-10, atol=1e-10)


def test_keys_have_a_file_of_their_own_and_share_the_forwards(tmp_path, target):
    total, done = sum(len(s.ids) for s in SEQUENCES), []
    make = {"fingerprint": "d", "progress": done.append}
    cached_features(target, SEQUENCES, tmp_path, **make)
    states = names(tmp_path)
    cached_features(target, SEQUENCES, tmp_path, keys=True, **make)  # features were there: only keys are made
    both = names(tmp_path)
    assert len(both) == 2
    assert states[0] in both
    assert sum(done) == 2 * total
    read = cached_features(target, SEQUENCES, tmp_path, keys=True, **make)
    assert sum(done) == 2 * total
    apart = tmp_path / "apart"
    once = cached_features(target, SEQUENCES, apart, keys=True, **make)  # neither was there: one pass makes both
    assert names(apart) == both
    assert sum(done) == 3 * total
    for i in range(len(SEQUENCES)):
        assert torch.equal(read.read([i]).keys[0], once.read([i]).keys[0])
    key_file = next(path for path in apart.iterdir() if path.suffix == ".keys")
    assert key_file.stat().st_size == total * 4 * 2 * 2 * 8 * 8  # layers, both, key-value heads, width, float64


def spooled(tmp_path, target, sequences, keeps):
    """A spool of two chunks with the features of sequences, in no particular order and with others among them."""
    spool = FeatureSpool(tmp_path / "spool", keeps)
    for chunk in (sequences[1:], sequences[:1]):
        for sequence in chunk:
            found = OnlineFeatures(target, [sequence], keys=keeps.keys).read([0])
            spool.add(sequence.ids, Features(found.states + 1, tuple(key + 2 for key in found.keys)))
        spool.add([1, 2, 3], Features(found.states[:3], tuple(key[..., :3, :] for key in found.keys)))
        spool.close()
    return spool


@pytest.mark.parametrize("keys", [False, True])
def test_what_was_kept_while_answers_were_made_is_not_computed_again(tmp_path, target, keys):
    spool = spooled(tmp_path, target, SEQUENCES[1:], Keeps(target.feature_layers, keys=keys))
    (spool.folder / "left.states").write_bytes(b"by a killed process")
    done, online = [], OnlineFeatures(target, SEQUENCES, keys=keys)
    make = {"fingerprint": "d", "progress": done.append, "spool": spool, "keys": keys}
    cached = cached_features(target, SEQUENCES, tmp_path / "features", **make)
    assert sum(done) == sum(len(s.ids) for s in SEQUENCES)
    for index in range(4):
        found, expected = cached.read([index]), online.read([index])
        torch.testing.assert_close(found.states, expected.states + (index > 0), rtol=1e-9, atol=1e-9)
        for key, as_read in zip(found.keys, expected.keys, strict=True):
            torch.testing.assert_close(key, as_read + 2 * (index > 0), rtol=1e-9, atol=1e-9)
    assert not spool.folder.exists()


def test_no_more_keys_are_kept_than_wanted(tmp_path, target):
    found = [OnlineFeatures(target, SEQUENCES, keys=True).read([index]) for index in range(4)]
    folder, keeps = tmp_path / "spool", Keeps(target.feature_layers, keys=True)
    spool = FeatureSpool(folder, keeps, most_key_bytes=sum(one.keys[0].nbytes for one in found[:3]))
    for sequence, one in zip(SEQUENCES[:2], found, strict=False):
        spool.add(sequence.ids, one)
    spool.close()
    assert len(list(folder.glob("*.keys"))) == 1
    spool = FeatureSpool(folder, keeps, most_key_bytes=sum(one.keys[0].nbytes for one in found[:3]))
    for sequence, one in zip(SEQUENCES[2:], found[2:], strict=True):  # the fourth is too much
        spool.add(sequence.ids, one)
    spool.close()
    assert not list(folder.glob("*.keys"))
    taken = dict(spool.take([s.ids for s in SEQUENCES], target.dtype, 4 * target.hidden_size, None))
    for index, one in enumerate(found):
        assert torch.equal(taken[index].states, one.states)


@pytest.mark.parametrize("wrong", ["layers", "keys", "cut"])
def test_what_was_kept_but_does_not_fit_is_computed(tmp_path, target, wrong):
    layers = target.feature_layers
    spool = spooled(tmp_path, target, SEQUENCES, Keeps(layers[::-1] if wrong == "layers" else layers))
    wanted = FeatureSpool(spool.folder, Keeps(layers, keys=wrong == "keys"))
    for path in spool.folder.glob("*.states" if wrong == "cut" else "nothing"):
        path.write_bytes(path.read_bytes()[:-8])
    cached = cached_features(
        target, SEQUENCES, tmp_path / "features", fingerprint="d", keys=wrong == "keys", spool=wanted
    )
    online = OnlineFeatures(target, SEQUENCES)
    torch.testing.assert_close(cached.read([2]).states, online.read([2]).states, rtol=1e-9, atol=1e-9)
    assert not spool.folder.exists()


def test_a_full_disk_while_answers_are_made(tmp_path, target, monkeypatch):
    found = OnlineFeatures(target, SEQUENCES).read([0])

    def full(*_args, **_more):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(tmp_path), "open", full)
    with pytest.raises(EnvironmentProblemError, match="is full"):
        FeatureSpool(tmp_path / "spool", Keeps(target.feature_layers)).add(SEQUENCES[0].ids, found)


def test_another_dtype_target_data_or_attention_has_other_files(tmp_path, target, monkeypatch):
    make = {"fingerprint": "d", "keys": True}
    cached_features(target, SEQUENCES, tmp_path, **make)
    seen = set(names(tmp_path))
    cached_features(target, SEQUENCES, tmp_path, fingerprint="e", keys=True)
    cached_features(make_target(dtype=torch.float32), SEQUENCES, tmp_path, **make)
    other = make_target()
    monkeypatch.setattr(other, "fingerprint", "1" * 16)
    cached_features(other, SEQUENCES, tmp_path, **make)
    assert len(names(tmp_path)) == 2 * 4
    monkeypatch.setattr(other, "fingerprint", target.fingerprint)
    monkeypatch.setattr(other, "attention", "eager")
    cached_features(other, SEQUENCES, tmp_path, **make)
    assert len(names(tmp_path)) == 2 * 4 + 1
    assert seen < set(names(tmp_path))


def scored(target, source):
    """The oracle's states of one batch, and whether keys and values were given for each sequence."""
    model = make_drafter_model(target, 0)
    maker = BatchMaker(SEQUENCES, source, target.model.get_output_embeddings().weight, model, target)
    batch, view = maker.make([3, 0, 1], seed=5)
    given, states = [], []

    def watch(of, prefix, branches, known=None):
        given.append(known is not None)
        states.append(branch_states(of, prefix, branches, known))
        return states[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vsdbench_drafters.training.features.branch_states", watch)
        loss = VSD(**VSD_OPTIONS).loss(batch, model, view).loss
    return torch.cat(states), given, float(loss.detach())


def test_drafted_tokens_get_the_same_states_with_and_without_kept_keys(tmp_path, target):
    expected, given, loss = scored(target, OnlineFeatures(target, SEQUENCES))
    assert not any(given)
    assert len(given) == 3
    cached = cached_features(target, SEQUENCES, tmp_path, fingerprint="d", keys=True)
    for source in (cached, OnlineFeatures(target, SEQUENCES, keys=True)):
        states, given, same = scored(target, source)
        assert all(given)
        torch.testing.assert_close(states, expected, rtol=1e-9, atol=1e-9)
        assert same == pytest.approx(loss, rel=1e-9)
    cached._keys += 0.1  # a private mapping: the file stays as it is
    wrong, _, _ = scored(target, cached)
    assert (wrong - expected).abs().max() > 1e-3


def test_training_with_kept_keys_resumes_bitwise(tmp_path, target):
    def loop(folder):
        cached = cached_features(target, SEQUENCES, tmp_path, fingerprint="d", keys=True)
        model = make_drafter_model(target, 0)
        maker = BatchMaker(SEQUENCES, cached, target.model.get_output_embeddings().weight, model, target)
        config = TrainingConfig(epochs=4, batch_tokens=8, lr=3e-3, seed=2)
        return TrainingLoop(
            model=model,
            objective=VSD(**VSD_OPTIONS),
            maker=maker,
            heldout=None,
            config=config,
            autocast=False,
            folder=tmp_path / folder,
            key="k",
        )

    whole = loop("whole")
    end = whole.run()

    def stop(progress):
        if progress.step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        loop("cut").run(report=stop)
    resumed, steps = loop("cut"), []
    again = resumed.run(report=lambda progress: steps.append(progress.step))
    assert steps[0] == 7
    assert (again.step, again.loss, again.tokens) == (end.step, end.loss, end.tokens)
    for (name, one), (_, other) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def recipe(objective="vsd", **training):
    return RecipeConfig.model_validate(
        {
            "name": "toy",
            "target": "toy",
            "objective": {"type": objective},
            "training": training,
            "data": {"num_tokens": 50_000},
        }
    )


@pytest.mark.parametrize(
    ("chosen", "family", "kept"),
    [
        (recipe(), "llama", True),
        (recipe("kl"), "llama", False),
        (recipe("kl", keys=True), "llama", True),  # for the other arms of a contest
        (recipe(keys=False), "llama", False),
        (recipe(keys_gb=1e-6), "llama", False),
        (recipe(features="online"), "llama", True),
        (recipe("kl", features="online", keys=True), "llama", False),  # nobody would read them
        (recipe(), "gemma2", False),  # its branches take one mask
    ],
)
def test_what_a_recipe_keeps(tmp_path, monkeypatch, chosen, family, kept):
    class Sequences(list):
        lengths = torch.tensor([len(s.ids) for s in SEQUENCES])

    monkeypatch.setenv("VSDBENCH_CACHE", str(tmp_path))
    stream = io.StringIO()
    console = Console(file=stream, width=300)
    data = SimpleNamespace(sequences=Sequences(SEQUENCES), fingerprint="d")
    source = feature_source(chosen, make_target(family), data, console)
    assert bool(source.read([0]).keys) == kept
    said = "more than training.keys_gb=1e-06" in stream.getvalue()
    assert said == (chosen.training.keys_gb == 1e-6)


def test_heldout_answers_have_a_file_and_none_have_none(tmp_path, monkeypatch):
    monkeypatch.setenv("VSDBENCH_CACHE", str(tmp_path))
    target, console = make_target(), Console(quiet=True)
    kept = heldout_source(recipe(), target, SimpleNamespace(heldout=SEQUENCES[:2], fingerprint="d"), console)
    online = OnlineFeatures(target, SEQUENCES).read([1])
    torch.testing.assert_close(kept.read([1]).states, online.states, rtol=1e-9, atol=1e-9)
    assert len(list((tmp_path / "features").glob("*.bin"))) == 1
    none = SimpleNamespace(heldout=[], fingerprint="none")
    assert isinstance(heldout_source(recipe(), target, none, console), OnlineFeatures)
    assert len(list((tmp_path / "features").glob("*.bin"))) == 1


def test_estimates_know_what_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("VSDBENCH_CACHE", str(tmp_path))
    kept, again = estimate(recipe()), estimate(recipe(keys=False))
    assert kept["bytes"] == 6 * again["bytes"]  # 11,520 numbers a token beside 2,304
    assert again["training_s"] > 1.1 * kept["training_s"]
    assert estimate(recipe(keys_gb=0.1))["bytes"] == again["bytes"]
    online = estimate(recipe(features="online"))
    assert online["bytes"] == 0
    assert estimate(recipe("kl", keys=True))["bytes"] == kept["bytes"]
