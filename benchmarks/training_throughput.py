"""How many response tokens a second each objective trains at, and where its time goes; run by hand.

The embedded target, a recipe's data, and a drafter of full size. Objectives take turns batch by batch, so that a
machine that slows down slows all of them; ratios are to the first objective. ``tokens/s`` is by the clock,
``tokens/CPU-s`` by the processor's time, which other jobs on the machine disturb less; both are medians over the
batches. Path objectives have the options of the hour contest's arms unless told otherwise, and find the keys and values
of the data as training keeps them; ``vsd-again`` is ``vsd`` without those.

    python benchmarks/training_throughput.py
    python benchmarks/training_throughput.py --objectives kl,vsd,vsd-again,onpolicy --steps 4 --batches 12
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table

from vsdbench.bench import script
from vsdbench.bench.run import RunOptions, load_target
from vsdbench.models.device import dtype_name
from vsdbench_drafters.architectures.eagle3 import Eagle3Model
from vsdbench_drafters.training.data import ensure_data
from vsdbench_drafters.training.feature_files import cached_features
from vsdbench_drafters.training.features import BatchMaker, draft_vocabulary, plan_batches, response_rows
from vsdbench_drafters.training.loop import batch_seed
from vsdbench_drafters.training.optim import Optimisers, make_optimisers
from vsdbench_drafters.training.recipe import ObjectiveConfig, TrainingConfig, load_recipe, make_objective

_OPTIONS = "{anchors: 12, share: 0.5, paths: 8, depth: 4}"
_AGAIN = "-again"
"""Behind an objective's name: the target reads the text before drafted tokens again."""
_INSIDE = ("walk", "propose", "score")
"""Methods of path objectives that are timed by themselves: the anchor loss, the proposals, the target's judgement."""


class Runner:
    """One objective with a drafter of its own, and the processor seconds its parts have taken."""

    def __init__(self, name: str, options: dict[str, Any], steps: int, maker: BatchMaker, model: Eagle3Model) -> None:
        self.name = name
        self.model = model
        self.maker = maker
        self.objective = make_objective(
            ObjectiveConfig(type=name.removesuffix(_AGAIN), ttt_steps=steps, options=options)
        )
        self.optimisers: Optimisers = make_optimisers(model, TrainingConfig(lr=1e-4))
        self.spent: dict[str, float] = defaultdict(float)
        self.rates: list[tuple[float, float]] = []
        for method in _INSIDE:
            if hasattr(self.objective, method):
                setattr(self.objective, method, self._timed(method, getattr(self.objective, method)))

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - whatever the method takes
            begun = time.process_time()
            result = function(*args, **kwargs)
            self.spent[name] += time.process_time() - begun
            return result

        return run

    def step(self, indices: list[int], seed: int, *, autocast: bool) -> None:
        """Do one optimiser step."""
        begun = time.perf_counter()
        marks = [time.process_time()]
        batch, view = self.maker.make(indices, seed=seed)
        marks.append(time.process_time())
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = self.objective.loss(batch, self.model, view).loss
        marks.append(time.process_time())
        torch.autograd.backward(loss)
        marks.append(time.process_time())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimisers.step(1.0)
        marks.append(time.process_time())
        for part, start, stop in zip(("batch", "loss", "backward", "optimiser"), marks, marks[1:], strict=False):
            self.spent[part] += stop - start
        self.rates.append((batch.num_rows / (time.perf_counter() - begun), batch.num_rows / (marks[-1] - marks[0])))

    def medians(self) -> tuple[float, float]:
        """Return response tokens a second, and a second of the processor: medians over the batches."""
        wall, processor = zip(*self.rates, strict=True)
        return median(wall), median(processor)


