"""From a recipe to a trained drafter on disk, found again by the hash of everything that determines it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from vsdbench.config import content_hash
from vsdbench.paths import cache_dir
from vsdbench.processes import Processes
from vsdbench.store.files import FileLock, write_atomic
from vsdbench_drafters.architectures.copying import SLOTS_PER_WIDTH, start_copying
from vsdbench_drafters.architectures.eagle3 import Eagle3Model
from vsdbench_drafters.architectures.trainable import fresh_model, load_model
from vsdbench_drafters.training.compiled import compile_row_losses, wants_compiling
from vsdbench_drafters.training.data import data_key, ensure_data
from vsdbench_drafters.training.distributed import check_division, shard_target
from vsdbench_drafters.training.feature_choice import (
    asks_target,
    come_with_answers,
    feature_source,
    spools_of,
    training_bar,
    wants_keys,
)
from vsdbench_drafters.training.feature_files import num_bytes
from vsdbench_drafters.training.features import (
    BatchMaker,
    draft_vocabulary,
    read_json,
    response_rows,
)
from vsdbench_drafters.training.heldout import evaluator
from vsdbench_drafters.training.loop import Progress, TrainingLoop, evaluations_of
from vsdbench_drafters.training.recipe import Eagle3Architecture, RecipeConfig, load_recipe, make_objective

if TYPE_CHECKING:
    from vsdbench.models.target import Target
    from vsdbench_drafters.objectives.base import DraftModel
    from vsdbench_drafters.training.shards import TrainingData

_FORMAT = 1  # raised when the same recipe would train other weights

# Response tokens a second with the embedded 135M target on a machine whose products of training do so many operations a
# second (two CPU cores without bf16); only the time estimate reads them, and takes others for faster in proportion.
_FLOPS = 230e9
_MOST_FASTER = 30.0  # no figures of GPUs yet: small models keep them waiting
_DATA_TOKENS_PER_S = 190.0
_FEATURE_TOKENS_PER_S = 620.0
_LAYER_STEPS_PER_S = 1500.0
_DECODED_TOKENS_PER_S = 45.0  # held-out prompts, during training
# A step of the loss beside one of EAGLE-3, in processor time: EAGLE-1 0.84 to 0.98; a Medusa head, which has no layer,
# 0.37 with a draft vocabulary of 4,096 and 0.59 with 8,192.
_STEP_COST = {"eagle3": 1.0, "eagle": 1.0, "medusa": 0.5, "msd": 1.0, "vispec": 1.0}
_ASKING = 2.5  # how much longer a step takes that asks the target about drafted tokens
_ASKING_KEPT = 2.1  # the same where the keys and values of the data are kept
_FEATURE_NUMBERS, _KEY_NUMBERS = 4 * 576, 30 * 2 * 3 * 64  # a token, of the embedded target
_TOTAL_PER_RESPONSE = 1.35  # tokens of a sequence for each response token, prompts included
# The same of the built target and rendered pictures, each read by itself: 81 visual tokens, answers of 19 on average.
_SHOWN_TOTAL_PER_RESPONSE = 6.2
_SHOWN_TOKENS_PER_S = 330.0


@dataclass(frozen=True, slots=True)
class TrainedDrafter:
    """A drafter on disk.

    Attributes:
        path: Checkpoint folder in the public format of its architecture.
        cached: It was there already.
        seconds: What training it took (data apart), when it was trained.
        tokens: Response tokens seen, every epoch counted.
        objective: Name of its objective.
        target_forwards: Forwards of the target, a sequence each, for features and drafted tokens (not for the data).
        heldout: What it showed on held-out prompts, if it was judged.
        warm_start: The drafter that it started from, if any.
    """

    path: Path
    cached: bool
    seconds: float
    tokens: int
    objective: str
    target_forwards: int = 0
    heldout: dict[str, float] = field(default_factory=dict)
    warm_start: TrainedDrafter | None = None


def train(
    recipe: RecipeConfig | str | Path,
    *,
    target: Target,
    console: Console | None = None,
    resume: bool = True,
    processes: Processes | None = None,
) -> TrainedDrafter:
    """Return the drafter of a recipe, from the cache or trained now (entry point ``default``).

    Args:
        recipe: A recipe, or its name or path.
        target: The loaded target that it drafts for.
        console: Where progress goes; None shows nothing.
        resume: Continue a training that was stopped.
        processes: Those that train it together, this one among them (``vsdbench.processes``); None: this one alone.

    Raises:
        ConfigError: The recipe is not valid, or its batches cannot be divided over the processes.
        EnvironmentProblemError: The data cannot be made, the disk is full, or another process stopped.
    """
    if not isinstance(recipe, RecipeConfig):
        recipe = load_recipe(recipe)
    processes = processes or Processes()
    console = console if console is not None and processes.is_first else Console(quiet=True)
    folder = cache_dir() / "drafters" / drafter_key(recipe, target)
    found = _open(folder)
    processes.agree((folder.name, found is not None), "the drafter and whether it is in the cache")
    if found is not None:
        return found
    check_division(recipe.training.accumulate, processes)
    if recipe.training.shard_target and processes.count > 1:
        shard_target(target, processes)
    warm = None
    if recipe.warm_start is not None:
        warm = train(recipe.warm_start, target=target, console=console, resume=resume, processes=processes)
    with _alone(folder, recipe.name, console, processes):
        found = _open(folder)
        processes.agree(found is not None, "whether the drafter is in the cache")
        if found is not None:
            return found  # trained by another process meanwhile
        _make(recipe, target, warm, folder=folder, console=console, resume=resume, processes=processes)
    trained = _open(folder)
    processes.agree(trained is not None, "what is in the cache")
    assert trained is not None
    return replace(trained, cached=False, warm_start=warm)


@contextmanager
def _alone(folder: Path, name: str, console: Console, processes: Processes) -> Iterator[None]:
    """Hold a drafter's folder, after waiting for another command that trains it; the first process does so for all."""
    with ExitStack() as held:
        if processes.is_first:
            doing = f"The drafter of '{name}' is being trained"
            held.enter_context(FileLock(folder / ".lock", doing, console=console))
        processes.gather(None)
        yield


