"""Gates: a regression that ends a comparison with exit code 1, so that a lab's CI can refuse a worse drafter."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from vsdbench.errors import ConfigError, GateError, did_you_mean

GateOn: TypeAlias = Literal["interval", "point", "lower"]
GATE_ON: dict[str, str] = {
    "interval": "fails if the whole 95 % interval is below the bound: a significant regression",
    "point": "fails if the estimate is below the bound",
    "lower": "fails unless the whole 95 % interval is above the bound: no worse, shown",
}
METRICS = ("tau", "speedup")
_FORM = re.compile(r"\s*(?P<metric>[a-z]+)\s*>=\s*(?P<bound>[+-]?\d+(?:\.\d+)?)\s*%\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """A lower bound of a change.

    Attributes:
        text: As it was given.
        metric: ``tau`` or ``speedup``.
        bound_pct: Least change from A to B that passes, per cent.
    """

    text: str
    metric: str
    bound_pct: float


def parse_gate(text: str) -> Gate:
    """Return the gate of e.g. ``tau>=-1%``.

    >>> parse_gate("speedup >= -3%").bound_pct
    -3.0

    Raises:
        ConfigError: It has another form, or another metric.
    """
    match = _FORM.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"The gate '{text}' is not of the form METRIC>=CHANGE%: write, for example, --gate \"tau>=-1%\" or "
            '--gate "speedup>=-3%".'
        )
    metric = match["metric"]
    if metric not in METRICS:
        raise ConfigError(
            f"The gate '{text}' is on '{metric}': write, for example, --gate \"tau>=-1%\"."
            f"{did_you_mean(metric, METRICS)}"
        )
    return Gate(text=text.strip(), metric=metric, bound_pct=float(match["bound"]))


def parse_gate_on(text: str) -> GateOn:
    """Return ``text`` if it is one of ``GATE_ON``.

    Raises:
        ConfigError: It is not.
    """
    for known in ("interval", "point", "lower"):
        if text == known:
            return known
    raise ConfigError(f"--gate-on cannot be '{text}'.{did_you_mean(text, GATE_ON)}")


def judge(rows: Sequence[Mapping[str, Any]], gates: Sequence[Gate], on: GateOn) -> list[dict[str, Any]]:
    """Return one entry a gate, with the rows that fail it; a row that cannot be judged fails.

    Args:
        rows: Of a comparison.
        gates: To be passed by every row.
        on: What must not be below the bound, see ``GATE_ON``.
    """
    judged = []
    for gate in gates:
        failures = [
            {name: row[name] for name in ("a", "b", "mode", "temperature")}
            | {"change_pct": row[f"delta_{gate.metric}_pct"], "ci_pct": row[f"delta_{gate.metric}_ci"]}
            for row in rows
            if not _passes(row[f"delta_{gate.metric}_pct"], row[f"delta_{gate.metric}_ci"], gate.bound_pct, on)
        ]
        judged.append(
            {
                "gate": gate.text,
                "metric": gate.metric,
                "bound_pct": gate.bound_pct,
                "on": on,
                "passed": not failures,
                "failures": failures,
            }
        )
    return judged


def enforce(judged: Sequence[Mapping[str, Any]]) -> None:
    """Raise for the gates that failed.

    Raises:
        GateError: Names every gate that failed with its rows, their changes and intervals.
    """
    failed = [entry for entry in judged if not entry["passed"]]
    if failed:
        told = "; ".join(
            f"{entry['gate']} (on {entry['on']}): {', '.join(_told(failure) for failure in entry['failures'])}"
            for entry in failed
        )
        raise GateError(f"{len(failed)} of {len(judged)} gates failed: {told}.")


def _passes(change: float | None, ci: Sequence[float] | None, bound: float, on: GateOn) -> bool:
    if on == "point":
        return change is not None and change >= bound
    return ci is not None and ci[0 if on == "lower" else 1] >= bound


def _told(failure: Mapping[str, Any]) -> str:
    """Return the row, its value and its interval in words."""
    name = failure["a"] if failure["a"] == failure["b"] else f"{failure['b']} against {failure['a']}"
    where = f"{name} at T = {failure['temperature']:g}"
    if failure["change_pct"] is None:
        return f"{where} cannot be judged, since nothing can be compared"
    if failure["ci_pct"] is None:
        return f"{where} changed by {failure['change_pct']:+.2f} % with no interval from a single prompt"
    low, high = failure["ci_pct"]
    return f"{where} changed by {failure['change_pct']:+.2f} % [{low:+.2f}, {high:+.2f}]"
