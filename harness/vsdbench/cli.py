"""The command line: one thin function a verb. Imports happen inside the verbs, so that ``--help`` is immediate."""

from __future__ import annotations

import errno
import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer

from vsdbench.errors import VsdbenchError

if TYPE_CHECKING:
    from rich.console import Console

    from vsdbench.bench.run import RunOptions
    from vsdbench.processes import Processes

app = typer.Typer(
    name="vsdbench",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Does training the drafter for this objective make decoding faster, by how much, and how sure are we?",
    epilog="Start with: vsdbench doctor, then vsdbench run suites/quickstart.yaml",
)

P = ParamSpec("P")

Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout; everything else goes to stderr.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="auto (measured), bf16, fp16, fp32 or fp64.")]
TargetName = Annotated[str | None, typer.Option(help="Another target: hub id, folder, or an embedded model's name.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, with time and memory, and stop.")]
Seed = Annotated[int | None, typer.Option(help="Another seed than the file's.")]
Results = Annotated[Path | None, typer.Option(help="Folder of runs (default: results/ or $VSDBENCH_RESULTS).")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that a hub model brings. Off by default.")
]


def verb(function: Callable[P, None]) -> Callable[P, None]:
    """Turn the errors a user may meet into one sentence on stderr and the right exit code."""

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            function(*args, **kwargs)
        except VsdbenchError as error:
            _fail(str(error), error.exit_code)
        except KeyboardInterrupt:
            _fail("Interrupted; what was finished is kept, and the same command goes on from there.", 130)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads on: not an error
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            _fail("The disk is full: free some space (see `vsdbench doctor` for the cache) and run again.", 3)
        except RuntimeError as error:
            if "out of memory" not in str(error).lower():
                raise
            _fail(f"Out of memory: use a smaller target, tree or --dtype bf16 ({str(error).splitlines()[0]}).", 3)

    return guarded


def _fail(message: str, code: int) -> None:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)


def _console(*, quiet: bool = False) -> Console:
    """Return the console of notes and progress: stderr."""
    from rich.console import Console

    return Console(stderr=True, quiet=quiet, highlight=False)


def _print_json(data: object) -> None:
    typer.echo(json.dumps(data, ensure_ascii=False, allow_nan=False))