def _make(
    recipe: RecipeConfig,
    target: Target,
    warm: TrainedDrafter | None,
    *,
    folder: Path,
    console: Console,
    resume: bool,
    processes: Processes,
) -> None:
    """Train the drafter and write it to its folder, which this process, or the first one, holds."""
    with processes.first_goes():
        data = ensure_data(recipe.data, target, console=console, spools=spools_of(recipe, target))
    processes.agree(data.fingerprint, "the training data")
    model, words = _initial(recipe, target, data, warm)
    console.print(
        f"Training {recipe.name}: {data.num_response_tokens:,} response tokens, {recipe.training.epochs} epoch(s); "
        f"{words}.",
        highlight=False,
    )
    loop, final = _run(
        recipe, target, data, model=model, folder=folder, console=console, resume=resume, processes=processes
    )
    read = recipe.training.features == "cached" and not come_with_answers(recipe, target)
    summary = {
        "recipe": recipe.model_dump(mode="json"),
        "recipe_hash": _recipe_hash(recipe),
        "target": target.name,
        "target_fingerprint": target.fingerprint,
        "data_fingerprint": data.fingerprint,
        "objective": recipe.objective.type,
        "warm_start": warm.path.name if warm else None,
        "tokens": final.tokens,
        "seconds": loop.seconds,
        "target_forwards": loop.target_forwards + len(data.sequences) * read,
        "selected_step": loop.best_step if recipe.evaluation and recipe.evaluation.select == "best" else final.step,
        "heldout": final.heldout,
    }
    with processes.first_goes():
        if processes.is_first:
            _save(loop.model, folder, summary)


