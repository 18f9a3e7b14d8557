"""What a recipe keeps of the target: features in files or computed anew, with keys and values or without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import TYPE_CHECKING

import rich.progress

from vsdbench.bars import Bars
from vsdbench.models.branching import can_branch, counts_tokens, key_shape
from vsdbench.paths import cache_dir
from vsdbench_drafters.objectives.path_objective import PathObjective
from vsdbench_drafters.training.data import data_key
from vsdbench_drafters.training.feature_files import cached_features, num_bytes
from vsdbench_drafters.training.features import OnlineFeatures
from vsdbench_drafters.training.kept import Keeps
from vsdbench_drafters.training.recipe import RecipeConfig, make_objective
from vsdbench_drafters.training.spool import FeatureSpool

if TYPE_CHECKING:
    from rich.console import Console

    from vsdbench.models.target import Target
    from vsdbench_drafters.training.features import FeatureSource
    from vsdbench_drafters.training.prompts import Split
    from vsdbench_drafters.training.shards import TrainingData


def asks_target(recipe: RecipeConfig) -> bool:
    """Whether the objective asks the target about drafted tokens."""
    return isinstance(make_objective(recipe.objective), PathObjective)


def wants_keys(recipe: RecipeConfig) -> bool:
    """Whether a recipe would have keys and values kept, if they were of use and not too large."""
    return asks_target(recipe) if recipe.training.keys == "auto" else recipe.training.keys


def come_with_answers(recipe: RecipeConfig, target: Target) -> bool:
    """Whether features are kept while the answers of a recipe's data are made, so that they need no other forward."""
    return recipe.training.features == "cached" and target.fused_layers is not None and not recipe.data.shows_images


def spools_of(recipe: RecipeConfig, target: Target) -> dict[Split, FeatureSpool]:
    """Return where the features of answers go that are still to be made; {}: they are not kept."""
    if not come_with_answers(recipe, target):
        return {}
    keeps = Keeps(target.feature_layers, keys=wants_keys(recipe) and _keys_are_of_use(recipe, target))
    folder, key = cache_dir() / "features", data_key(recipe.data, target)
    return {
        "train": FeatureSpool(folder / f"{key}.spool", keeps, recipe.training.keys_gb * 1e9),
        "heldout": FeatureSpool(folder / f"{key}.heldout.spool", Keeps(target.feature_layers)),
    }


def _keys_are_of_use(recipe: RecipeConfig, target: Target) -> bool:
    return can_branch(target) and (counts_tokens(target) or not recipe.data.shows_images)


def feature_source(recipe: RecipeConfig, target: Target, data: TrainingData, console: Console) -> FeatureSource:
    """Return where the features of a recipe's data come from, made now if they are to be kept and are not there."""
    num_tokens = int(data.sequences.lengths.sum())
    useful = _keys_are_of_use(recipe, target)
    if recipe.training.features == "online":
        return OnlineFeatures(target, data.sequences, keys=asks_target(recipe) and useful)
    keys = useful and wants_keys(recipe)
    size, limit_gb = num_bytes(num_tokens, prod(key_shape(target)), target.dtype.itemsize), recipe.training.keys_gb
    if keys and size > limit_gb * 1e9:
        keys = False
        console.print(
            f"Keys and values of the data would take {size / 1e9:.1f} GB, more than training.keys_gb={limit_gb:g}: the "
            "target runs the text before drafted tokens again.",
            highlight=False,
        )
    with training_bar(console) as bar:
        task = bar.add_task("Target features", total=num_tokens, status="")
        return cached_features(
            target,
            data.sequences,
            cache_dir() / "features",
            fingerprint=data.fingerprint,
            keys=keys,
            images=recipe.data.shows_images,
            spool=spools_of(recipe, target).get("train"),
            progress=lambda count: bar.advance(task, count),
            console=console,
        )


def heldout_source(recipe: RecipeConfig, target: Target, data: TrainingData, console: Console) -> FeatureSource:
    """Return where the features of a recipe's held-out answers come from, as ``feature_source`` does."""
    if recipe.training.features == "online" or not len(data.heldout):
        return OnlineFeatures(target, data.heldout)
    return cached_features(
        target,
        data.heldout,
        cache_dir() / "features",
        fingerprint=f"{data.fingerprint}, held out",
        images=recipe.data.shows_images,
        spool=spools_of(recipe, target).get("heldout"),
        console=console,
    )


@contextmanager
def training_bar(console: Console) -> Iterator[Bars]:
    """Show the progress of long work of training."""
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.TaskProgressColumn(),
        rich.progress.TimeRemainingColumn(elapsed_when_finished=True),
        rich.progress.TextColumn("{task.fields[status]}"),
    )
    with Bars(*columns, console=console) as bar:
        yield bar
