"""How many response tokens a second the drafter trains at, and where the time goes; run by hand.

Random hidden states stand in for the target's, so nothing is fetched and the target's own forward is left out: the
numbers are those of ``features: cached``. Dimensions are those of the embedded 135M target.

    python benchmarks/training_throughput.py --threads 2
"""

from __future__ import annotations

import argparse
import time
from types import SimpleNamespace

import torch

from vsdbench_drafters.architectures.eagle3 import Eagle3Config, Eagle3Model
from vsdbench_drafters.objectives.base import DraftBatch, TargetView
from vsdbench_drafters.objectives.token import CrossEntropy, ForwardKL
from vsdbench_drafters.training.optim import make_optimisers
from vsdbench_drafters.training.recipe import TrainingConfig

VOCAB, HIDDEN = 49152, 576
PROMPT, RESPONSE = 60, 240  # tokens of every sequence


def make_batch(model: Eagle3Model, num_sequences: int) -> tuple[DraftBatch, TargetView]:
    """Return a batch of random sequences and hidden states."""
    generator = torch.Generator().manual_seed(0)
    length = PROMPT + RESPONSE
    ids = torch.randint(VOCAB, (num_sequences, length), generator=generator).tolist()
    states = torch.randn(num_sequences * length, 4 * HIDDEN, generator=generator).bfloat16()
    batch = DraftBatch.pack(ids, [PROMPT] * num_sequences, states[:, : 3 * HIDDEN])
    head = model.lm_head.weight.detach().bfloat16()
    return batch, TargetView(states[batch.slots + 1, 3 * HIDDEN :], head, model.target_to_draft)


def measure(
    objective_type: type[CrossEntropy | ForwardKL],
    draft_vocab_size: int,
    ttt_steps: int,
    num_sequences: int,
    optimiser: str,
) -> str:
    """Return one line: tokens a second and milliseconds of loss, backward and optimiser."""
    config = Eagle3Config(
        hidden_size=HIDDEN, target_hidden_size=HIDDEN, intermediate_size=1536, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, vocab_size=VOCAB, draft_vocab_size=draft_vocab_size,
    )  # fmt: skip
    model = Eagle3Model(config, torch.randn(VOCAB, HIDDEN), torch.arange(draft_vocab_size))
    optimisers = make_optimisers(model, TrainingConfig(optimiser=optimiser, lr=1e-3))
    objective = objective_type(ttt_steps=ttt_steps)
    spent = SimpleNamespace(loss=0.0, backward=0.0, optimiser=0.0)
    repeats, rows = 5, 0
    for repeat in range(repeats + 1):
        batch, view = make_batch(model, num_sequences)
        marks = [time.perf_counter()]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = objective.loss(batch, model, view).loss
        marks.append(time.perf_counter())
        torch.autograd.backward(loss)
        marks.append(time.perf_counter())
        optimisers.step(1.0)
        marks.append(time.perf_counter())
        if repeat:  # the first one warms up
            rows += batch.num_rows
            for name, start, stop in zip(vars(spent), marks[:-1], marks[1:], strict=True):
                setattr(spent, name, getattr(spent, name) + stop - start)
    total = sum(vars(spent).values())
    parts = "  ".join(f"{name} {1e3 * seconds / repeats:7.1f}" for name, seconds in vars(spent).items())
    label = f"{objective_type.name:>3} Vd {draft_vocab_size:5} steps {ttt_steps} sequences {num_sequences} {optimiser}"
    return f"{label:45} {rows / total:7.0f} tokens/s   ms: {parts}"


def main() -> None:
    """Measure the settings that the recipes choose between."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    for setting in (
        (ForwardKL, 8192, 4, 4, "adamw"),
        (ForwardKL, 8192, 3, 2, "adamw"),
        (ForwardKL, 4096, 3, 2, "adamw"),
        (ForwardKL, 4096, 2, 1, "adamw"),
        (ForwardKL, 4096, 2, 2, "adamw"),
        (CrossEntropy, 4096, 2, 1, "adamw"),
        (ForwardKL, 4096, 2, 2, "muon"),
    ):
        print(measure(*setting))


if __name__ == "__main__":
    main()
