"""What all verbs share: the program itself, its options, and how errors reach the user."""

from __future__ import annotations

import errno
import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ParamSpec

import typer

from vsdbench.errors import VsdbenchError, first_line, is_disk_full, is_out_of_memory

if TYPE_CHECKING:
    from rich.console import Console

    from vsdbench.bench.summary import Summary

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

_NO_PLACE = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG}
)
"""What is wrong with a place that the user named, not with the program."""

Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout; everything else goes to stderr.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="auto (measured), bf16, fp16, fp32 or fp64.")]
TargetName = Annotated[str | None, typer.Option(help="Target instead of the file's: hub id, folder or embedded model.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, estimate time and memory, and stop.")]
Seed = Annotated[int | None, typer.Option(help="Seed instead of the file's.")]
Diagnostics = Annotated[
    bool, typer.Option("--diagnostics", help="Also how drafting and decoding differ: pruned paths, calibration.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Number of prompts, stratified by category.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the newest unfinished run like this one.")]
RunId = Annotated[str | None, typer.Option("--run", help="Continue this run: its id, the beginning of it, or latest.")]
Results = Annotated[Path | None, typer.Option(help="Folder of runs (default: results/ or $VSDBENCH_RESULTS).")]
Strict = Annotated[
    bool, typer.Option("--strict", help="Exit with 1 where the A/A control shows that the machine was too noisy.")
]
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
            _nobody_reads()
        except (OSError, RuntimeError, MemoryError) as error:
            sentence = _of_the_machine(error)
            if sentence is None:
                raise
            _fail(sentence, 3)

    return guarded


def _of_the_machine(error: Exception) -> str | None:
    """Return what the user can do about an error, or None where it is a bug."""
    if is_out_of_memory(error):
        return f"Out of memory: use a smaller target, tree or --dtype bf16 ({first_line(error)})."
    if is_disk_full(error):
        return "The disk is full: free some space (see `vsdbench doctor` for the cache) and run again."
    if isinstance(error, OSError) and error.errno in _NO_PLACE and error.filename is not None:
        return f"'{error.filename}' cannot be written or read ({error.strerror}): choose another place."
    return None


def _fail(message: str, code: int) -> None:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)


def notes(*, quiet: bool = False) -> Console:
    """Return the console of notes and progress: stderr."""
    from rich.console import Console

    return Console(stderr=True, quiet=quiet, highlight=False)


def output(*, highlight: bool = True) -> Console:
    """Return the console of what was asked for: stdout.

    Where nobody reads on (``| head``) the rest goes nowhere and the verb goes on: its exit code is still to come.
    """
    from rich.console import Console

    class Output(Console):
        def on_broken_pipe(self) -> None:
            _nobody_reads()

    return Output(highlight=highlight)


def _nobody_reads() -> None:
    """Send the rest of stdout nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def warn_of_noise(summary: Summary, console: Console) -> None:
    """Print a warning for every A/A control of a run that does not hold 1."""
    from rich.text import Text

    from vsdbench.bench.checks import noise

    for sentence in noise(summary):
        console.print(Text(f"warning: {sentence}", style="yellow"), soft_wrap=True)


def print_json(data: object) -> None:
    """Write one JSON value to stdout."""
    try:
        typer.echo(json.dumps(data, ensure_ascii=False, allow_nan=False))
    except BrokenPipeError:
        _nobody_reads()


def split_items(items: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return names and ``key=value`` overrides.

    >>> split_items(["mtbench", "repeats=3"])
    (['mtbench'], ['repeats=3'])
    """
    overrides = [item for item in items if "=" in item and not Path(item).exists()]
    return [item for item in items if item not in overrides], overrides


def required(names: Sequence[str], what: str, example: str) -> Sequence[str]:
    """Return ``names`` if there are any.

    Raises:
        ConfigError: There are none.
    """
    if not names:
        from vsdbench.errors import ConfigError

        raise ConfigError(f"No {what} was named, for example: {example}")
    return names
