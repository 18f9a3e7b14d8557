"""The result of an ablation on synthetic records of known truth, and what is printed and drawn of it."""

from __future__ import annotations

import io
import json
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from rich.console import Console
from tests.conftest import make_record

from vsdbench.ablation.analysis import analyse
from vsdbench.ablation.show import print_result, write_forest
from vsdbench.bench.paired import holm
from vsdbench.errors import ConfigError
from vsdbench.report.plots import arm_panels, forest_figure

TRUTH = {"vsd": 2.4, "no-car": 1.8, "no-arw": 2.4, "continual-kl": 2.1}
BUDGET = {"tokens": 24_000, "target_forwards": 310, "wall_s": 31.5}


def manifest(seeds=(0, 1, 2), **changes):
    arms = [
        {
            "name": name,
            "disabled": [name.removeprefix("no-")] if name.startswith("no-") else [],
            "change": {"objective.options.car": 0} if name == "no-car" else {},
            "control": name in {"continual-kl", "warm-start"},
            "seeds": [] if name == "warm-start" else list(seeds),
            "methods": ["warm-start"] if name == "warm-start" else [f"{name}@{seed}" for seed in seeds],
            "budget": {"tokens": 0, "target_forwards": 0, "wall_s": 0.0} if name == "warm-start" else dict(BUDGET),
        }
        for name in (*TRUTH, "warm-start")
    ]
    return {"run_id": "run-1", "ablation": {"reference": "vsd", "recipe": "toy", "arms": arms}} | changes


def run(seeds=(0, 1, 2), *, num_prompts=16, modes=("greedy",), skip=()):
    """Records whose tau and time a token are the truth's, but for what prompts, seeds and the clock add."""
    rng = np.random.default_rng(0)
    records = []
    for mode in modes:
        for prompt in range(num_prompts):
            hard = rng.normal(0, 0.1)
            where = {"mode": mode, "temperature": float(mode != "greedy"), "prompt_id": f"p{prompt}"}
            plain = [(0, 0, 0, 1, 0.0, 10.0, 0.1)] * 40
            records.append(
                make_record(steps=plain, method="autoregressive", kind="baseline", lossless="reference", **where)
            )
            members = [("warm-start", 2.0)]
            members += [(f"{name}@{seed}", tau + 0.01 * seed) for name, tau in TRUTH.items() for seed in seeds]
            for method, tau in members:
                if method in skip:
                    continue
                mean = max(1.05, tau + hard + rng.normal(0, 0.05))
                steps = [(7, 3, int(n) - 1, int(n), 1.0, 10.0, 0.1) for n in 1 + rng.binomial(3, (mean - 1) / 3, 120)]
                emitted = sum(step[3] for step in steps)
                seconds = emitted / mean * 0.011 * rng.lognormal(0, 0.01)
                records.append(make_record(steps=steps, method=method, decode_s=seconds, **where))
    return records


@pytest.fixture(scope="module")
def result():
    return analyse(run(), manifest(), num_resamples=999)


def test_the_object_is_what_was_promised(result):
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert (result["schema"], result["run_id"], result["reference"]) == (1, "run-1", "vsd")
    (mode,) = result["modes"]
    assert (mode["mode"], mode["temperature"]) == ("greedy", 0.0)
    assert result["arms"] == mode["arms"]
    promised = {
        "name", "disabled", "control", "seeds", "tau", "tau_ci", "delta_tau_pct", "delta_tau_ci", "p_tau_holm",
        "delta_speedup_pct", "delta_speedup_ci", "p_speedup_holm", "budget",
    }  # fmt: skip
    assert all(promised <= set(arm) for arm in mode["arms"])
    assert [arm["name"] for arm in mode["arms"]] == [*TRUTH, "warm-start"]


def test_differences_are_the_arms_from_the_reference(result):
    arms = {arm["name"]: arm for arm in result["arms"]}
    reference = arms["vsd"]
    for name in ("no-car", "no-arw", "continual-kl"):
        arm, truth = arms[name], 100 * (TRUTH[name] / TRUTH["vsd"] - 1)
        for measure in ("tau", "speedup"):
            low, high = arm[f"delta_{measure}_ci"]
            assert low <= arm[f"delta_{measure}_pct"] <= high
            assert arm[f"delta_{measure}_pct"] == pytest.approx(truth, abs=2.5), (name, measure)
        assert arm["delta_tau_pct"] == pytest.approx(100 * (arm["tau"] / reference["tau"] - 1), abs=0.01)
    assert arms["no-car"]["p_tau_holm"] < 0.05
    assert arms["no-arw"]["p_tau_holm"] > 0.05
    assert arms["warm-start"]["delta_tau_pct"] < -10  # one member against the three of the reference
    assert all(reference[f"{key}"] is None for key in ("delta_tau_pct", "delta_tau_ci", "p_tau_holm"))


