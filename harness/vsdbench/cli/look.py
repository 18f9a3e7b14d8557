"""The verbs that look and copy: list, show, cp, validate, schema, doctor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from vsdbench.cli.common import (
    Device,
    Diagnostics,
    Json,
    Quiet,
    Results,
    app,
    notes,
    output,
    print_json,
    verb,
    warn_of_noise,
)


@app.command("list")
@verb
def list_(
    kind: Annotated[str, typer.Argument(help="suites, recipes, objectives, drafters, peers, models or runs.")],
    results: Results = None,
    as_json: Json = False,
) -> None:
    """List suites, recipes, objectives, drafters, peers, models or runs."""
    from vsdbench.catalog import entries

    found = entries(kind, results)
    if as_json:
        print_json({"schema": 1, kind: found})
        return
    width = max((len(entry["name"]) for entry in found), default=0)
    for entry in found:
        typer.echo(f"{entry['name']:<{width}}  {entry['description']}".rstrip())


@app.command()
@verb
def show(  # noqa: PLR0917 - a command's options
    name: Annotated[str, typer.Argument(help="A suite, recipe, objective, drafter, peer or run.")],
    results: Results = None,
    diagnostics: Diagnostics = False,
    spans: Annotated[
        bool, typer.Option("--spans", help="Of a run: example answers, with the drafted tokens marked.")
    ] = False,
    drafter: Annotated[
        list[str] | None,
        typer.Option(help="With --spans: show this drafter's answers (repeatable; default: the two best)."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show one thing: a file as it is, a plug-in's description, a run's table or its example answers."""
    from vsdbench import catalog
    from vsdbench.errors import ConfigError
    from vsdbench.paths import results_dir

    if drafter and not spans:
        raise ConfigError(f"--drafter {drafter[0]} is for --spans: give both, or neither.")
    try:
        kind, path, text = catalog.find(name)
    except ConfigError:
        from vsdbench.store.store import find_run, list_runs

        if not any(run.name.startswith(name) for run in list_runs(results_dir(results))) and name != "latest":
            raise
        run = find_run(results_dir(results), name)
        if spans:
            _show_spans(run, drafter or [], as_json=as_json)
        else:
            _show_run(run, as_json=as_json, diagnostics=diagnostics)
        return
    if spans:
        raise ConfigError(f"--spans is for runs, but '{name}' is among the {kind}s: see `vsdbench list runs`.")
    if as_json:
        print_json({"schema": 1, "kind": kind, "path": str(path) if path else None, "text": text})
    else:
        typer.echo(f"# {kind}: {path or name}\n{text.rstrip()}")


def _show_run(run: Path, *, as_json: bool, diagnostics: bool) -> None:
    from vsdbench.bench.summary import summarise
    from vsdbench.report.tables import print_summary
    from vsdbench.store.batches import load_batches
    from vsdbench.store.store import load_manifest, load_records

    records, manifest = load_records(run), load_manifest(run)
    if "ablation" in manifest:
        from vsdbench.ablation.analysis import analyse
        from vsdbench.ablation.show import print_result

        result = analyse(records, manifest)
        if as_json:
            print_json(result)
            return
        print_result(result, output(highlight=False))
    summary = summarise(records, manifest=manifest, batches=load_batches(run))
    if as_json:
        print_json(summary)
    else:
        print_summary(summary, output(), diagnostics=diagnostics)
        warn_of_noise(summary, notes(quiet=False))


def _show_spans(run: Path, drafters: list[str], *, as_json: bool) -> None:
    from vsdbench.bench.spans import drawn, to_json
    from vsdbench.errors import ConfigError
    from vsdbench.report.spans import print_spans
    from vsdbench.store.examples import load_examples
    from vsdbench.store.frames import to_frames
    from vsdbench.store.store import load_manifest, load_records

    examples, frames = load_examples(run), to_frames(load_records(run))
    if examples is None:
        records = frames[0]
        if load_manifest(run).get("status") != "complete":
            why = "it is not finished. Go on with it first: repeat its command with --resume."
        elif not ((records["kind"] == "drafter") & (records["num_steps"] > 0)).any():
            why = "no token of it was drafted, since no drafter made a step of which it is told what it gave."
        else:
            why = "it was made before runs kept them. Run its suite again."
        raise ConfigError(f"{run} has no example answers: {why}")
    found = drawn(frames, examples, drafters)
    if as_json:
        context = {"schema": 1, "run_id": run.name, "mode": examples.mode, "temperature": examples.temperature}
        print_json(context | {"chosen_by": examples.drafters[0], "examples": [to_json(example) for example in found]})
    else:
        print_spans(examples, found, output(highlight=False))


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
    """Check suite and recipe files; name the first mistake, and what would be right."""
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
    """Check this machine: device, dtype, bandwidth, caches, and what is missing with the command that fixes it."""
    from vsdbench.doctor import examine, print_examination

    with notes(quiet=quiet or as_json).status("measuring"):
        report = examine(device)
    if as_json:
        print_json(report)
    else:
        print_examination(report, output(highlight=False))
