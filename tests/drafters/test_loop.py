"""Training learns, stops and goes on as if it had not stopped, and reads the same features however they are kept."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from tests.drafters.plain import target_pass

from vsdbench.errors import ConfigError
from vsdbench_drafters.architectures.eagle3 import Eagle3Model
from vsdbench_drafters.objectives.token import ForwardKL
from vsdbench_drafters.objectives.vsd.objective import VSD
from vsdbench_drafters.training import train as train_module
from vsdbench_drafters.training.features import BatchMaker, OnlineFeatures, draft_vocabulary, plan_batches
from vsdbench_drafters.training.heldout import HeldOut
from vsdbench_drafters.training.loop import TrainingLoop
from vsdbench_drafters.training.optim import Optimisers, lr_scale
from vsdbench_drafters.training.recipe import RecipeConfig, TrainingConfig

IDS = torch.arange(3, 60)


def make_loop(target, sequences, folder, *, objective=None, **changes):
    config = TrainingConfig(**({"epochs": 4, "batch_tokens": 8, "lr": 3e-3, "seed": 2} | changes))
    model = Eagle3Model.from_target(target, IDS, seed=config.seed)
    head = target.model.get_output_embeddings().weight
    maker = BatchMaker(sequences, OnlineFeatures(target, sequences), head, model, target)
    heldout = HeldOut(maker, [[0, 1], [2]])
    return TrainingLoop(
        model=model,
        objective=objective or ForwardKL(ttt_steps=2),
        maker=maker,
        heldout=heldout,
        config=config,
        autocast=False,
        folder=folder,
        key="k",
    )


def weights(loop):
    return {name: p.detach().clone() for name, p in loop.model.named_parameters()}


class Stop(Exception):  # noqa: N818 - not an error
    pass


@pytest.mark.parametrize(
    "changes",
    [{}, {"accumulate": 2, "schedule": "cosine"}, {"ema": 0.9}, {"optimiser": "muon", "lr": 0.02}, {"head_lr": 0}],
    ids=["adamw", "accumulate", "ema", "muon", "frozen-head"],
)
def test_resumed_training_is_bitwise_the_uninterrupted_one(tmp_path, toy_target, toy_sequences, changes):
    whole = make_loop(toy_target, toy_sequences, tmp_path / "whole", **changes)
    first = weights(whole)
    end = whole.run()
    assert end.step == whole.num_steps > 6

    def stop(progress):
        if progress.step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        make_loop(toy_target, toy_sequences, tmp_path / "cut", **changes).run(report=stop)
    resumed = make_loop(toy_target, toy_sequences, tmp_path / "cut", **changes)
    steps = []
    again = resumed.run(report=lambda progress: steps.append(progress.step))
    assert steps[0] == 6
    assert again == end
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(resumed)[name]), name
        frozen = changes.get("head_lr") == 0 and name == "lm_head.weight"
        assert torch.equal(tensor, first[name]) == frozen, name


def test_a_training_that_draws_paths_resumes_bitwise_too(tmp_path, toy_target, toy_sequences):
    """Draws depend on the batch alone, and an E-step that serves two M-steps is never cut in half."""

    def loop(folder):
        objective = VSD(ttt_steps=2, anchors=2, paths=3, depth=2, m_steps=2)
        return make_loop(toy_target, toy_sequences, tmp_path / folder, objective=objective)

    whole = loop("whole")
    end = whole.run()

    def stop(progress):
        if progress.step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        loop("cut").run(report=stop)
    resumed, steps = loop("cut"), []
    assert resumed.run(report=lambda progress: steps.append(progress.step)) == end
    assert steps[0] == 7, "the second M-step of the round was made before it stopped"
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(resumed)[name]), name
    whole_log, resumed_log = ((tmp_path / folder / "log.jsonl").read_text() for folder in ("whole", "cut"))
    assert resumed_log == whole_log
    entry = json.loads(whole_log.splitlines()[0])
    assert {"train_elbo", "train_ess", "train_path_acceptance_1", "train_brier", "train_loss_paths"} <= set(entry)


def test_a_training_that_diverges_stops_and_says_so(tmp_path, toy_target, toy_sequences):
    loop = make_loop(toy_target, toy_sequences, tmp_path, lr=1e30, warmup=0.0)
    with pytest.raises(
        ConfigError, match=r"diverged: the loss is (nan|inf) at step \d+ of \d+. Lower the .* \(lr 1e\+30,"
    ):
        loop.run()
    loop = make_loop(toy_target, toy_sequences, tmp_path / "end")
    last = loop.num_steps

    def spoil(progress):
        if progress.step == last:
            loop.model.fc.weight.data[0, 0] = torch.nan

    with pytest.raises(ConfigError, match=r"diverged: after the last step 'fc.weight' has values that are no finite"):
        loop.run(report=spoil)


def test_without_resume_training_starts_again(tmp_path, toy_target, toy_sequences):
    def stop(progress):
        if progress.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        make_loop(toy_target, toy_sequences, tmp_path).run(report=stop)
    steps = []
    make_loop(toy_target, toy_sequences, tmp_path).run(resume=False, report=lambda p: steps.append(p.step))
    assert steps[0] == 1


def test_checkpoints_are_written_on_the_way(tmp_path, toy_target, toy_sequences):
    def crash(progress):
        if progress.step == 3:
            raise Stop

    whole = make_loop(toy_target, toy_sequences, tmp_path / "whole")
    whole.run()
    with pytest.raises(Stop):
        make_loop(toy_target, toy_sequences, tmp_path, checkpoint_s=1e-9).run(report=crash)
    log = tmp_path / "log.jsonl"
    assert json.loads(log.read_text().splitlines()[-1])["step"] == 3
    with log.open("a") as file:
        file.write('{"step": 4, "tok')  # killed while it wrote
    steps = []
    make_loop(toy_target, toy_sequences, tmp_path).run(report=lambda progress: steps.append(progress.step))
    assert steps[0] == 3  # two steps were saved, the third died before its checkpoint
    assert log.read_text() == (tmp_path / "whole" / "log.jsonl").read_text()


def test_a_training_that_was_stopped_in_its_last_step_ends_as_one_that_was_not(tmp_path, toy_target, toy_sequences):
    def stop(progress):
        if progress.step == progress.num_steps:
            os.kill(os.getpid(), signal.SIGINT)

    end = make_loop(toy_target, toy_sequences, tmp_path / "whole", epochs=1).run()
    with pytest.raises(KeyboardInterrupt):
        make_loop(toy_target, toy_sequences, tmp_path / "cut", epochs=1).run(report=stop)
    assert make_loop(toy_target, toy_sequences, tmp_path / "cut", epochs=1).run() == end


def test_a_state_goes_back_to_the_device_of_its_parameter():
    """A checkpoint is read to the host, and an optimiser on a GPU cannot step with what lies there."""
    parameter = torch.nn.Parameter(torch.zeros(2, device="meta"))
    optimisers = Optimisers([torch.optim.AdamW([parameter])], {parameter: "fc.weight"})
    optimisers.load_state({"fc.weight/exp_avg": torch.ones(2)})
    assert optimisers.members[0].state[parameter]["exp_avg"].device == parameter.device


def test_averaged_weights_are_judged_and_trained_ones_go_on(tmp_path, toy_target, toy_sequences):
    judged, averages = [], []

    def evaluate(drafter, *, autocast):
        judged.append({name: p.detach().clone() for name, p in drafter.named_parameters()})
        averages.append({name: mean.clone() for name, mean in loop._average.items()})
        return {"tau": -float(len(judged))}

    ends = []
    for evaluations in (1, 3):
        loop = make_loop(toy_target, toy_sequences, tmp_path / str(evaluations), ema=0.9)
        loop._heldout, loop._evaluations = SimpleNamespace(evaluate=evaluate), evaluations
        loop.run()
        ends.append(weights(loop))
    assert len(judged) == 4
    for name, tensor in ends[0].items():
        assert all(torch.equal(one[name], mean[name]) for one, mean in zip(judged, averages, strict=True)), name
        assert torch.equal(tensor, ends[1][name]), name
        assert not torch.equal(judged[1][name], judged[3][name]), name
        assert torch.equal(judged[3][name], tensor), name


def test_training_fits_a_small_set(tmp_path, toy_target, toy_sequences):
    loop = make_loop(toy_target, toy_sequences, tmp_path, epochs=40)
    before = loop._heldout.evaluate(loop.model, autocast=False)
    after = loop.run().heldout
    assert after["kl_0"] < 0.5 * before["kl_0"]
    assert after["acceptance_0"] > before["acceptance_0"]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == loop.num_steps
    assert lines[-1]["tau_chain"] == after["tau_chain"]
    assert 1 <= after["tau_chain"] <= 5


def test_heldout_of_a_perfect_drafter(toy_target, toy_sequences, monkeypatch):
    """A drafter whose logits are the target's agrees everywhere: KL 0, acceptance = covered mass, full chains."""
    model = Eagle3Model.from_target(toy_target, torch.arange(64), seed=0)
    head = toy_target.model.get_output_embeddings().weight
    maker = BatchMaker(toy_sequences, OnlineFeatures(toy_target, toy_sequences), head, model)
    heldout = HeldOut(maker, [[4]])
    view = heldout._references[0].view

    def perfect(_drafter, batch, num_steps):
        for step in range(num_steps):
            rows = torch.arange(batch.num_rows)
            yield step, view.hidden[torch.minimum(rows + step, rows[-1])]

    monkeypatch.setattr("vsdbench_drafters.training.heldout.unroll", perfect)
    metrics = heldout.evaluate(model, autocast=False)
    assert metrics["agreement_0"] == metrics["agreement_3"] == 1.0
    assert metrics["acceptance_1"] == pytest.approx(1.0, abs=1e-4)
    assert metrics["kl_2"] == pytest.approx(0.0, abs=1e-4)
    rows = len(toy_sequences[4].ids) - toy_sequences[4].prompt_len
    assert metrics["tau_chain"] == pytest.approx(1 + (4 * rows - 6) / rows)


