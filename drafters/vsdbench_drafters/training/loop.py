"""The training loop: batches in a fixed order, a loss, an optimiser, checkpoints.

The data order depends on seed and epoch alone, and what an objective draws depends on the seed of its batch, so a
training that continues from a checkpoint ends bitwise where an uninterrupted one does. A first Ctrl-C lets the current
step finish and saves.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vsdbench.errors import ConfigError
from vsdbench.processes import Processes
from vsdbench.store.files import write_atomic
from vsdbench_drafters.training.checkpoint import load_state, save_state
from vsdbench_drafters.training.distributed import check_division, own_share, same_start, sum_gradients
from vsdbench_drafters.training.features import BatchMaker, plan_batches, response_rows
from vsdbench_drafters.training.optim import lr_scale, make_optimisers

if TYPE_CHECKING:
    from vsdbench_drafters.objectives.base import DraftModel, Objective
    from vsdbench_drafters.training.heldout import Evaluator
    from vsdbench_drafters.training.recipe import TrainingConfig

EVALUATIONS = 12
"""Over a whole training, where a recipe does not say."""
_FEWEST, _SHARE = 2, 0.1


def evaluations_of(trained: int, heldout: int) -> int:
    """Return how often a training is judged that says nothing about it: less often if it is short.

    Args:
        trained: Response tokens that are trained on, in all.
        heldout: Response tokens that an evaluation goes through.

    >>> [evaluations_of(tokens, 5_000) for tokens in (80_000, 150_000, 1_600_000)]
    [2, 3, 12]
    """
    return min(EVALUATIONS, max(_FEWEST, int(_SHARE * trained / max(1, heldout))))


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a training is, after one optimiser step."""

    step: int
    num_steps: int
    tokens: int
    loss: float
    heldout: dict[str, float]


