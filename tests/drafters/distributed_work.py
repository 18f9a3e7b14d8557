"""What the two processes of ``test_distributed`` do; the test does the same alone and compares.

One start does everything, since importing torch takes longer than all of these trainings. Its last part fails on
purpose, so the processes' exit codes are those of a training in which one process fails.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from tests.drafters.conftest import ToySequence, make_target
from tests.drafters.plain import target_pass

from vsdbench.bench import run as run_module
from vsdbench.cli import app
from vsdbench.errors import ConfigError
from vsdbench.models.target import Target
from vsdbench.processes import Processes, joined
from vsdbench_drafters.architectures.eagle3 import Eagle3Model
from vsdbench_drafters.objectives.token import ForwardKL
from vsdbench_drafters.objectives.vsd.objective import VSD
from vsdbench_drafters.training import distributed
from vsdbench_drafters.training import train as train_module
from vsdbench_drafters.training.distributed import shard_target
from vsdbench_drafters.training.features import BatchMaker, OnlineFeatures
from vsdbench_drafters.training.heldout import HeldOut
from vsdbench_drafters.training.loop import Progress, TrainingLoop
from vsdbench_drafters.training.recipe import TrainingConfig

IDS = torch.arange(3, 60)
RECIPE = {
    "name": "toy",
    "target": "toy",
    "architecture": {"draft_vocab_size": 40},
    "objective": {"type": "vsd", "ttt_steps": 2, "options": {"anchors": 2, "paths": 3, "depth": 2}},
    "data": {"num_heldout": 2},
    "training": {"batch_tokens": 8, "accumulate": 2, "epochs": 3, "shard_target": True},
    "evaluation": {"prompts": 2, "max_new_tokens": 6, "times": 3},
}


def sequences() -> list[ToySequence]:
    generator = torch.Generator().manual_seed(5)
    lengths = [(12, 5), (9, 3), (15, 6), (8, 4), (20, 7), (11, 2), (10, 6), (14, 4), (9, 2)]
    return [ToySequence(torch.randint(3, 60, (n,), generator=generator).tolist(), prompt) for n, prompt in lengths]


def plain_target() -> Target:
    """The toy target as it is when sharded: without packed layers."""
    target = make_target()
    target.prepare_sharding(torch.device("cpu"))
    return target


def make_loop(processes: Processes, folder: Path, target: Target, objective, wide=False, **changes) -> TrainingLoop:
    settings = {"epochs": 3, "batch_tokens": 8, "accumulate": 2, "seed": 2, "checkpoint_s": 1e-9} | changes
    config = TrainingConfig(**settings)
    # Only the first process starts from the right weights, and only it judges.
    model = Eagle3Model.from_target(target, IDS, seed=config.seed + processes.rank)
    model = model.double() if wide else model
    data, head = sequences(), target.model.get_output_embeddings().weight
    makers = [BatchMaker(data, OnlineFeatures(target, data), head, model, target) for _ in range(2)]
    with processes.first_goes():
        heldout = HeldOut(makers[1], [[0, 1], [2]]) if processes.is_first else None
    return TrainingLoop(
        model=model,
        objective=objective,
        maker=makers[0],
        heldout=heldout,
        config=config,
        autocast=False,
        folder=folder,
        key="k",
        evaluations=3,
        select="tau_chain",
        processes=processes,
    )


def outcome(loop: TrainingLoop, progress: Progress) -> dict:
    return {
        "weights": {name: parameter.detach().clone() for name, parameter in loop.model.named_parameters()},
        "progress": [progress.step, progress.num_steps, progress.tokens],
        "loss": progress.loss,
        "heldout": progress.heldout,
        "best_step": loop.best_step,
        "target_forwards": loop.target_forwards,
        "odd_step": any(len(step) % 2 for step in loop._steps),
    }


def train_kl(processes: Processes, folder: Path) -> dict:
    objective = ForwardKL(ttt_steps=2)
    # Two batches a process: in float64 the order of their sum cannot be seen.
    loop = make_loop(processes, folder, plain_target(), objective, wide=True, accumulate=4, ema=0.9)
    found = outcome(loop, loop.run())
    return found | {"log": [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]}


def train_vsd(processes: Processes, folder: Path) -> dict:
    objective = VSD(ttt_steps=2, anchors=2, paths=3, depth=2, m_steps=2)
    loop = make_loop(processes, folder, plain_target(), objective)
    return outcome(loop, loop.run())


def train_sharded(processes: Processes, folder: Path) -> dict:
    """VSD asks the target about drafted tokens, so the processes differ in how often they run it."""
    target = plain_target()
    whole = sum(parameter.numel() for parameter in target._layers().parameters())
    if processes.count > 1:
        shard_target(target, processes)
        shard_target(target, processes)  # a warm start trains on the same target
    own = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in target._layers().parameters())
    data = sequences()
    passes = [target_pass(target, [data[i].ids, data[0].ids]) for i in range(1 if processes.is_first else 4)]
    positions = torch.arange(5)
    states = target.branch_states(torch.arange(7, 12), positions, positions[:, None] >= positions)
    loop = make_loop(processes, folder, target, VSD(ttt_steps=2, anchors=2, paths=3, depth=2))
    head = target.model.get_output_embeddings().weight
    found = {"features": passes[0], "states": states, "share": own / whole, "head": head.detach().clone()}
    found = outcome(loop, loop.run()) | found
    processes.lend(None)
    return found


def interrupt(processes: Processes, folder: Path) -> dict:
    """Ctrl-C reaches the second process only; both stop after the same step, and both go on from there."""

    def press(progress: Progress) -> None:
        if progress.step == 3 and processes.rank == processes.count - 1:
            os.kill(os.getpid(), signal.SIGINT)

    try:
        make_loop(processes, folder, plain_target(), ForwardKL(ttt_steps=2), checkpoint_s=1e9).run(report=press)
    except KeyboardInterrupt:
        saved = (folder / "resume.safetensors").exists()
    loop, steps = make_loop(processes, folder, plain_target(), ForwardKL(ttt_steps=2)), []
    return {"saved": saved} | outcome(loop, loop.run(report=lambda done: steps.append(done.step))) | {"steps": steps}


WORK = {"kl": train_kl, "vsd": train_vsd, "sharded": train_sharded, "interrupted": interrupt}


def patch_training() -> None:
    """Give trainings the toy target and its data in place of what would be fetched and made."""

    class Sequences(list):
        lengths = torch.tensor([len(sequence.ids) for sequence in sequences()])

    data = SimpleNamespace(
        sequences=Sequences(sequences()), heldout=sequences()[:2], fingerprint="d", num_response_tokens=70
    )
    train_module.ensure_data = lambda *_args, **_kwargs: data
    run_module.load_target = lambda _name, options, _console: plain_target()


def fail_in_second(make_objective):
    """Objectives whose third loss in the second process is an error."""

    def make(config):
        objective, calls = make_objective(config), []

        def loss(*args):
            calls.append(1)
            if os.environ["RANK"] == "1" and len(calls) == 3:
                raise ConfigError("this loss was not to be.")
            return type(objective).loss(objective, *args)

        objective.loss = loss
        return objective

    return make


def main(folder: Path, ports: list[str]) -> None:
    torch.set_num_threads(1)
    distributed._BUCKET = 3000  # several buckets
    os.environ["MASTER_PORT"] = ports[0]
    with joined("cpu") as processes:
        for name, work in WORK.items():
            torch.save(work(processes, folder / name), folder / f"{name}-{processes.rank}.pt")
    patch_training()
    arguments = ["train", str(folder / "toy.yaml"), "--device", "cpu", "--dtype", "fp32"]
    os.environ["MASTER_PORT"] = ports[1]
    app([*arguments, "--json"], standalone_mode=False)
    os.environ["MASTER_PORT"] = ports[2]
    train_module.make_objective = fail_in_second(train_module.make_objective)
    app([*arguments, "training.seed=1"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
