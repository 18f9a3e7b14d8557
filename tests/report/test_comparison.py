"""The table of a comparison: every number as rounded, significance in bold, and what speed was compared with."""

import io

import pytest
from rich.console import Console

from vsdbench.report.comparison import definitions, print_comparison


def row(**changes):
    return {
        "a": "eagle3-kl", "b": "eagle3-kl", "mode": "greedy", "temperature": 0.0, "num_prompts": 80, "num_seeds": 1,
        "tau_a": 1.651, "tau_b": 1.872, "delta_tau_pct": 13.27, "delta_tau_ci": [10.21, 15.88], "p_tau_holm": 0.0002,
        "delta_speedup_pct": -2.04, "delta_speedup_ci": [-4.96, 1.02], "p_speedup_holm": 0.1234,
    } | changes  # fmt: skip


def comparison(*rows, **changes):
    side = {"run_id": "run-a", "method": None, "suite": "mtbench", "suite_version": "1", "target": "toy"}
    side |= {"device": "cpu", "dtype": "float32"}
    fields = {"a": side, "b": side | {"run_id": "run-b", "method": "eagle3-kl"}, "same_run": False, "confidence": 0.95}
    return fields | {"rows": list(rows), "warnings": [], "gates": []} | changes


def printed(data, *, width=80, terminal=False):
    console = Console(
        file=io.StringIO(), width=width, force_terminal=terminal, color_system="standard" if terminal else None
    )
    print_comparison(data, console)
    return console.file.getvalue()


def test_numbers_stand_in_the_table():
    text = printed(comparison(row()))
    for part in ("1.65", "1.87", "+13.3 %", "+10.2 to +15.9", "<0.001", "-2.0 %", "-5.0 to +1.0", "0.123", "80"):
        assert part in text
    assert text.splitlines()[:2] == [
        "A: run-a · mtbench 1 · toy · cpu float32",
        "B: run-b:eagle3-kl · mtbench 1 · toy · cpu float32",
    ]


def test_what_is_significant_is_bold():
    text = printed(comparison(row()), terminal=True)
    bold = "".join(part.split("\x1b[0m")[0] for part in text.split("\x1b[1m")[1:])
    assert "+13.3 %" in bold
    assert "<0.001" in bold
    assert "-2.0 %" not in bold


def test_what_is_missing_is_a_dash():
    nothing = {"tau_a": None, "tau_b": None, "delta_tau_pct": None, "delta_tau_ci": None, "p_tau_holm": None}
    [line] = [
        line for line in printed(comparison(row(**nothing, delta_speedup_ci=None))).splitlines() if " 80 " in line
    ]
    assert line.split() == ["eagle3-kl", "0", "80", *["\N{EN DASH}"] * 4, "-2.0", "%", "0.123"]


def test_pairs_and_seeds_are_named():
    text = printed(comparison(row(a="kl", b="vsd", num_seeds=3)), width=100)
    assert "against kl" in text
    assert "seeds" in text
    assert "prompts and training seeds" in " ".join(text.split())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"same_run": True}, "both methods of one run"),
        ({"same_run": False}, "over its own autoregressive baseline"),
    ],
)
def test_definitions_say_what_speed_is_compared_with(changes, words):
    text = definitions(comparison(row(), **changes))
    assert words in text
    assert "Holm-adjusted over the 1 row;" in text
    assert "one training seed each" in text


def test_gates_are_told_below():
    gate = {"gate": "tau>=-1%", "on": "interval", "passed": True, "failures": []}
    failed = {"gate": "speedup>=0%", "on": "point", "passed": False, "failures": [{}]}
    lines = printed(comparison(row(), row(temperature=1.0), gates=[gate, failed])).splitlines()
    assert lines[-2:] == ["gate tau>=-1% (on interval): passed", "gate speedup>=0% (on point): failed in 1 of 2 rows"]


def test_it_fits_80_columns():
    wide = row(a="eagle3-kl-hour-wide", b="eagle3-vsd-hour-wide", delta_tau_ci=[-110.2, 115.9], num_prompts=480)
    text = printed(comparison(wide, wide))
    assert all(len(line) <= 80 for line in text.splitlines()[2:])
    assert "-110.2 to +115.9" in text
