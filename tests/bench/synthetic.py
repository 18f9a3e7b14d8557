"""Run folders with known tau and speedup, for tests of what compares runs."""

from __future__ import annotations

import math

import numpy as np

from vsdbench.store.store import RunStore

MACHINE = {"cpu": {"model": "Fast", "num_usable_cores": 2}, "gpus": [], "versions": {"torch": "2.13"}}


def save_run(
    results, make_record, run_id, methods, *, num_prompts=20, slow=1.0, seed=0, first=0, keep=None, machine=MACHINE,
    **fields,
):  # fmt: skip
    """Write a run and return its folder.

    Prompt p is as hard in every run, and the clock has a noise of 1 %.

    Args:
        results: Folder of runs.
        make_record: The record factory.
        run_id: Name of the run.
        methods: ``{name: (tokens a step, times as fast as plain decoding)}``.
        num_prompts: Prompts, with two repeats each.
        slow: Times as slow as other machines.
        seed: Of the noise.
        first: Number of the first prompt.
        keep: Which records are written (all if None).
        machine: For the manifest.
        fields: Of every record.
    """
    rng = np.random.default_rng(seed)
    folder = results / run_id
    with RunStore.create(folder, {"run_id": run_id, "device": "cpu", "machine": machine}) as store:
        for prompt in range(first, first + num_prompts):
            hard = np.random.default_rng(prompt).normal(0, 0.2)
            for repeat in range(2):
                where = {"prompt_id": f"p{prompt}", "prompt_hash": f"hash-{prompt}", "repeat": repeat}
                shared = fields | where | {"run_id": run_id}
                plain = slow * 4.0 * rng.lognormal(0, 0.01)
                records = [
                    make_record(
                        steps=[(0, 0, 0, 1, 0, 10, 0)] * 40, method="autoregressive", kind="baseline",
                        lossless="reference", decode_s=plain, **shared,
                    )
                ]  # fmt: skip
                for name, (tau, speedup) in methods.items():
                    counts = 1 + rng.binomial(6, min(max((tau * math.exp(hard) - 1) / 6, 0), 1), size=20)
                    steps = [(7, 6, int(n) - 1, int(n), 1, 10, 0) for n in counts]
                    seconds = plain / 40 * counts.sum() / speedup * rng.lognormal(0, 0.01)
                    records.append(make_record(steps=steps, method=name, decode_s=seconds, **shared))
                for record in records:
                    if keep is None or keep(record):
                        store.append(record)
    return folder
