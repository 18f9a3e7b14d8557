"""The verb that takes VSD apart, and sets other objectives against it: ablate."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vsdbench.cli.common import (
    Device,
    DryRun,
    Dtype,
    Json,
    Limit,
    Quiet,
    Results,
    Resume,
    RunId,
    Strict,
    TargetName,
    TrustRemoteCode,
    app,
    notes,
    output,
    print_json,
    split_items,
    verb,
    warn_of_noise,
)

if TYPE_CHECKING:
    from rich.console import Console

    from vsdbench.ablation.run import Plan
    from vsdbench.bench.run import RunOptions


@app.command()
@verb
def ablate(  # noqa: PLR0917 - a command's options
    items: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RECIPE|KEY=VALUE",
            help="A recipe or contest with the objective vsd (default: ablation-quickstart, with --arms "
            "contest-quickstart), and changes to it or to the suite for all arms.",
        ),
    ] = None,
    arms: Annotated[bool, typer.Option("--arms", help="Compare the contest's other objectives with its vsd.")] = False,
    arm: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only this arm of the contest; repeatable.")
    ] = None,
    no_car: Annotated[bool, typer.Option("--no-car", help="Arm without Confidence-Aware Regularization.")] = False,
    no_arw: Annotated[bool, typer.Option("--no-arw", help="Arm without Adaptive Rejection Weighting.")] = False,
    no_utility: Annotated[bool, typer.Option("--no-utility", help="Arm without the utility in the weights.")] = False,
    no_kl: Annotated[bool, typer.Option("--no-kl", help="Arm without log p - log q in the weights.")] = False,
    no_correction: Annotated[
        bool, typer.Option("--no-correction", help="Arm whose rejected paths end without the target's token.")
    ] = False,
    no_oracle: Annotated[
        bool, typer.Option("--no-oracle", help="Arm without the accept test: all proposals are kept whole.")
    ] = False,
    no_anchor: Annotated[bool, typer.Option("--no-anchor", help="Arm without the anchor loss on the data.")] = False,
    sampler: Annotated[list[str] | None, typer.Option(help="Arm with this sampler: mh.")] = None,
    proposals: Annotated[list[str] | None, typer.Option(help="Arm with these proposals: sampled, tree, mixed.")] = None,
    paths: Annotated[list[int] | None, typer.Option(min=1, help="Arm with this many paths per anchor.")] = None,
    depth: Annotated[list[int] | None, typer.Option(min=1, help="Arm with paths of this many tokens.")] = None,
    acceptance: Annotated[
        list[str] | None, typer.Option(help="Arm with this acceptance model: sampled, tree, greedy.")
    ] = None,
    grid: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML file of more arms: names, with dotted recipe changes.")
    ] = None,
    together: Annotated[bool, typer.Option("--together", help="Make one arm with all these changes.")] = False,
    suite: Annotated[
        str | None,
        typer.Option(help="Suite to decode, whose tree all arms use (default: ablation, with --arms contest)."),
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Training seeds 0, 1, … (default: the recipe's).")] = None,
    target: TargetName = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    limit: Limit = None,
    resume: Resume = False,
    run_id: RunId = None,
    results: Results = None,
    report: Annotated[
        bool, typer.Option("--report/--no-report", help="Also write the PDF: reports/RUN.pdf, or in $VSDBENCH_REPORTS.")
    ] = True,
    strict: Strict = False,
    trust_remote_code: TrustRemoteCode = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Which parts of VSD help, which objective is best? Train arms from one start on one budget; compare them with VSD.

    Each flag makes one arm, and a repeated option one arm per value; without any, every part is switched off in turn.
    With --arms the other objectives of a contest are the arms. Three controls run beside them: more training with the
    warm start's objective, on-policy reverse KL, and the warm start as it is; one that is an arm already runs once.
    Trained arms are cached, so adding an arm trains that arm alone. Examples:
    [bold]vsdbench ablate --no-car --paths 1 --paths 16 --seeds 3[/bold],
    [bold]vsdbench ablate contest-hour --arms[/bold]
    """
    from vsdbench.ablation.grid import Wanted
    from vsdbench.ablation.run import prepare
    from vsdbench.bench.run import RunOptions
    from vsdbench.errors import ConfigError

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("vsdbench ablate works with one process; train its arms under torchrun first.")
    switches = {
        "car": no_car,
        "arw": no_arw,
        "utility": no_utility,
        "kl": no_kl,
        "correction": no_correction,
        "oracle": no_oracle,
        "anchor": no_anchor,
    }
    settings = {
        "sampler": sampler,
        "proposals": proposals,
        "paths": paths,
        "depth": depth,
        "acceptance": acceptance,
    }
    names, overrides = split_items(items or [])
    if len(names) > 1:
        raise ConfigError(f"An ablation is of one recipe, but {len(names)} are named: {', '.join(names)}.")
    wanted = Wanted(
        parts=[part for part, off in switches.items() if off],
        settings={option: values for option, values in settings.items() if values},
        grid=grid,
        together=together,
        contest=arms,
        arms=arm or [],
    )
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
    plan = prepare(names[0] if names else None, wanted, options, console, suite=suite, num_seeds=seeds)
    if dry_run:
        _print_estimate(plan, options, console, as_json=as_json)
    else:
        _run(plan, options, console, as_json=as_json, report=report, strict=strict)


def _print_estimate(plan: Plan, options: RunOptions, console: Console, *, as_json: bool) -> None:
    from vsdbench.ablation.run import estimate_ablation
    from vsdbench.ablation.show import print_estimate

    for note in plan.notes:
        console.print(f"[yellow]note:[/] {note}")
    estimate = estimate_ablation(plan, options, console)
    if as_json:
        print_json(estimate)
    else:
        print_estimate(estimate, output(highlight=False))


def _run(plan: Plan, options: RunOptions, console: Console, *, as_json: bool, report: bool, strict: bool) -> None:
    """Run an ablation and print what it showed and what it could have shown.

    Raises:
        GateError: An answer was not lossless, or under ``strict`` the machine was too noisy.
    """
    from vsdbench.ablation.run import run_ablation
    from vsdbench.ablation.show import print_result, write_forest
    from vsdbench.bench.checks import enforce
    from vsdbench.report.tables import print_detectable

    folder, summary, result = run_ablation(plan, options, console)
    figures = write_forest(result, folder / "figures")
    if as_json:
        print_json(result)
    else:
        print_result(result, output(highlight=False))
        print_detectable(summary, output())
    warn_of_noise(summary, console)
    console.print(f"records and {len(figures)} figures: {folder}", soft_wrap=True, markup=False)
    if report:
        _report(folder, console)
    enforce([summary], strict=strict)


def _report(folder: Path, console: Console) -> None:
    from vsdbench.paths import reports_dir
    from vsdbench.report.paper import default_name, write_report

    pdf = reports_dir() / f"{default_name([folder])}.pdf"
    with console.status("writing the report"):
        write_report([folder], pdf)
    console.print(f"report: {pdf}", soft_wrap=True, markup=False)
