"""How many response tokens a second each objective trains at, and where its time goes; run by hand.

The embedded target, the quickstart recipe's data and features, and a drafter of full size. Objectives take turns batch
by batch, so that a machine that slows down slows all of them; ratios are to the first objective. ``tokens/s`` is by the
clock, ``tokens/CPU-s`` by the processor's time, which other jobs on the machine disturb less; both are medians over the
batches. Path objectives have the options of the hour contest's arms unless told otherwise.

    python benchmarks/training_throughput.py
    python benchmarks/training_throughput.py --objectives kl,vsd,onpolicy --steps 4 --batches 12
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from vsdbench.models.device import choose_dtype
from vsdbench.models.source import fetch_model
from vsdbench.models.target import Target
from vsdbench.paths import cache_dir
from vsdbench_drafters.architectures.eagle3 import Eagle3Model
from vsdbench_drafters.training.data import ensure_data
from vsdbench_drafters.training.features import BatchMaker, cached_features, draft_vocabulary, plan_batches
from vsdbench_drafters.training.loop import batch_seed
from vsdbench_drafters.training.optim import Optimisers, make_optimisers
from vsdbench_drafters.training.recipe import ObjectiveConfig, TrainingConfig, load_recipe, make_objective

_OPTIONS = "{anchors: 12, share: 0.5, paths: 8, depth: 4}"
_INSIDE = ("walk", "propose", "score")
"""Methods of path objectives that are timed by themselves: the anchor loss, the proposals, the target's judgement."""


class Runner:
    """One objective with a drafter of its own, and the seconds its parts have taken."""

    def __init__(self, name: str, options: dict[str, Any], steps: int, model: Eagle3Model) -> None:
        self.name = name
        self.model = model
        self.objective = make_objective(ObjectiveConfig(type=name, ttt_steps=steps, options=options))
        self.optimisers: Optimisers = make_optimisers(model, TrainingConfig(lr=1e-4))
        self.spent: dict[str, float] = defaultdict(float)
        self.rates: list[tuple[float, float]] = []
        for method in _INSIDE:
            if hasattr(self.objective, method):
                setattr(self.objective, method, self._timed(method, getattr(self.objective, method)))

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - whatever the method takes
            begun = time.perf_counter()
            result = function(*args, **kwargs)
            self.spent[name] += time.perf_counter() - begun
            return result

        return run

    def step(self, maker: BatchMaker, indices: list[int], seed: int, *, autocast: bool) -> None:
        """Do one optimiser step."""
        begun = time.process_time()
        marks = [time.perf_counter()]
        maker.drafter = self.model
        batch, view = maker.make(indices, seed=seed)
        marks.append(time.perf_counter())
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = self.objective.loss(batch, self.model, view).loss
        marks.append(time.perf_counter())
        torch.autograd.backward(loss)
        marks.append(time.perf_counter())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimisers.step(1.0)
        marks.append(time.perf_counter())
        for part, start, stop in zip(("batch", "loss", "backward", "optimiser"), marks, marks[1:], strict=False):
            self.spent[part] += stop - start
        self.rates.append((batch.num_rows / (marks[-1] - marks[0]), batch.num_rows / (time.process_time() - begun)))

    def medians(self) -> tuple[float, float]:
        """Return response tokens a second, and a second of the processor: medians over the batches."""
        wall, processor = zip(*self.rates, strict=True)
        return median(wall), median(processor)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objectives", default="kl,ce,topk,onpolicy,vsd")
    parser.add_argument("--steps", type=int, default=4, help="steps of training-time test")
    parser.add_argument("--vocabulary", type=int, default=8192, help="draft vocabulary")
    parser.add_argument("--batch-tokens", type=int, default=512)
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--checkpoint", type=Path, help="start from this drafter, so that proposals are real ones")
    parser.add_argument("--options", default=_OPTIONS, help="options of path objectives, as YAML")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    import yaml  # noqa: PLC0415 - for one option

    options = yaml.safe_load(args.options)
    console = Console(width=150)
    found = fetch_model("smollm2-135m-q4", progress=True)
    device = torch.device("cpu")
    dtype = choose_dtype("auto", device)
    target = Target.load(found.path, name="smollm2-135m-q4", fingerprint=found.fingerprint, device=device, dtype=dtype)
    data = ensure_data(load_recipe("eagle3-kl-quickstart").data, target, console=console)
    features = cached_features(target, data.sequences, cache_dir() / "features", fingerprint=data.fingerprint)
    vocabulary, _ = draft_vocabulary(data.sequences, target.vocab_size, args.vocabulary, sorted(target.eos_ids))

    def model() -> Eagle3Model:
        if args.checkpoint is not None:
            return Eagle3Model.load(args.checkpoint, target).float()
        return Eagle3Model.from_target(target, vocabulary, seed=0)

    runners = [
        Runner(name, options if name in {"vsd", "onpolicy", "gto"} else {}, args.steps, model())
        for name in args.objectives.split(",")
    ]
    head = target.model.get_output_embeddings().weight
    maker = BatchMaker(data.sequences, features, head, runners[0].model, target)
    rows = [len(sequence.ids) - max(sequence.prompt_len, 2) for sequence in data.sequences]
    for number, indices in enumerate(plan_batches(rows, args.batch_tokens, seed=0, epoch=0)[: args.batches + 1]):
        for runner in runners:
            runner.step(maker, indices, batch_seed(0, number, 0), autocast=dtype == torch.bfloat16)
            if number == 0:  # the first one warms up
                runner.spent.clear()
                runner.rates.clear()
    parts = ["batch", "loss", *_INSIDE, "backward", "optimiser"]
    columns = ("objective", "tokens/s", "ratio", "tokens/CPU-s", "ratio")
    table = Table(*columns, *[f"{part} ms" for part in parts])
    first = runners[0].medians()
    for runner in runners:
        rates = zip(runner.medians(), first, strict=True)
        shown = [f"{1e3 * runner.spent[part] / args.batches:.0f}" if part in runner.spent else "" for part in parts]
        table.add_row(
            runner.name, *[text for rate, of in rates for text in (f"{rate:,.0f}", f"{rate / of:.2f}")], *shown
        )
    console.print(table)


if __name__ == "__main__":
    main()
