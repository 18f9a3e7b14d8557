"""Exit codes are a contract with scripts, and a suggestion is made only where it is close."""

import pytest

from vsdbench.bench.run import InterruptedRunError
from vsdbench.errors import ConfigError, EnvironmentProblemError, GateError, VsdbenchError, did_you_mean


@pytest.mark.parametrize(
    ("error", "code"),
    [(GateError, 1), (ConfigError, 2), (EnvironmentProblemError, 3), (InterruptedRunError, 130)],
)
def test_exit_codes(error, code):
    assert issubclass(error, VsdbenchError)
    assert error("x").exit_code == code


def test_suggestion_is_the_closest_or_the_whole_list():
    assert did_you_mean("gsm8", ["mtbench", "gsm8k"]) == " Did you mean 'gsm8k'?"
    assert did_you_mean("q", ["b", "a", "b"]) == " Known: a, b."
    assert did_you_mean("q", []) == ""
