"""Shared fixtures: a factory of records, a synthetic run with known properties, another process that holds a lock."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from vsdbench.store.records import STEP_COLUMNS, Record, hash_tokens

os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch comes later; tests run side by side, on tiny tensors
os.environ.setdefault("VSDBENCH_NATIVE", "1")  # no measuring of what is fast: the same kernels in every test

DEFAULTS = {
    "run_id": "run-1",
    "suite": "tiny",
    "suite_version": "1",
    "prompt_id": "p0",
    "prompt_hash": "0" * 64,
    "category": "chat",
    "turn": 0,
    "repeat": 0,
    "order_in_block": 0,
    "seed": 0,
    "method": "ngram",
    "kind": "drafter",
    "target": "toy",
    "target_fingerprint": "f" * 64,
    "dtype": "float32",
    "attention": "sdpa",
    "template_hash": "1" * 64,
    "mode": "greedy",
    "temperature": 0.0,
    "max_new_tokens": 64,
    "stop_reason": "length",
    "num_prompt_tokens": 10,
    "prefill_s": 0.1,
    "decode_s": 1.0,
    "lossless": "equal",
}


def make_record(*, steps=(), **fields) -> Record:
    """A record with plausible defaults; ``steps`` are rows in the order of ``STEP_COLUMNS``."""
    fields = DEFAULTS | fields
    columns = zip(*steps, strict=True) if steps else ((),) * len(STEP_COLUMNS)
    emitted = sum(step[3] for step in steps)
    fields.setdefault("num_output_tokens", emitted + 1)
    fields.setdefault("output_sha256", hash_tokens(range(fields["num_output_tokens"])))
    return Record(steps=dict(zip(STEP_COLUMNS, columns, strict=True)), **fields)


def make_run(
    *, num_prompts=12, num_repeats=2, modes=("greedy",), drafters=("ngram", "eagle3-kl"), seed=0
) -> list[Record]:
    """Two baselines and some drafters on prompts of three categories, times drawn around known speedups."""
    rng = np.random.default_rng(seed)
    rates = {name: 0.45 + 0.2 * index for index, name in enumerate(drafters)}
    records = []
    for mode in modes:
        for prompt in range(num_prompts):
            slow = rng.lognormal(0, 0.1)
            for repeat in range(num_repeats):
                shared = {
                    "mode": mode,
                    "temperature": 0.0 if mode == "greedy" else 1.0,
                    "prompt_id": f"p{prompt}",
                    "category": ("chat", "code", "maths")[prompt % 3],
                    "repeat": repeat,
                }
                one = [(0, 0, 0, 1, 0.0, 10.0, 0.2)] * 40
                time = 40 * 0.0102 * slow
                records += [
                    make_record(
                        steps=one, method="autoregressive", kind="baseline", lossless="reference",
                        decode_s=time * rng.lognormal(0, 0.02), **shared,
                    ),
                    make_record(
                        method="hf-generate", kind="baseline", num_output_tokens=41,
                        decode_s=0.9 * time * rng.lognormal(0, 0.02), **shared,
                    ),
                ]  # fmt: skip
                for name, rate in rates.items():
                    steps = _draft(rng, rate, 40)
                    records.append(
                        make_record(
                            steps=steps, method=name, objective=name.partition("-")[2] or None, rule="coupled",
                            decode_s=sum(sum(step[4:]) for step in steps) / 1e3 * slow * rng.lognormal(0, 0.02),
                            **shared,
                        )
                    )  # fmt: skip
    return records


def _draft(rng, rate, num_tokens):
    steps, left = [], num_tokens
    while left:
        accepted = 0
        while accepted < 4 and rng.random() < rate:
            accepted += 1
        emitted = min(accepted + 1, left)
        steps.append((7, 4, accepted, emitted, 1.5, 11.0, 0.3))
        left -= emitted
    return steps


@pytest.fixture(scope="session", name="make_record")
def _make_record():
    """The record factory."""
    return make_record


@pytest.fixture(scope="session", name="make_run")
def _make_run():
    """The factory of a whole synthetic run."""
    return make_run


HOLD = """
import fcntl, os, sys
with open(sys.argv[1], "w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    print(os.getpid(), file=file, flush=True)
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def held_elsewhere():
    """A way to have another process hold a lock's file until this one says that it waits; then that one is killed.

    It returns the console to say so to, whose ``file`` has what was said. ``meanwhile`` is called before the kill.
    """
    others = []

    def hold(path, meanwhile=lambda: None):
        path.parent.mkdir(parents=True, exist_ok=True)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        other = subprocess.Popen([sys.executable, "-I", "-S", "-c", HOLD, str(path)], **pipes)
        others.append(other)
        assert other.stdout.readline() == "held\n"

        class Listening(Console):
            def print(self, *objects, **options):
                super().print(*objects, **options)
                if f"by another process (pid {other.pid}): waiting for it." in str(objects):
                    meanwhile()
                    other.kill()

        return Listening(file=io.StringIO(), width=200)

    yield hold
    for other in others:
        other.kill()
        other.communicate()