def _save(model: DraftModel, folder: Path, summary: dict[str, Any]) -> None:
    model.save(folder)
    text = json.dumps(summary, indent=2, sort_keys=True) + "\n"
    write_atomic(folder / "training.json", text.encode())  # written last: a folder that has it is complete
    (folder / "resume.safetensors").unlink(missing_ok=True)


def drafter_key(recipe: RecipeConfig, target: Target) -> str:
    """Return the hash of everything that determines the weights: recipe, target, data, dtype, the warm start's own."""
    parts = [_FORMAT, recipe.content(), target.fingerprint, str(target.dtype), data_key(recipe.data, target)]
    if recipe.warm_start is not None:
        parts.append(drafter_key(load_recipe(recipe.warm_start), target))
    return content_hash(parts)


def _recipe_hash(recipe: RecipeConfig) -> str:
    """Return the hash of what a recipe and its warm start say, whatever the target."""
    if recipe.warm_start is None:
        return content_hash(recipe.content())
    return content_hash([recipe.content(), _recipe_hash(load_recipe(recipe.warm_start))])


def estimate(recipe: RecipeConfig, *, target_name: str | None = None, flops: float | None = None) -> dict[str, Any]:
    """Return what a recipe would cost, without loading anything (entry point ``estimate``).

    Keys: ``cached`` (a drafter of this recipe for a target of this name is there, and the costs are 0), ``data_s``
    (answers and features, which recipes with the same ``data_key`` share), ``training_s``, ``warm_start`` (a recipe
    that must be trained first, or None), ``seconds`` (all together, the warm start's included), ``bytes`` of the
    cache, and ``slot_columns``: tokens for which the target's keys and values have room while answers are made (0: no
    answers are), with ``keeps_states`` where its states have, too.

    Args:
        recipe: The recipe.
        target_name: Another target than the recipe's.
        flops: Operations a second of this machine's products (``models.device.product_flops``), over how many times a
            target is as large as the embedded one; None: as where the rates were measured.
    """
    key = content_hash(recipe.data.content())
    wanted = (_recipe_hash(recipe), target_name or recipe.target)
    for path in (cache_dir() / "drafters").glob("*/training.json"):
        summary = read_json(path)
        if (summary.get("recipe_hash"), summary.get("target")) == wanted:
            free: dict[str, Any] = {"cached": True, "data_s": 0.0, "training_s": 0.0, "seconds": 0.0, "bytes": 0}
            return free | {"data_key": key, "warm_start": None, "slot_columns": 0, "keeps_states": False}
    tokens, epochs = recipe.data.num_tokens, recipe.training.epochs
    seen = recipe.data.shows_images
    total = tokens * (_SHOWN_TOTAL_PER_RESPONSE if seen else _TOTAL_PER_RESPONSE)
    cached = recipe.training.features == "cached"
    reading_s = total / (_SHOWN_TOKENS_PER_S if seen else _FEATURE_TOKENS_PER_S)
    heldout = recipe.data.num_heldout * recipe.data.max_new_tokens / 2  # tokens of held-out answers, half as long
    data_s = (tokens + heldout) / _DATA_TOKENS_PER_S + (reading_s if seen else 0.0)
    size, key_size = num_bytes(int(total), _FEATURE_NUMBERS), num_bytes(int(total), _KEY_NUMBERS)
    keys = cached and wants_keys(recipe) and key_size <= recipe.training.keys_gb * 1e9
    asking = (_ASKING_KEPT if keys or not cached else _ASKING) if asks_target(recipe) else 1.0
    step_s = _STEP_COST[recipe.architecture.type] * asking / _LAYER_STEPS_PER_S
    training_s = tokens * epochs * recipe.objective.ttt_steps * step_s
    if not cached:
        training_s += reading_s * epochs
    elif seen:
        data_s += reading_s  # those of texts are there when these are answered
    if recipe.evaluation is not None:
        decoded = recipe.evaluation.prompts * recipe.evaluation.max_new_tokens * recipe.evaluation.times
        training_s += decoded / _DECODED_TOKENS_PER_S
    warm_s = 0.0
    if recipe.warm_start is not None:
        warm_s = estimate(load_recipe(recipe.warm_start), target_name=target_name, flops=flops)["seconds"]
    faster = min((flops or _FLOPS) / _FLOPS, _MOST_FASTER)
    return {
        "cached": False,
        "data_key": key,
        "data_s": data_s / faster,
        "training_s": training_s / faster,
        "warm_start": recipe.warm_start,
        "seconds": (data_s + training_s) / faster + warm_s,
        "bytes": size + key_size * keys if cached else 0,
        "slot_columns": recipe.data.slots * (recipe.data.max_prompt_tokens + recipe.data.max_new_tokens),
        "keeps_states": cached and not seen,
    }