def test_features_are_what_decoding_gives(toy_target, toy_sequences):
    ids = toy_sequences[2].ids
    state = toy_target.prefill(ids, 32)
    states = target_pass(toy_target, [ids, toy_sequences[4].ids])[0]
    torch.testing.assert_close(states, state.features, rtol=1e-4, atol=1e-5)
    head = toy_target.model.get_output_embeddings().weight
    torch.testing.assert_close(states[-1, 96:] @ head.T, state.next_logits, rtol=1e-4, atol=1e-4)


def test_plans_cover_everything_once_and_depend_on_seed_and_epoch():
    rows = [5, 0, 3, 8, 1, 2]
    plan = plan_batches(rows, 6, seed=1, epoch=0)
    assert sorted(i for batch in plan for i in batch) == [0, 2, 3, 4, 5]
    assert all(sum(rows[i] for i in batch) >= 6 for batch in plan[:-1])
    assert plan == plan_batches(rows, 6, seed=1, epoch=0)
    many = [1] * 50
    orders = {str(plan_batches(many, 5, seed=s, epoch=e)) for s in (0, 1) for e in (0, 1)}
    assert len(orders) == 4


def test_draft_vocabulary_counts_responses_first(toy_sequences):
    sequences = [
        SimpleNamespace(ids=[9, 9, 9, 5, 5, 6], prompt_len=3),
        SimpleNamespace(ids=[8, 8, 7, 5], prompt_len=2),
    ]
    ids, coverage = draft_vocabulary(sequences, 20, 3, [2])
    assert ids.tolist() == [2, 5, 6]
    assert coverage == pytest.approx(4 / 5)
    assert draft_vocabulary(sequences, 20, 5, [2])[0].tolist() == [2, 5, 6, 7, 9]  # 9 is frequent in prompts alone
    with pytest.raises(ConfigError, match="no response tokens"):
        draft_vocabulary([], 20, 3, [2])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_rates_rise_and_fall_to_almost_nothing(schedule):
    scales = [lr_scale(step, 100, warmup=0.1, schedule=schedule) for step in range(100)]
    assert scales[0] == pytest.approx(0.1)
    assert max(scales) == scales[10] == 1.0
    assert 0 < scales[-1] < 0.02
    assert all(a >= b for a, b in itertools.pairwise(scales[10:]))


