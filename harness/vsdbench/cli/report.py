"""The verb that writes reports."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vsdbench.cli.common import Json, Quiet, Results, app, notes, print_json, required, verb


@app.command()
@verb
def report(  # noqa: PLR0917 - a command's options
    runs: Annotated[list[str], typer.Argument(metavar="RUN", help="Runs: id, beginning of it, latest, or folder.")],
    output: Annotated[
        Path | None, typer.Option(help="The PDF (default: reports/RUN.pdf, or in $VSDBENCH_REPORTS).")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Title of the document.")] = None,
    results: Results = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a paper-style PDF of runs, with every table (CSV, Markdown, LaTeX) and figure (SVG, PDF) beside it.

    Takes one run, an ablation, or several runs, which are compared with the first. The same records give the same file.
    """
    from vsdbench.paths import reports_dir, results_dir
    from vsdbench.report.paper import default_name, write_report
    from vsdbench.store.store import find_run

    folders = [find_run(results_dir(results), name) for name in required(runs, "run", "vsdbench report latest")]
    pdf = output or reports_dir() / f"{default_name(folders)}.pdf"
    console = notes(quiet=quiet)
    with console.status("writing the report"):
        written = write_report(folders, pdf, title=title)
    if as_json:
        print_json({"schema": 1, "report": str(pdf), "files": [str(path) for path in written]})
    else:
        typer.echo(str(pdf))
        console.print(
            f"{len(written) - 1} tables, figures and sources: {pdf.with_suffix('')}", soft_wrap=True, markup=False
        )
