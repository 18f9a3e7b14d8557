"""The command line's reference, ``docs/cli.md``, made from the command line's own help so that the two agree.

``python -m vsdbench.clidoc`` writes it; a test fails when the file and the help differ.
"""

from __future__ import annotations

import re
from pathlib import Path

from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from vsdbench.cli import app
from vsdbench.errors import ConfigError

WIDTH = 88
"""Columns of the help in the file, whatever the terminal has."""
CLI_PAGE = Path("docs/cli.md")

_INTRODUCTION = """\
# Command line

Made from the program's own help by `python -m vsdbench.clidoc`; do not edit.

Exit codes: 0 all well, 1 a gate failed (an answer is not lossless, a regression), 2 usage or configuration, 3 machine
or network, 130 interrupted with everything measured so far kept.
"""
_MARKUP = re.compile(r"\[/?(?:bold|italic|dim|green|yellow|red)\]")


def render() -> str:
    """Return the page: the help of the program, then that of every verb, as plain text of a fixed width."""
    root = get_command(app)
    if not isinstance(root, TyperGroup):
        raise TypeError(f"the command line is a {type(root).__name__}, where a group of verbs is needed")
    parts = [_INTRODUCTION, _section("vsdbench", _help(root, "vsdbench"))]
    for name, command in root.commands.items():
        if not isinstance(command, TyperCommand):
            raise TypeError(f"the verb '{name}' is a {type(command).__name__}, where a plain command is needed")
        title = f"vsdbench {name}"
        parts.append(_section(title, _help(command, title)))
    return "\n".join(parts)


def _help(command: TyperCommand | TyperGroup, title: str) -> str:
    """Return one command's help without boxes and colours, so that no terminal setting changes it."""
    command.rich_markup_mode = None
    context = command.make_context(
        title, [], resilient_parsing=True, terminal_width=WIDTH, max_content_width=WIDTH, color=False
    )
    text = _MARKUP.sub("", command.get_help(context))
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n```text\n{text}\n```\n"


def write(page: Path = CLI_PAGE) -> Path:
    """Write the page and return where it is.

    Raises:
        ConfigError: There is no folder to write it in.
    """
    if not page.parent.is_dir():
        raise ConfigError(f"There is no folder '{page.parent}' here: run this from the checkout.")
    page.write_text(render(), encoding="utf-8")
    return page


if __name__ == "__main__":
    write()