@pytest.fixture
def recipe(tmp_path, toy_sequences, monkeypatch):
    """A recipe whose data are there."""

    class Sequences(list):
        lengths = torch.tensor([len(s.ids) for s in toy_sequences])

    data = SimpleNamespace(
        sequences=Sequences(toy_sequences), heldout=toy_sequences[:2], fingerprint="d", num_response_tokens=50
    )
    monkeypatch.setenv("VSDBENCH_CACHE", str(tmp_path))
    monkeypatch.setattr(train_module, "ensure_data", lambda *_args, **_kwargs: data)
    return RecipeConfig.model_validate(
        {
            "name": "toy",
            "target": "toy",
            "architecture": {"draft_vocab_size": 40},
            "objective": {"type": "ce", "ttt_steps": 2},
            "training": {"batch_tokens": 16},
        }
    )


def test_train_caches_by_content(recipe, toy_target):
    trained = train_module.train(recipe, target=toy_target)
    assert (trained.cached, trained.objective) == (False, "ce")
    assert Eagle3Model.load(trained.path, toy_target).config.draft_vocab_size == 40
    again = train_module.train(recipe, target=toy_target)
    assert again.cached
    assert (again.path, again.tokens) == (trained.path, trained.tokens)
    assert train_module.estimate(recipe)["cached"]
    other = recipe.model_copy(update={"training": TrainingConfig(batch_tokens=16, seed=1)})
    assert not train_module.train(other, target=toy_target).cached


@pytest.mark.parametrize("finished", [True, False], ids=["trained", "killed"])
def test_a_drafter_that_another_process_trains_is_waited_for(
    recipe, toy_target, tmp_path, held_elsewhere, monkeypatch, finished
):
    def train_there():
        with monkeypatch.context() as patch:
            patch.setenv("VSDBENCH_CACHE", str(tmp_path / "elsewhere"))
            there = train_module.train(recipe, target=toy_target).path
        if finished:
            shutil.copytree(there, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".lock"))

    folder = tmp_path / "drafters" / train_module.drafter_key(recipe, toy_target)
    console = held_elsewhere(folder / ".lock", train_there)
    trained = train_module.train(recipe, target=toy_target, console=console)
    assert "The drafter of 'toy' is being trained by another process (pid " in console.file.getvalue()
    assert (trained.cached, trained.path) == (finished, folder)
    files = [path / "model.safetensors" for path in (folder, tmp_path / "elsewhere" / "drafters" / folder.name)]
    assert files[0].read_bytes() == files[1].read_bytes()