def _split(items: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return names and ``key=value`` overrides.

    >>> _split(["mtbench", "repeats=3"])
    (['mtbench'], ['repeats=3'])
    """
    overrides = [item for item in items if "=" in item and not Path(item).exists()]
    return [item for item in items if item not in overrides], overrides


def _required(names: Sequence[str], what: str, example: str) -> Sequence[str]:
    if not names:
        from vsdbench.errors import ConfigError

        raise ConfigError(f"No {what} was named, for example: {example}")
    return names


@app.command()
@verb
def run(  # noqa: PLR0917 - a command's options
    items: Annotated[list[str], typer.Argument(metavar="SUITE... [KEY=VALUE...]", help="Suites, and changes to them.")],
    target: TargetName = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    limit: Annotated[int | None, typer.Option(min=1, help="Prompts to take, stratified by category.")] = None,
    seed: Seed = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the newest unfinished run like this one.")] = False,
    run_id: Annotated[
        str | None, typer.Option("--run", help="Continue this run: id, beginning of it, or latest.")
    ] = None,
    results: Results = None,
    categories: Annotated[bool, typer.Option("--categories", help="Table rows for every category too.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Decode a suite with every drafter and baseline, measure, print the table, keep the records.

    What is missing is made first: the target is fetched, drafters are trained. Example:
    [bold]vsdbench run suites/quickstart.yaml --limit 4 repeats=3[/bold]
    """
    from vsdbench.bench.run import RunOptions
    from vsdbench.errors import ConfigError

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("vsdbench run measures with one process; start it without torchrun, which is for train.")
    names, overrides = _split(items)
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
    console = _console(quiet=quiet)
    violations = 0
    for name in _required(names, "suite", "vsdbench run suites/quickstart.yaml"):
        if dry_run:
            _print_estimate(name, options, console, as_json=as_json)
        else:
            violations += _run_one(name, options, console, as_json=as_json, categories=categories)
    if violations:
        from vsdbench.errors import GateError

        raise GateError(
            f"{violations} answers differ from the baseline's by more than rounding explains: the speedups above are "
            "not lossless; see the divergences in records.jsonl, and repeat with --dtype fp32."
        )


def _run_one(name: str, options: RunOptions, console: Console, *, as_json: bool, categories: bool) -> int:
    """Run a suite, print what it gave, and return the number of answers that were not lossless."""
    from rich.console import Console

    from vsdbench.bench.run import run_suite
    from vsdbench.report.figures import write_figures
    from vsdbench.report.tables import print_summary

    folder, summary = run_suite(name, options, console)
    figures = write_figures(summary, folder / "figures")
    if as_json:
        _print_json(summary)
    else:
        print_summary(summary, Console(), categories=categories)
    console.print(f"records and {len(figures)} figures: {folder}", soft_wrap=True, markup=False)
    return sum(row["lossless"]["violations"] for row in summary["results"] if row["category"] is None)


def _print_estimate(name: str, options: RunOptions, console: Console, *, as_json: bool) -> None:
    from rich.console import Console

    from vsdbench.bench.estimate import estimate, print_estimate

    result = estimate(name, options, console)
    if as_json:
        _print_json(result)
    else:
        print_estimate(result, Console())


@app.command()
@verb
def train(  # noqa: PLR0917 - a command's options
    items: Annotated[
        list[str], typer.Argument(metavar="RECIPE... [KEY=VALUE...]", help="Recipes, and changes to them.")
    ],
    target: TargetName = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = None,
    trust_remote_code: TrustRemoteCode = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train drafters from recipes; a training that was stopped goes on, one that is finished is found in the cache.

    A recipe with several arms trains all of them, with every seed; [bold]NAME:ARM@SEED[/bold] is one alone.
    """
    from vsdbench import registry
    from vsdbench.processes import joined

    names, overrides = _split(items)
    overrides += [f"training.seed={seed}"] if seed is not None else []
    overrides += [f"target={target}"] if target is not None else []
    load_recipe = registry.load("vsdbench.trainers", "load")
    members = registry.load("vsdbench.trainers", "members")
    wanted = [
        member for name in _required(names, "recipe", "vsdbench train eagle3-kl-quickstart") for member in members(name)
    ]
    recipes = {name: load_recipe(name, overrides) for name in wanted}  # every mistake is found before hours are spent
    with joined(device) as processes:
        console = _console(quiet=quiet or not processes.is_first)
        options = {"dtype": dtype, "trust_remote_code": trust_remote_code}
        estimate = registry.load("vsdbench.trainers", "estimate")
        results = [
            {"recipe": name} | (estimate(recipe) if dry_run else _train_one(recipe, options, processes, console))
            for name, recipe in recipes.items()
        ]
    if not processes.is_first:
        return
    if as_json:
        _print_json({"schema": 1, "drafters": results})
    else:
        for result in results:
            shown = {k: f"{v:.3f}" if k == "heldout_tau" else f"{v:.0f}" if isinstance(v, float) else v
                     for k, v in result.items() if v is not None}  # fmt: skip
            typer.echo("  ".join(f"{key}: {value}" for key, value in shown.items()))


def _train_one(recipe: Any, options: dict[str, Any], processes: Processes, console: Console) -> dict[str, Any]:  # noqa: ANN401
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


@app.command("list")
@verb
def list_(
    kind: Annotated[str, typer.Argument(help="suites, recipes, objectives, drafters, models or runs.")],
    results: Results = None,
    as_json: Json = False,
) -> None:
    """List what there is."""
    from vsdbench.catalog import entries

    found = entries(kind, results)
    if as_json:
        _print_json({"schema": 1, kind: found})
        return
    width = max((len(entry["name"]) for entry in found), default=0)
    for entry in found:
        typer.echo(f"{entry['name']:<{width}}  {entry['description']}".rstrip())


@app.command()
@verb
def show(
    name: Annotated[str, typer.Argument(help="A suite, recipe, objective, drafter or run.")],
    results: Results = None,
    as_json: Json = False,
) -> None:
    """Show one thing: a file as it is, a plug-in's description, a run's table."""
    from vsdbench import catalog
    from vsdbench.errors import ConfigError
    from vsdbench.paths import results_dir

    try:
        kind, path, text = catalog.find(name)
    except ConfigError:
        from vsdbench.store.store import find_run, list_runs

        if not any(run.name.startswith(name) for run in list_runs(results_dir(results))) and name != "latest":
            raise
        _show_run(find_run(results_dir(results), name), as_json=as_json)
        return
    if as_json:
        _print_json({"schema": 1, "kind": kind, "path": str(path) if path else None, "text": text})
    else:
        typer.echo(f"# {kind}: {path or name}\n{text.rstrip()}")


def _show_run(run: Path, *, as_json: bool) -> None:
    from rich.console import Console

    from vsdbench.bench.summary import summarise
    from vsdbench.report.tables import print_summary
    from vsdbench.store.store import load_manifest, load_records

    summary = summarise(load_records(run), manifest=load_manifest(run))
    if as_json:
        _print_json(summary)
    else:
        print_summary(summary, Console())


@app.command()
@verb
def cp(
    name: Annotated[str, typer.Argument(help="A suite or recipe.")],
    destination: Annotated[Path, typer.Argument(help="File or folder to copy it to.")] = Path(),
) -> None:
    """Copy a suite or recipe out of the package, to be edited."""
    from vsdbench.catalog import copy

    typer.echo(str(copy(name, destination)))


@app.command()
@verb
def validate(files: Annotated[list[Path], typer.Argument(help="Suite or recipe files.")]) -> None:
    """Check suite and recipe files; the first mistake is named, with what would be right."""
    from vsdbench.catalog import validate as check

    for file in files:
        typer.echo(f"{file}: valid {check(file)}")


@app.command()
@verb
def schema(
    kind: Annotated[str, typer.Argument(help="suite or recipe.")] = "suite",
) -> None:
    """Print the JSON schema of a file, for editors that complete and check YAML."""
    from vsdbench import registry
    from vsdbench.errors import ConfigError, did_you_mean
    from vsdbench.suites.schema import json_schema

    if kind not in {"suite", "recipe"}:
        raise ConfigError(f"There is no schema of '{kind}'.{did_you_mean(kind, ['suite', 'recipe'])}")
    model = json_schema() if kind == "suite" else registry.load("vsdbench.trainers", "recipe").model_json_schema()
    typer.echo(json.dumps(model, indent=2))


@app.command()
@verb
def doctor(device: Device = "auto", as_json: Json = False, quiet: Quiet = False) -> None:
    """Look at this machine: device, dtype, bandwidth, caches, what is missing and the command that fixes it."""
    from rich.console import Console

    from vsdbench.doctor import examine, print_examination

    with _console(quiet=quiet or as_json).status("measuring"):
        report = examine(device)
    if as_json:
        _print_json(report)
    else:
        print_examination(report, Console(highlight=False))


def _version(value: bool) -> None:
    if value:
        from vsdbench import __version__

        typer.echo(f"vsdbench {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Handle options that stand before any verb."""
    del version


def main() -> None:
    """Run the command line."""
    app()