class TrainingLoop:
    """Trains a drafter in place.

    Args:
        model: The drafter, float32 weights.
        objective: What is minimised.
        maker: Makes batches from the training data.
        heldout: Judges the drafter now and then and at the end; None: never. Only the first process needs one.
        config: How to train.
        evaluations: How often, the one at the end included.
        select: A held-out number; the weights of the evaluation where it was highest are kept. None: those of the end.
        autocast: bfloat16 products.
        folder: For ``resume.safetensors`` and ``log.jsonl``.
        key: Hash of this training: a checkpoint of another one is not resumed.
        processes: Those that train this drafter together; None: this one alone. Each has a loop made in the same way.

    Raises:
        ConfigError: The batches of a step cannot be divided over the processes.
    """

    def __init__(
        self,
        *,
        model: DraftModel,
        objective: Objective,
        maker: BatchMaker,
        heldout: Evaluator | None,
        config: TrainingConfig,
        autocast: bool,
        folder: Path,
        key: str,
        evaluations: int = EVALUATIONS,
        select: str | None = None,
        processes: Processes | None = None,
    ) -> None:
        self._processes = processes or Processes()
        check_division(config.accumulate, self._processes)
        same_start(model, self._processes)
        self.model = model
        self._objective = objective
        if begin := getattr(objective, "begin", None):
            begin(model)  # the drafter as it is before training, and before a checkpoint is loaded into it
        self._maker = maker
        self._heldout = heldout
        self._config = config
        self._autocast = autocast
        self._folder = folder
        self._key = key
        self._optimisers = make_optimisers(model, config)
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._average = {name: p.detach().clone() for name, p in self._trained.items()} if config.ema else {}
        self._repeats = int(getattr(objective, "m_steps", 1))  # optimiser steps on the same batches
        self._rows = response_rows(maker.sequences)
        self._steps = self._plan()
        self._metrics: dict[str, float] = {}
        self._sums: dict[str, list[float]] = {}
        self._evaluations = evaluations
        self._select = select
        self._best: dict[str, Tensor] = {}
        self._best_metrics: dict[str, float] = {}
        self.best_step = 0
        self.seconds = 0.0

    def _plan(self) -> list[list[list[int]]]:
        """Return the batches of every optimiser step of the whole training.

        An objective with several M-steps an E-step is given the same batches so many times in a row.
        """
        config = self._config
        steps: list[list[list[int]]] = []
        for epoch in range(config.epochs):
            batches = plan_batches(self._rows, config.batch_tokens, seed=config.seed, epoch=epoch)
            groups = [batches[i : i + config.accumulate] for i in range(0, len(batches), config.accumulate)]
            steps += [group for group in groups for _ in range(self._repeats)]
        return steps

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the whole training."""
        return len(self._steps)

    @property
    def target_forwards(self) -> int:
        """Forwards of the target so far, a sequence each, by all processes."""
        return self._maker.num_forwards

    def run(self, *, resume: bool = True, report: Callable[[Progress], None] = lambda _: None) -> Progress:
        """Train to the end, then put the weights in place that are kept: the best, or the averaged, or the last ones.

        Args:
            resume: Continue from the folder's checkpoint if there is one of this training.
            report: Called after every step.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed; a checkpoint was written before.
            ConfigError: The loss or the weights are no numbers any more.
            EnvironmentProblemError: Another process stopped, or reads another checkpoint.
        """
        done, loss = self._restore() if resume else (0, math.nan)
        self._processes.agree(done, "the step that training goes on from")
        if self._processes.is_first:
            self._keep_log(done)
        tokens = sum(self._rows[i] for step in self._steps[:done] for batch in step for i in batch)
        saved = time.monotonic()
        marks = {self.num_steps * i // self._evaluations for i in range(1, self._evaluations)}
        progress = Progress(done, self.num_steps, tokens, loss, {})
        with _interruptible() as interrupted:
            for step in range(done, self.num_steps):
                begun = time.monotonic()
                loss = self._step(step)
                self.seconds += time.monotonic() - begun
                if not math.isfinite(loss):
                    raise self._diverged(f"the loss is {loss} at step {step + 1} of {self.num_steps}")
                tokens += sum(self._rows[i] for batch in self._steps[step] for i in batch)
                if step + 1 in marks:
                    self._evaluate(step + 1, tokens, loss)
                progress = Progress(step + 1, self.num_steps, tokens, loss, self._metrics)
                report(progress)
                if (step + 1) % self._repeats:
                    continue  # an E-step is under way: a training that stops here could not be resumed exactly
                stop = any(self._processes.gather(interrupted.is_set()))
                if self._processes.is_first and (stop or time.monotonic() - saved > self._config.checkpoint_s):
                    self._save(step + 1, loss)
                    saved = time.monotonic()
                if stop:
                    self._processes.gather(None)  # one that ends takes the others with it: not before it is saved
                    raise KeyboardInterrupt
        return self._finish(progress)

    def _step(self, step: int) -> float:
        """Do one optimiser step; return the mean loss of its batches."""
        batches = self._steps[step]
        outputs, before = [], self._maker.num_forwards
        for number, indices in own_share(batches, self._processes):
            seed = batch_seed(self._config.seed, step // self._repeats, number)
            batch, view = self._maker.make(indices, seed=seed)
            with torch.autocast(batch.tokens.device.type, dtype=torch.bfloat16, enabled=self._autocast):
                output = self._objective.loss(batch, self.model, view)
            (output.loss / len(batches)).backward()  # type: ignore[no-untyped-call]
            outputs.append((output.loss.detach(), output.metrics))
        sum_gradients(self._trained.values(), self._processes)
        torch.nn.utils.clip_grad_norm_(self._trained.values(), self._config.clip)
        config = self._config
        self._optimisers.step(lr_scale(step, self.num_steps, warmup=config.warmup, schedule=config.schedule))
        with torch.no_grad():
            for name, mean in self._average.items():
                mean.lerp_(self._trained[name], 1 - min(config.ema, (step + 1) / (step + 10)))
        share = 0.0  # numbers are read last: each read waits until a GPU has done all that it was given
        for loss, metrics in outputs:
            share += float(loss) / len(batches)
            for name, value in metrics.items():
                sums = self._sums.setdefault(name, [0.0, 0.0])
                sums[0] += float(value)
                sums[1] += 1
        done = self._processes.gather((share, self._maker.num_forwards - before))
        self._maker.num_forwards = before + sum(forwards for _, forwards in done)
        return sum(part for part, _ in done)

    def _diverged(self, what: str) -> ConfigError:
        """Return the error of a training whose numbers have run away: nothing of it is a drafter."""
        rates = ", ".join(f"{name} {getattr(self._config, name):g}" for name in ("lr", "vector_lr", "head_lr"))
        return ConfigError(
            f"training has diverged: {what}. Lower the learning rates ({rates}) or training.clip "
            f"({self._config.clip:g}), or give it more training.warmup ({self._config.warmup:g})."
        )

    def _finish(self, progress: Progress) -> Progress:
        """Put the weights in place that are kept; return what the last evaluation, or theirs, showed of them."""
        if broken := [name for name, tensor in self._trained.items() if not bool(tensor.isfinite().all())]:
            raise self._diverged(f"after the last step '{broken[0]}' has values that are no finite numbers")
        self._evaluate(progress.step, progress.tokens, progress.loss)
        with torch.no_grad():
            for name, tensor in (self._best or self._average).items():
                self._trained[name].copy_(tensor)
        return dataclasses.replace(progress, heldout=self._best_metrics or self._metrics)

    def _evaluate(self, step: int, tokens: int, loss: float) -> None:
        """Judge the drafter as it would be saved now, log it, and keep its weights if it is the best so far."""
        heldout = self._heldout
        with self._averaged():
            found = self._processes.from_first(
                lambda: None if heldout is None else heldout.evaluate(self.model, autocast=self._autocast)
            )
            if found is None:
                return
            if self._select is not None and found[self._select] > self._best_metrics.get(self._select, -math.inf):
                self._best_metrics, self.best_step = found, step
                self._best = {name: p.detach().clone() for name, p in self._trained.items()}
        self._metrics = found
        self._log(step, tokens, loss)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Put the averaged weights, if there are any, in the place of the trained ones for a while."""
        trained = {name: self._trained[name].detach().clone() for name in self._average}
        with torch.no_grad():
            for name, mean in self._average.items():
                self._trained[name].copy_(mean)
        yield
        with torch.no_grad():
            for name, tensor in trained.items():
                self._trained[name].copy_(tensor)

    @property
    def _log_path(self) -> Path:
        return self._folder / "log.jsonl"

    @property
    def _state_path(self) -> Path:
        return self._folder / "resume.safetensors"

    def _save(self, step: int, loss: float) -> None:
        model = {name: p.detach() for name, p in self.model.named_parameters()}
        groups: dict[str, dict[str, Tensor]] = {
            "model": model,
            "optimiser": self._optimisers.state(),
            "average": self._average,
            "best": self._best,
            "best_metrics": {n: torch.tensor(value, dtype=torch.float64) for n, value in self._best_metrics.items()},
            "sums": {name: torch.tensor(sums, dtype=torch.float64) for name, sums in self._sums.items()},
            "counters": {
                "loss": torch.tensor(loss, dtype=torch.float64),
                "seconds": torch.tensor(self.seconds, dtype=torch.float64),
                "target_forwards": torch.tensor(self._maker.num_forwards),
                "best_step": torch.tensor(self.best_step),
            },
        }
        save_state(self._state_path, groups, step=step, key=self._key)

    def _restore(self) -> tuple[int, float]:
        """Load the checkpoint of this training, if there is one; return the optimiser steps done and the last loss."""
        loaded = load_state(self._state_path, key=self._key)
        if loaded is None:
            return 0, math.nan
        groups, step = loaded
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(groups["model"][name])
            for name, mean in self._average.items():
                mean.copy_(groups["average"][name])
        self._optimisers.load_state(groups["optimiser"])
        counters = groups["counters"]
        self.seconds, self._maker.num_forwards = float(counters["seconds"]), int(counters["target_forwards"])
        self.best_step, self._best = int(counters["best_step"]), groups.get("best", {})
        self._best_metrics = {name: float(value) for name, value in groups.get("best_metrics", {}).items()}
        if self._processes.is_first:  # the others' part of the means since the last evaluation is lost
            self._sums = {name: sums.tolist() for name, sums in groups.get("sums", {}).items()}
        return step, float(counters.get("loss", math.nan))

    def _log(self, step: int, tokens: int, loss: float) -> None:
        sums: dict[str, list[float]] = {}
        for part in self._processes.gather(self._sums):
            for name, (total, count) in part.items():
                both = sums.setdefault(name, [0.0, 0.0])
                both[0] += total
                both[1] += count
        self._sums = {}
        if not self._processes.is_first:
            return
        means = {f"train_{name}": total / count for name, (total, count) in sorted(sums.items())}
        entry: dict[str, Any] = {"step": step, "tokens": tokens, "loss": loss, **self._metrics, **means}
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._log_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def _keep_log(self, done: int) -> None:
        """Forget evaluations behind the checkpoint that training goes on from: they are made again."""
        if self._log_path.exists():
            lines = self._log_path.read_bytes().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] <= done]
            write_atomic(self._log_path, b"".join(kept))


def batch_seed(seed: int, step: int, number: int) -> int:
    """Return the seed of the ``number``-th batch of an optimiser step: 63 bits that no other batch shares.

    >>> batch_seed(0, 1, 0) != batch_seed(0, 0, 1)
    True
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Turn a first Ctrl-C into an event; a second one interrupts at once. Off the main thread nothing changes."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return
    previous = signal.getsignal(signal.SIGINT)

    def handle(_number: int, _frame: object) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, handle)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, previous)