def parse() -> argparse.Namespace:
    """Return the command line's options."""
    parser = script.make_parser(__doc__)
    script.add_target(parser, device=False)
    parser.add_argument("--objectives", default="kl,ce,topk,onpolicy,vsd")
    parser.add_argument("--recipe", default="eagle3-kl-quickstart", help="whose data")
    parser.add_argument("--steps", type=int, default=4, help="steps of training-time test")
    parser.add_argument("--vocabulary", type=int, default=8192, help="draft vocabulary")
    parser.add_argument("--batch-tokens", type=int, default=512)
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--checkpoint", type=Path, help="start from this drafter, so that proposals are real ones")
    parser.add_argument("--options", default=_OPTIONS, help="options of path objectives, as YAML")
    return parser.parse_args()


@script.guarded
def main() -> int:
    """Measure and print a table."""
    args = parse()
    options = yaml.safe_load(args.options)
    console = Console(width=150, stderr=True)
    target = load_target(args.target, RunOptions(device="cpu", dtype=args.dtype), console)
    dtype = target.dtype
    data = ensure_data(load_recipe(args.recipe).data, target, console=console)
    vocabulary, _ = draft_vocabulary(data.sequences, target.vocab_size, args.vocabulary, sorted(target.eos_ids))
    plan = plan_batches(response_rows(data.sequences), args.batch_tokens, seed=0, epoch=0)[: args.batches + 1]
    chosen = [data.sequences[i] for indices in plan for i in indices]
    head = target.model.get_output_embeddings().weight

    def model() -> Eagle3Model:
        if args.checkpoint is not None:
            return Eagle3Model.load(args.checkpoint, target).float()
        return Eagle3Model.from_target(target, vocabulary, seed=0)

    with TemporaryDirectory() as folder:
        runners = []
        for name in args.objectives.split(","):
            keys = not name.endswith(_AGAIN)
            features = cached_features(target, chosen, Path(folder), fingerprint=data.fingerprint, keys=keys)
            given = options if name.removesuffix(_AGAIN) in {"vsd", "onpolicy", "gto"} else {}
            drafter = model()
            runners.append(
                Runner(name, given, args.steps, BatchMaker(chosen, features, head, drafter, target), drafter)
            )
        first = 0
        for number, size in enumerate(len(indices) for indices in plan):
            for runner in runners:
                runner.step(
                    list(range(first, first + size)), batch_seed(0, number, 0), autocast=dtype == torch.bfloat16
                )
                if number == 0:  # the first one warms up
                    runner.spent.clear()
                    runner.rates.clear()
            first += size
    objectives = lines(runners, args.batches)
    if args.json:
        found = {"threads": torch.get_num_threads(), "dtype": dtype_name(dtype)}
        print(json.dumps(found | {"objectives": objectives}))
    else:
        Console(width=150).print(table(objectives))
    return 0


def lines(runners: list[Runner], num_batches: int) -> list[dict[str, Any]]:
    """Return one line an objective: tokens a second by both clocks, ratios to the first, milliseconds a part."""
    first = runners[0].medians()
    return [
        {
            "objective": runner.name,
            "tokens_per_s": runner.medians()[0],
            "ratio": runner.medians()[0] / first[0],
            "tokens_per_processor_s": runner.medians()[1],
            "ratio_by_processor": runner.medians()[1] / first[1],
            "processor_ms": {part: 1e3 * spent / num_batches for part, spent in runner.spent.items()},
        }
        for runner in runners
    ]


def table(objectives: list[dict[str, Any]]) -> Table:
    """Return rates, ratios to the first objective, and the processor milliseconds a batch of every part."""
    parts = ["batch", "loss", *_INSIDE, "backward", "optimiser"]
    columns = ("objective", "tokens/s", "ratio", "tokens/CPU-s", "ratio")
    found = Table(*columns, *[f"{part} CPU-ms" for part in parts])
    for line in objectives:
        spent = line["processor_ms"]
        found.add_row(
            line["objective"],
            f"{line['tokens_per_s']:,.0f}",
            f"{line['ratio']:.2f}",
            f"{line['tokens_per_processor_s']:,.0f}",
            f"{line['ratio_by_processor']:.2f}",
            *[f"{spent[part]:.0f}" if part in spent else "" for part in parts],
        )
    return found


if __name__ == "__main__":
    sys.exit(main())
