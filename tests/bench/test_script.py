"""What files of ``benchmarks/`` share: options become a run's, methods go back and forth, errors are one line."""

from __future__ import annotations

import pytest

from vsdbench.bench import script
from vsdbench.bench.run import RunOptions
from vsdbench.errors import ConfigError, EnvironmentProblemError


def test_options_of_a_suite_become_those_of_a_run():
    parser = script.make_parser("What it is.")
    script.add_suite(parser, "quickstart", prompts=4, overrides=True)
    options = parser.parse_intermixed_args(["--json", "repeats=2", "--target", "other", "--dtype", "fp32"])
    assert (options.suite, options.json) == ("quickstart", True)
    assert script.run_options(options) == RunOptions(overrides=["repeats=2"], target="other", dtype="fp32", limit=4)
    assert parser.description == "What it is."


def test_how_many_prompts_may_be_called_otherwise_and_all_are_the_default():
    parser = script.make_parser(None, has_json=False)
    script.add_suite(parser, "smoke", limit="--limit", dtype="bf16")
    assert script.run_options(parser.parse_args([])) == RunOptions(dtype="bf16")
    assert script.run_options(parser.parse_args(["--limit", "2"])).limit == 2


def test_methods_go_back_and_forth_over_the_prompts():
    found = list(script.in_turns(["a", "b", "c"], [[1], [2]], repeats=2))
    assert [name for name, _ in found] == [*"abc", *"cba", *"abc", *"cba"]
    assert [prompt for _, prompt in found] == [[1]] * 3 + [[2]] * 3 + [[1]] * 3 + [[2]] * 3


@pytest.mark.parametrize(("error", "code"), [(ConfigError("wrong"), 2), (EnvironmentProblemError("gone"), 3)])
def test_an_error_is_one_line_and_an_exit_code(error, code, capsys):
    @script.guarded
    def main():
        raise error

    assert main() == code
    assert capsys.readouterr().err == f"error: {error}\n"
    assert script.guarded(lambda: 0)() == 0
