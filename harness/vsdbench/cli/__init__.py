"""The command line: one thin function a verb. Imports happen inside the verbs, so that ``--help`` is immediate."""

from __future__ import annotations

from typing import Annotated

import typer

from vsdbench.cli import ablate, compare, look, measure, models, report  # noqa: F401 - importing a module registers its verbs
from vsdbench.cli.common import app, verb

__all__ = ["app", "main", "verb"]

_ORDER = ("run", "train", "ablate", "compare", "report", "list", "models", "show", "cp", "validate", "schema", "doctor")
app.registered_commands.sort(
    key=lambda command: _ORDER.index(command.name or getattr(command.callback, "__name__", ""))
)


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
