"""The verbs that make and measure drafters: run and train."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vsdbench.cli.common import (
    Device,
    Diagnostics,
    DryRun,
    Dtype,
    Json,
    Limit,
    Quiet,
    Results,
    Resume,
    RunId,
    Seed,
    Strict,
    TargetName,
    TrustRemoteCode,
    app,
    notes,
    output,
    print_json,
    required,
    split_items,
    verb,
    warn_of_noise,
)

if TYPE_CHECKING:
    from rich.console import Console

    from vsdbench.bench.run import RunOptions
    from vsdbench.bench.summary import Summary
    from vsdbench.processes import Processes


@app.command()
@verb
def run(  # noqa: PLR0917 - a command's options
    items: Annotated[list[str], typer.Argument(metavar="SUITE|KEY=VALUE", help="Suites, and changes to them.")],
    target: TargetName = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    limit: Limit = None,
    seed: Seed = None,
    resume: Resume = False,
    run_id: RunId = None,
    results: Results = None,
    categories: Annotated[bool, typer.Option("--categories", help="Also table rows for every category.")] = False,
    diagnostics: Diagnostics = False,
    strict: Strict = False,
    trust_remote_code: TrustRemoteCode = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Decode a suite with every drafter and baseline, measure, print the table, keep the records.

    What is missing comes first: the target is fetched, drafters are trained. Example:
    [bold]vsdbench run suites/quickstart.yaml --limit 4 repeats=3[/bold]
    """
    from vsdbench.bench.checks import enforce
    from vsdbench.bench.run import RunOptions
    from vsdbench.errors import ConfigError
    from vsdbench.suites.loaders import load_config

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("vsdbench run measures with one process; start it without torchrun, which is for train.")
    names, overrides = split_items(items)
    if seed is not None:
        overrides.append(f"seed={seed}")
    options = RunOptions(
        overrides=overrides,
        target=target,
        device=device,
        dtype=dtype,
        limit=limit,
        resume=resume,
        run=run_id,
        results=results,
        trust_remote_code=trust_remote_code,
    )
    console = notes(quiet=quiet)
    for name in required(names, "suite", "vsdbench run suites/quickstart.yaml"):
        load_config(name, overrides)  # every mistake is found before hours are spent
    tables = {"categories": categories, "diagnostics": diagnostics}
    if dry_run:
        _print_all([_estimate_one(name, options, console, as_json=as_json) for name in names], as_json=as_json)
        return
    summaries = [_run_one(name, options, console, as_json=as_json, **tables) for name in names]
    _print_all(summaries, as_json=as_json)
    enforce(summaries, strict=strict)


def _print_all(results: Sequence[Mapping[str, Any]], *, as_json: bool) -> None:
    """Print the results of one or several suites as one JSON value, if that was asked for."""
    if as_json:
        print_json(results[0] if len(results) == 1 else {"schema": 1, "runs": results})


def _run_one(name: str, options: RunOptions, console: Console, *, as_json: bool, **tables: bool) -> Summary:
    """Run a suite, print what it gave (JSON apart) and what that can show, and return its summary."""
    from vsdbench.bench.run import run_suite
    from vsdbench.report.figures import write_figures
    from vsdbench.report.tables import print_summary

    folder, summary = run_suite(name, options, console)
    figures = write_figures(summary, folder / "figures")
    if not as_json:
        print_summary(summary, output(), **tables)
    warn_of_noise(summary, console)
    console.print(f"records and {len(figures)} figures: {folder}", soft_wrap=True, markup=False)
    return summary


def _estimate_one(name: str, options: RunOptions, console: Console, *, as_json: bool) -> dict[str, Any]:
    """Return what a run would take, printed (JSON apart)."""
    from vsdbench.bench.estimate import estimate, print_estimate

    result = estimate(name, options, console)
    if not as_json:
        print_estimate(result, output())
    return result


@app.command()
@verb
def train(  # noqa: PLR0917 - a command's options
    items: Annotated[list[str], typer.Argument(metavar="RECIPE|KEY=VALUE", help="Recipes, and changes to them.")],
    target: TargetName = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = None,
    trust_remote_code: TrustRemoteCode = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train drafters from recipes; one that was stopped goes on, one that is finished is found in the cache.

    A recipe with several arms trains all of them, with every seed; [bold]NAME:ARM@SEED[/bold] trains one alone.
    """
    from vsdbench import registry
    from vsdbench.processes import joined

    names, overrides = split_items(items)
    overrides += [f"training.seed={seed}"] if seed is not None else []
    overrides += [f"target={target}"] if target is not None else []
    load_recipe = registry.load("vsdbench.trainers", "load")
    members = registry.load("vsdbench.trainers", "members")
    wanted = [
        member for name in required(names, "recipe", "vsdbench train eagle3-kl-quickstart") for member in members(name)
    ]
    recipes = {name: load_recipe(name, overrides) for name in wanted}  # every mistake is found before hours are spent
    with joined(device) as processes:
        console = notes(quiet=quiet or not processes.is_first)
        options = {"dtype": dtype, "trust_remote_code": trust_remote_code}
        train_one = partial(_train_one, options, processes, console)
        make = partial(_estimate_training, dtype, processes) if dry_run else train_one
        results = [{"recipe": name} | make(recipe) for name, recipe in recipes.items()]
    if not processes.is_first:
        return
    if as_json:
        print_json({"schema": 1, "drafters": results})
    else:
        for result in results:
            shown = {k: f"{v:.3f}" if k == "heldout_tau" else f"{v:.0f}" if isinstance(v, float) else v
                     for k, v in result.items() if v is not None}  # fmt: skip
            typer.echo("  ".join(f"{key}: {value}" for key, value in shown.items()))


def _estimate_training(dtype: str, processes: Processes, recipe: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return what training a recipe would cost on this machine, its target being as small as the embedded one."""
    from vsdbench import registry
    from vsdbench.models.device import choose_device, choose_dtype, product_flops

    device = choose_device(processes.device)
    cost: dict[str, Any] = registry.load("vsdbench.trainers", "estimate")(
        recipe, flops=product_flops(device, choose_dtype(dtype, device))
    )
    return cost


def _train_one(options: dict[str, Any], processes: Processes, console: Console, recipe: Any) -> dict[str, Any]:  # noqa: ANN401
    """Load a recipe's target, train its drafter, and return what is said of it."""
    from vsdbench import registry
    from vsdbench.bench.run import RunOptions, load_target
    from vsdbench.processes import common_dtype

    options = options | {"device": processes.device, "dtype": common_dtype(options["dtype"], processes)}
    shard = processes.count > 1 and recipe.training.shard_target
    processes.lend(None)  # the target of the recipe before this one, if that was sharded
    with processes.first_goes():
        model = load_target(recipe.target, RunOptions(**options, load_on_cpu=shard), console)
    trained = registry.load("vsdbench.trainers", "default")(recipe, target=model, console=console, processes=processes)
    budget = {"tokens": trained.tokens, "target_forwards": trained.target_forwards, "seconds": trained.seconds}
    details = {"heldout_tau": trained.heldout.get("tau"), "cached": trained.cached}
    return {"checkpoint": str(trained.path)} | budget | details