def test_tau_is_pooled_over_seeds_and_prompts(result):
    records = [record for record in run() if record.method.startswith("no-car@")]
    emitted = sum(sum(record.steps.num_emitted) for record in records)
    steps = sum(len(record.steps) for record in records)
    arm = next(arm for arm in result["arms"] if arm["name"] == "no-car")
    assert arm["tau"] == pytest.approx(emitted / steps)
    assert arm["tau_ci"][0] < arm["tau"] < arm["tau_ci"][1]


def test_holm_is_over_arms_and_over_controls(result):
    for control, names in ((False, ["no-car", "no-arw"]), (True, ["continual-kl", "warm-start"])):
        arms = [arm for arm in result["arms"] if arm["control"] is control and arm["name"] != "vsd"]
        assert [arm["name"] for arm in arms] == names
        for measure in ("tau", "speedup"):
            assert [arm[f"p_{measure}_holm"] for arm in arms] == holm([arm[f"p_{measure}"] for arm in arms])


def test_every_mode_has_its_arms_and_greedy_is_the_headline():
    result = analyse(run((0,), modes=("stochastic", "greedy")), manifest((0,)), num_resamples=99)
    assert [mode["mode"] for mode in result["modes"]] == ["greedy", "stochastic"]
    assert result["arms"] == result["modes"][0]["arms"]
    only = analyse(run((0,), modes=("stochastic",)), manifest((0,)), num_resamples=99)
    assert only["arms"] == only["modes"][0]["arms"]


def test_an_unfinished_run_says_what_it_can():
    result = analyse(run(skip=("no-arw@2", "warm-start")), manifest(), num_resamples=99)
    arms = {arm["name"]: arm for arm in result["arms"]}
    assert arms["no-arw"]["tau"] is not None  # of the seeds that were decoded
    assert arms["no-arw"]["delta_tau_pct"] is None
    assert (arms["warm-start"]["tau"], arms["warm-start"]["delta_speedup_pct"]) == (None, None)
    assert arms["no-car"]["delta_tau_pct"] is not None
    assert arms["no-car"]["p_tau_holm"] == arms["no-car"]["p_tau"]  # the one comparison that is left


def test_budgets_are_compared():
    unequal = manifest()
    unequal["ablation"]["arms"][1]["budget"]["tokens"] = 25_000
    assert analyse(run((0,)), manifest((0,)), num_resamples=99)["equal_tokens"]
    result = analyse(run(), unequal, num_resamples=99)
    assert not result["equal_tokens"]
    assert "NOT trained on as many tokens" in printed(result)


def test_what_cannot_be_analysed():
    with pytest.raises(ConfigError, match="'run-1' is no ablation"):
        analyse(run((0,)), {"run_id": "run-1"})
    with pytest.raises(ConfigError, match="no records yet"):
        analyse([], manifest())


def printed(result, width=120):
    console = Console(file=io.StringIO(), width=width)
    print_result(result, console)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_and_has_every_number(result, width):
    text = printed(result, width)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    car = next(arm for arm in result["arms"] if arm["name"] == "no-car")
    low, high = car["delta_tau_ci"]
    for words in (f"{car['delta_tau_pct']:+.1f}", f"({low:+.1f} to {high:+.1f})", f"{car['tau']:.2f}", "car 0",
                  "24,000", "31.5", "untouched", "reference", "as many tokens"):  # fmt: skip
        assert words in text, words


def test_the_table_says_that_one_seed_is_one():
    assert "over prompts (one training seed)" in printed(analyse(run((0,)), manifest((0,)), num_resamples=99))


def test_the_forest_plot(result, tmp_path):
    paths = write_forest(result, tmp_path)
    assert [path.name for path in paths] == ["forest_greedy.svg", "forest_greedy.png"]
    assert ET.parse(paths[0]).getroot().tag.endswith("svg")
    again = write_forest(result, tmp_path / "again")
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in again]
    tau, speed = forest_figure(arm_panels(result["modes"][0], "vsd")).axes
    labels = [label.get_text() for label in tau.get_yticklabels()]
    assert labels == ["no-car", "no-arw", "continual-kl", "warm-start"]
    assert len(tau.containers) == len(speed.containers) == len(labels)
    fills = [container.lines[0].get_markerfacecolor() for container in tau.containers]
    sure = [arm["p_tau_holm"] < 0.05 for arm in result["arms"] if arm["name"] != "vsd"]
    assert [fill != "white" for fill in fills] == sure
    gaps = np.diff(tau.get_yticks())
    assert gaps[1] > gaps[0] == gaps[2]  # controls stand apart
