"""The verb that holds two runs, or two methods of one, against each other: compare."""

from __future__ import annotations

from typing import Annotated

import typer

from vsdbench.cli.common import (
    Device,
    Dtype,
    Json,
    Limit,
    Quiet,
    Results,
    TargetName,
    app,
    notes,
    output,
    print_json,
    verb,
)


@app.command()
@verb
def compare(  # noqa: PLR0917 - a command's options
    a: Annotated[
        str,
        typer.Argument(
            metavar="A",
            help="The reference: RUN or RUN:METHOD (id, beginning, latest, path); with --suite a drafter of it, a "
            "folder of weights (or TYPE:PATH), or a recipe.",
        ),
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="What is compared with it, likewise.")],
    suite: Annotated[str | None, typer.Option(help="First decode both on this suite, in one run.")] = None,
    gate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METRIC>=CHANGE%", help='Exit with 1 on a regression: "tau>=-1%" or "speedup>=-3%"; repeatable.'
        ),
    ] = None,
    gate_on: Annotated[
        str,
        typer.Option(
            metavar="WHAT",
            help="What must be below the bound for a gate to fail: interval (all of it: a significant regression), "
            "point (the estimate), or lower (its lower end: passes only what is shown to be no worse).",
        ),
    ] = "interval",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap.")] = 0,
    target: TargetName = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    limit: Limit = None,
    results: Results = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare two runs, drafters or checkpoints prompt by prompt: what changed from A to B, and how sure that is.

    Of two runs, methods of the same name are paired, or the two that are named. Methods ARM@SEED are the training seeds
    of ARM; [bold]RUN:ARM[/bold] takes all of them, and the interval then covers training again. Checkpoints and recipes
    are decoded first: [bold]vsdbench compare old/ new/ --suite quickstart[/bold]; --target, --device, --dtype and
    --limit are for that alone.
    """
    from rich.text import Text

    from vsdbench.bench.compare import compare as compare_sides
    from vsdbench.bench.compare import load_side
    from vsdbench.bench.gates import enforce, judge, parse_gate, parse_gate_on
    from vsdbench.paths import results_dir
    from vsdbench.report.comparison import print_comparison

    gates, on = [parse_gate(text) for text in gate or []], parse_gate_on(gate_on)
    console = notes(quiet=quiet)
    if suite is None:
        folder = results_dir(results)
        sides = [load_side(spec, folder) for spec in (a, b)]
    else:
        from vsdbench.bench.run import RunOptions
        from vsdbench.bench.versus import decode_both

        options = RunOptions(target=target, device=device, dtype=dtype, limit=limit, results=results, resume=True)
        sides = decode_both((a, b), suite, options, console)
    comparison = compare_sides(*sides, seed=seed)
    comparison["gates"] = judge(comparison["rows"], gates, on)
    for sentence in comparison["warnings"]:
        console.print(Text(f"warning: {sentence}", style="yellow"), soft_wrap=True)
    if as_json:
        print_json(comparison)
    else:
        print_comparison(comparison, output())
    enforce(comparison["gates"])
