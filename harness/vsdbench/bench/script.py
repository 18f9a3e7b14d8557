"""What the files of ``benchmarks/`` share: their options, what they open, how they take turns and how they end.

A file says what it measures and how it is shown. That ``--target`` names another target, that methods take turns in an
order that alternates, and that an error is one line on stderr is said here.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from vsdbench.bench.conversation import encode_turn
from vsdbench.errors import VsdbenchError

if TYPE_CHECKING:
    from rich.console import Console

    from vsdbench.bench.run import RunOptions
    from vsdbench.models.target import Target
    from vsdbench.suites.loaders import Suite

TARGET = "smollm2-135m-q4"
T = TypeVar("T")


def make_parser(doc: str | None, *, has_json: bool = True) -> argparse.ArgumentParser:
    """Return a parser that describes a file by its docstring, and takes ``--json``."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if has_json:
        parser.add_argument("--json", action="store_true", help="print JSON on stdout in place of a table")
    return parser


def add_numbers(parser: argparse.ArgumentParser, *, dtype: str = "auto", device: bool = True) -> None:
    """Let a parser take what numbers are computed in, and where."""
    parser.add_argument("--dtype", default=dtype, help=f"auto, bf16, fp16, fp32 or fp64 (default: {dtype})")
    if device:
        parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")


def add_target(parser: argparse.ArgumentParser, *, device: bool = True) -> None:
    """Let a parser take a target of its own, and its numbers."""
    parser.add_argument("--target", default=TARGET, help=f"(default: {TARGET})")
    add_numbers(parser, device=device)


def add_suite(
    parser: argparse.ArgumentParser,
    default: str,
    *,
    dtype: str = "auto",
    limit: str = "--prompts",
    prompts: int | None = None,
    overrides: bool = False,
) -> None:
    """Let a parser take a suite, whose prompts and target are used, and what differs from it.

    Args:
        parser: The parser; with ``overrides`` use its ``parse_intermixed_args``.
        default: The suite.
        dtype: The default.
        limit: What the option is called that says how many prompts.
        prompts: So many by default; None: all.
        overrides: Whether ``key=value`` changes of the suite are taken.
    """
    if overrides:
        parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to the suite")
    parser.add_argument("--suite", default=default, help=f"where prompts and target come from (default: {default})")
    parser.add_argument("--target", help="another target than the suite's")
    add_numbers(parser, dtype=dtype)
    many = f"spread over the suite's categories (default: {prompts or 'all'})"
    parser.add_argument(limit, type=int, dest="limit", default=prompts, help=many)


def run_options(options: argparse.Namespace) -> RunOptions:
    """Return what was said about suite and target as a run takes it."""
    from vsdbench.bench.run import RunOptions  # noqa: PLC0415 - brings torch, which a report is timed without

    return RunOptions(
        overrides=getattr(options, "overrides", ()),
        target=options.target,
        device=options.device,
        dtype=options.dtype,
        limit=options.limit,
    )


def open_both(options: argparse.Namespace, console: Console) -> tuple[Suite, Target]:
    """Return the suite and its target, as the command line says.

    Raises:
        VsdbenchError: There is no such suite, target, device or dtype, or something cannot be fetched.
    """
    from vsdbench.bench.run import load_target, open_suite  # noqa: PLC0415 - likewise

    chosen = run_options(options)
    suite = open_suite(options.suite, chosen, console)
    return suite, load_target(suite.config.target, chosen, console)


def first_turns(suite: Suite, target: Target) -> list[Sequence[int]]:
    """Return the token ids of every prompt's first turn."""
    return [encode_turn(target, prompt, suite.config.generation) for prompt in suite.prompts]


def setting(target: Target) -> dict[str, Any]:
    """Return what was measured on, for the JSON."""
    import torch  # noqa: PLC0415 - likewise

    from vsdbench.models.device import dtype_name  # noqa: PLC0415 - likewise

    names = {"target": target.name, "dtype": dtype_name(target.dtype), "device": str(target.device)}
    return names | {"threads": torch.get_num_threads()}


def in_turns(methods: Sequence[T], prompts: Sequence[Sequence[int]], repeats: int) -> Iterator[tuple[T, Sequence[int]]]:
    """Yield every method with every prompt, prompt by prompt and so often over, the methods back and forth.

    >>> ["".join((name, *prompt)) for name, prompt in in_turns("ab", ["1", "2"], 2)]
    ['a1', 'b1', 'b2', 'a2', 'a1', 'b1', 'b2', 'a2']
    """
    for turn in range(repeats * len(prompts)):
        for method in methods if turn % 2 == 0 else reversed(methods):
            yield method, prompts[turn % len(prompts)]


def spread(ratios: Sequence[float]) -> tuple[float, list[float]]:
    """Return the median of paired ratios, and the least and the largest.

    >>> spread([1.0, 4.0, 2.0])
    (2.0, [1.0, 4.0])
    """
    return statistics.median(ratios), [min(ratios), max(ratios)]


def guarded(main: Callable[[], int]) -> Callable[[], int]:
    """Let a file's ``main`` end with one line on stderr and its exit code where the user has something to mend."""

    @functools.wraps(main)
    def run() -> int:
        try:
            return main()
        except VsdbenchError as error:
            sys.stderr.write(f"error: {error}\n")
            return error.exit_code

    return run