def _open(folder: Path) -> TrainedDrafter | None:
    summary = read_json(folder / "training.json")
    if not summary or not (folder / "model.safetensors").is_file():
        return None
    return TrainedDrafter(
        folder,
        True,
        summary["seconds"],
        summary["tokens"],
        summary["objective"],
        summary.get("target_forwards", 0),
        summary.get("heldout", {}),
    )


def _initial(
    recipe: RecipeConfig, target: Target, data: TrainingData, warm: TrainedDrafter | None
) -> tuple[DraftModel, str]:
    """Return the drafter that training starts from, and what it is, in words."""
    if warm is not None:
        return load_model(recipe.architecture, warm.path, target), f"from the drafter of '{recipe.warm_start}'"
    vocabulary, coverage = draft_vocabulary(
        data.sequences, target.vocab_size, recipe.architecture.draft_vocab_size, sorted(target.eos_ids)
    )
    model = fresh_model(recipe.architecture, target, vocabulary, seed=recipe.training.seed)
    return model, f"draft vocabulary {len(vocabulary):,} covers {coverage:.1%} of them"


def _run(
    recipe: RecipeConfig,
    target: Target,
    data: TrainingData,
    *,
    model: DraftModel,
    folder: Path,
    console: Console,
    resume: bool,
    processes: Processes,
) -> tuple[TrainingLoop, Progress]:
    config, evaluation = recipe.training, recipe.evaluation
    head = target.model.get_output_embeddings().weight
    with processes.first_goes():
        maker = BatchMaker(data.sequences, feature_source(recipe, target, data, console), head, model, target)
        copying = isinstance(recipe.architecture, Eagle3Architecture) and recipe.architecture.copying
        if recipe.warm_start is None and copying and isinstance(model, Eagle3Model):
            start_copying(model, *maker.slots(SLOTS_PER_WIDTH * target.hidden_size), seed=config.seed)
        heldout = evaluator(recipe, target, data, model, console) if processes.is_first else None
    objective = make_objective(recipe.objective)
    if wants_compiling(config.compile, target.device):
        compile_row_losses(objective)
    autocast = target.dtype == torch.bfloat16 if config.autocast == "auto" else config.autocast
    rows, heldout_rows = (sum(response_rows(sequences)) for sequences in (data.sequences, data.heldout))
    loop = TrainingLoop(
        model=model,
        objective=objective,
        maker=maker,
        heldout=heldout,
        config=config,
        autocast=autocast,
        folder=folder,
        key=folder.name,
        evaluations=evaluations_of(config.epochs * rows, heldout_rows) if evaluation is None else evaluation.times,
        select="tau" if evaluation is not None and evaluation.select == "best" else None,
        processes=processes,
    )
    with training_bar(console) as bar:
        task = bar.add_task("Training", total=loop.num_steps, status="")

        def report(progress: Progress) -> None:
            tau = progress.heldout.get("tau", progress.heldout.get("tau_chain"))
            status = f"loss {progress.loss:.3f}" + (f", held-out tau {tau:.3f}" if tau else "")
            bar.update(task, completed=progress.step, status=status)

        final = loop.run(resume=resume, report=report)
    return loop, final
