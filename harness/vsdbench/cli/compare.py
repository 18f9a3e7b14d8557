"""The verb that holds two runs, or two methods of one, against each other: compare."""

from __future__ import annotations

from typing import Annotated

import typer

from vsdbench.cli.common import Json, Quiet, Results, app, notes, print_json, verb


@app.command()
@verb
def compare(  # noqa: PLR0917 - a command's options
    a: Annotated[
        str, typer.Argument(metavar="A", help="The reference: RUN or RUN:METHOD (id, beginning, latest, path).")
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="What is held against it: RUN or RUN:METHOD.")],
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
            help="A gate fails where this is below the bound: interval (all of it: a significant regression), "
            "point (the estimate), or lower (any of the interval: shown to be no worse, or failed).",
        ),
    ] = "interval",
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    results: Results = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare two runs, or two methods of one run, prompt by prompt: what changed from A to B, and how sure that is.

    Two runs: methods of the same name are paired, or the two named. Methods ARM@SEED are the training seeds of ARM;
    [bold]RUN:ARM[/bold] takes all of them, and the interval covers training again. To compare checkpoints or recipes,
    decode both in one run first: [bold]vsdbench run SUITE drafters.NAME.checkpoint=PATH[/bold] (or .recipe=NAME), then
    [bold]vsdbench compare latest:ONE latest:OTHER[/bold].
    """
    from rich.console import Console
    from rich.text import Text

    from vsdbench.bench.compare import compare as compare_sides
    from vsdbench.bench.compare import load_side
    from vsdbench.bench.gates import enforce, judge, parse_gate, parse_gate_on
    from vsdbench.paths import results_dir
    from vsdbench.report.comparison import print_comparison

    gates, on = [parse_gate(text) for text in gate or []], parse_gate_on(gate_on)
    folder = results_dir(results)
    comparison = compare_sides(load_side(a, folder), load_side(b, folder), seed=seed)
    comparison["gates"] = judge(comparison["rows"], gates, on)
    console = notes(quiet=quiet)
    for sentence in comparison["warnings"]:
        console.print(Text(f"warning: {sentence}", style="yellow"), soft_wrap=True)
    if as_json:
        print_json(comparison)
    else:
        print_comparison(comparison, Console())
    enforce(comparison["gates"])
