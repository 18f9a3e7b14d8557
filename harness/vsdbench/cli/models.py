"""The verb of targets: which ones need no hub, how well the built ones see, and building one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from vsdbench.cli.common import Json, Quiet, app, notes, print_json, verb

if TYPE_CHECKING:
    from collections.abc import Sequence


@app.command()
@verb
def models(
    action: Annotated[str, typer.Argument(help="list or build.")],
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="What to build.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List the targets that need no hub, with the scores of those that read pictures, or build one of these.

    A build that was stopped goes on where it was. Example: [bold]vsdbench models build smolvision[/bold]
    """
    from vsdbench.errors import ConfigError, did_you_mean

    if action == "list":
        if names:
            raise ConfigError(f"vsdbench models list takes no name, but '{names[0]}' was given.")
        _print(_described(), as_json=as_json)
    elif action == "build":
        _print(_build(names or [], quiet=quiet), as_json=as_json)
    else:
        raise ConfigError(f"There is no 'vsdbench models {action}'.{did_you_mean(action, ['list', 'build'])}")


def _build(names: Sequence[str], *, quiet: bool) -> list[dict[str, Any]]:
    from vsdbench.cli.common import required
    from vsdbench.errors import ConfigError, did_you_mean
    from vsdbench.pictures.settings import BUILT_MODELS

    for name in required(names, "model", "vsdbench models build smolvision"):
        if name not in BUILT_MODELS:
            raise ConfigError(f"'{name}' is not a model that is built here.{did_you_mean(name, BUILT_MODELS)}")
    from vsdbench.models.source import fetch_model

    for name in names:
        files = fetch_model(name, progress=not quiet)
        notes(quiet=quiet).print(f"{name}: {files.path}", soft_wrap=True, markup=False)
    return [entry for entry in _described() if entry["name"] in names]


def _described() -> list[dict[str, Any]]:
    from vsdbench.catalog import entries
    from vsdbench.pictures.settings import BUILT_MODELS, METADATA, built_folder, load_metadata

    found = entries("models")
    for entry in found:
        if entry["name"] in BUILT_MODELS and (built_folder(entry["name"]) / METADATA).is_file():
            metadata = load_metadata(built_folder(entry["name"]))
            entry |= {"trained": metadata["trained"], "scores": metadata["scores"]}
    return found


def _print(found: Sequence[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        print_json({"schema": 1, "models": list(found)})
        return
    from vsdbench.pictures.settings import score_lines

    width = max((len(entry["name"]) for entry in found), default=0)
    for entry in found:
        typer.echo(f"{entry['name']:<{width}}  {entry['description']}".rstrip())
        for part, what in entry.get("trained", {}).items():
            typer.echo(f"  {part.replace('_', ' ')}: {what}")
        for line in score_lines(entry.get("scores", {})):
            typer.echo(f"  {line}")
