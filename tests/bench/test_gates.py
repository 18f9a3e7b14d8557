"""Gates refuse what they say they refuse, and anything else than METRIC>=CHANGE% is a mistake with an example."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsdbench.bench import gates
from vsdbench.errors import ConfigError, GateError


def row(change, ci, *, metric="tau", name="kl"):
    other = "speedup" if metric == "tau" else "tau"
    return {
        "a": name, "b": name, "mode": "greedy", "temperature": 0.0,
        f"delta_{metric}_pct": change, f"delta_{metric}_ci": ci,
        f"delta_{other}_pct": 50.0, f"delta_{other}_ci": [40.0, 60.0],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "metric", "bound"),
    [("tau>=-1%", "tau", -1), ("speedup>=-3.5%", "speedup", -3.5), (" tau >= +2 % ", "tau", 2), ("tau>=0%", "tau", 0)],
)
def test_gates_are_read(text, metric, bound):
    gate = gates.parse_gate(text)
    assert (gate.metric, gate.bound_pct, gate.text) == (metric, bound, text.strip())


@pytest.mark.parametrize(
    "text", ["tau>1", "tau>=-1", "tau<=1%", "", "tau>=%", "tau>=1e3%", "tau >= -1 % or so", ">=-1%"]
)
def test_a_malformed_gate_is_named_with_an_example(text):
    with pytest.raises(ConfigError, match=r'is not of the form METRIC>=CHANGE%: write.*--gate "tau>=-1%"') as caught:
        gates.parse_gate(text)
    assert f"'{text}'" in str(caught.value)


def test_an_unknown_metric_or_basis_is_named():
    with pytest.raises(ConfigError, match=r"is on 'speed'.*Did you mean 'speedup'"):
        gates.parse_gate("speed>=-1%")
    with pytest.raises(ConfigError, match=r"cannot be 'points'.*Did you mean 'point'"):
        gates.parse_gate_on("points")
    assert [gates.parse_gate_on(known) for known in gates.GATE_ON] == ["interval", "point", "lower"]


@pytest.mark.parametrize(
    ("change", "ci", "interval", "point", "lower"),
    [
        (-5.0, [-8.0, -2.0], False, False, False),  # a significant regression beyond the bound
        (-5.0, [-12.0, 2.0], True, False, False),  # perhaps one: noise cannot be told from it
        (-0.5, [-3.0, 2.0], True, True, False),
        (-0.5, [-0.9, -0.1], True, True, True),  # a regression, but one that the bound allows
        (5.0, [2.0, 8.0], True, True, True),
        (-1.0, [-1.0, -1.0], True, True, True),  # at the bound
        (-5.0, None, False, False, False),
        (5.0, None, False, True, False),  # one prompt: only its own value can be judged
        (None, None, False, False, False),
    ],
)
def test_what_fails_depends_on_what_is_judged(change, ci, interval, point, lower):
    for on, expected in (("interval", interval), ("point", point), ("lower", lower)):
        [got] = gates.judge([row(change, ci)], [gates.parse_gate("tau>=-1%")], on)
        assert got["passed"] is expected, on
        assert got["passed"] is (got["failures"] == [])


@given(st.floats(-20, 20), st.floats(0, 10), st.floats(0, 10), st.floats(-20, 20).map(lambda x: round(x, 2)))
def test_the_strictest_is_lower_and_the_mildest_interval(change, below, above, bound):
    rows, gate = [row(change, [change - below, change + above])], [gates.parse_gate(f"tau>={bound:.2f}%")]
    interval, point, lower = (gates.judge(rows, gate, on)[0]["passed"] for on in ("interval", "point", "lower"))
    assert lower <= point <= interval


def test_failures_name_row_value_and_interval():
    rows = [row(-5.0, [-8.0, -2.0], name="kl"), row(3.0, [1.0, 5.0], name="ce"), row(-9.0, None, name="ngram")]
    judged = gates.judge(rows, [gates.parse_gate("tau>=-1%"), gates.parse_gate("speedup>=-3%")], "interval")
    assert [(entry["passed"], len(entry["failures"])) for entry in judged] == [(False, 2), (True, 0)]
    with pytest.raises(GateError) as caught:
        gates.enforce(judged)
    assert caught.value.exit_code == 1
    assert str(caught.value) == (
        "1 of 2 gates failed: tau>=-1% (on interval): kl at T = 0 changed by -5.00 % [-8.00, -2.00], "
        "ngram at T = 0 changed by -9.00 % with no interval from a single prompt."
    )
    gates.enforce(judged[1:])
    gates.enforce([])
