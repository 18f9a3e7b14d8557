"""The A/A control raises as many false alarms as it says, and the smallest detectable difference is really found."""

import itertools
import math

import numpy as np
import pytest

from vsdbench.bench import checks, paired
from vsdbench.bench.summary import summarise
from vsdbench.errors import GateError
from vsdbench.store.frames import to_frames


def repeated(make_record, first, second, *, names=("ar",), modes=("greedy",)):
    """Baselines with ten decoded tokens a prompt and the given seconds in their two repeats."""
    rows = []
    for mode in modes:
        for name in names:
            for repeat, seconds in enumerate((first, second)):
                rows += [
                    make_record(
                        num_output_tokens=11, decode_s=s, prompt_id=f"p{i}", repeat=repeat, method=name, mode=mode,
                        kind="baseline", lossless="reference", temperature=float(mode != "greedy"),
                    )
                    for i, s in enumerate(seconds)
                ]  # fmt: skip
    return rows


def holds(make_record, first, second, **fields):
    return [
        control["holds"] for control in checks.controls(to_frames(repeated(make_record, first, second, **fields))[0])
    ]


def test_all_controls_of_a_quiet_run_hold_in_99_of_100(make_record):
    """Four controls of three prompts each, the hardest case: percentiles of three would fail one run in two."""
    ones = np.ones(3)
    frame, _ = to_frames(repeated(make_record, ones, ones, names=("a", "b"), modes=("greedy", "stochastic")))
    quiet = 0
    for number in range(100):
        seconds = np.random.default_rng(number).lognormal(0, 0.05, size=len(frame))
        controls = checks.controls(frame.assign(decode_s=seconds))
        assert len(controls) == 4
        quiet += all(control["holds"] for control in controls)
    assert quiet >= 96  # 99 expected, with a deviation of 1


def test_a_machine_that_slowed_down_is_noticed(make_record):
    rng = np.random.default_rng(0)
    first = rng.lognormal(0, 0.02, size=20)
    rows = repeated(make_record, first, first * 1.1 * rng.lognormal(0, 0.02, size=20), names=("ar", "hf"))
    summary = summarise(rows, num_resamples=50)
    assert [control["holds"] for control in summary["controls"]] == [False, False]
    told = checks.noise(summary)
    assert len(told) == 2
    assert told[0].startswith("A/A control: ar at T = 0 was 1.")
    assert "too noisy" in told[0]


def test_intervals_are_simultaneous(make_record):
    """Two controls: Student's t at 99.5 %, by hand."""
    ratios = np.array([0.05, -0.02, 0.06, 0.01])
    rows = repeated(make_record, [1.0] * 4, np.exp(ratios), names=("ar", "hf"))
    controls = checks.controls(to_frames(rows)[0])
    half = 7.453318505 * ratios.std(ddof=1) / 2  # t quantile 0.9975, 3 degrees of freedom
    for control in controls:
        assert control["confidence"] == pytest.approx(0.995)
        assert np.log(control["ci"]) == pytest.approx([ratios.mean() - half, ratios.mean() + half])
        assert (control["num_prompts"], control["mode"], control["temperature"]) == (4, "greedy", 0.0)


def test_degenerate_controls_claim_nothing_false(make_record):
    """Times equal to the last bit hold 1 (a clock too coarse to tell), one prompt cannot tell, one repeat is none."""
    seconds = [0.1, 0.3, 0.7]
    assert holds(make_record, seconds, seconds) == [True]
    assert holds(make_record, seconds, [1.1 * s for s in seconds]) == [False]
    assert holds(make_record, [1.0], [2.0]) == [None]
    assert holds(make_record, [0.0, 0.0], [0.0, 0.0]) == [None]  # every answer ended with its first token
    rows = repeated(make_record, seconds, seconds)
    assert checks.controls(to_frames(rows[:3])[0]) == []
    one = summarise(repeated(make_record, [1.0], [2.0]), num_resamples=50)
    assert one["controls"][0]["holds"] is None
    assert checks.noise(one) == []


def test_detectable_effect_is_found_with_that_power(make_record):
    """Two drafters that differ by just that much, drawn anew: the paired test finds it in four of five experiments."""
    spread, num_prompts = 0.2, 30

    def frames(rng, change):
        base = rng.lognormal(0, 0.5, size=num_prompts)
        both = {"a": base * np.exp(spread * rng.normal(size=num_prompts) - math.log1p(change)), "b": base}
        return {
            name: [
                make_record(num_output_tokens=11, decode_s=s, prompt_id=f"p{i:02}", method=name, objective=name)
                for i, s in enumerate(seconds)
            ]
            for name, seconds in both.items()
        }

    pilots = [
        checks.detectable(*to_frames([*itertools.chain(*frames(np.random.default_rng(n), 0).values())]))
        for n in range(20)
    ]
    effect = np.mean([pilot["speedup_pct"] for pilot in pilots]) / 100
    found = 0
    for number in range(100, 220):
        arms = {name: to_frames(rows) for name, rows in frames(np.random.default_rng(number), effect).items()}
        found += paired.speedup_difference([arms["a"]], [arms["b"]], num_resamples=300).p_value < 0.05
    assert found / 120 == pytest.approx(0.8, abs=0.1)


def test_tau_effect_by_hand(make_record):
    """Two drafters with 4 steps a prompt: the parts of log tau are emitted / mean emitted - 1."""

    def rows(name, totals):
        return [
            make_record(
                steps=[(7, 4, 4, 5, 1, 1, 0)] * (total // 5) + [(7, 4, 0, 1, 1, 1, 0)] * (total % 5),
                prompt_id=f"p{i}", method=name, objective="ce",
            )
            for i, total in enumerate(totals)
        ]  # fmt: skip

    ours, theirs = [5, 10, 15], [10, 15, 5]
    frame, steps = to_frames(rows("a", ours) + rows("b", theirs))
    got = checks.detectable(frame, steps)

    def parts(totals):
        emitted, counts = np.array(totals, float), np.array([t // 5 for t in totals], float)
        return emitted / emitted.mean() - counts / counts.mean()

    assert parts(ours) == pytest.approx([0, 0, 0])  # five tokens in every step: tau does not vary
    assert got["tau_pct"] == pytest.approx(0)
    frame, steps = to_frames(rows("a", [6, 9, 13]) + rows("b", [9, 13, 6]))
    a, b = (np.array([6, 9, 13]), np.array([2, 5, 5])), (np.array([9, 13, 6]), np.array([5, 5, 2]))
    z = [e / e.mean() - n / n.mean() for e, n in (a, b)]
    t = 4.302652729911275 + 1.0606601717798212  # t quantiles 0.975 and 0.8, 2 degrees of freedom
    effect = t * np.std(z[0] - z[1], ddof=1) / math.sqrt(3)
    assert checks.detectable(frame, steps)["tau_pct"] == pytest.approx(100 * math.expm1(effect))


def test_what_is_compared_depends_on_what_was_trained(make_run):
    def between(*drafters, keep=lambda record: True):
        rows = [record for record in make_run(drafters=drafters) if keep(record)]
        [entry] = summarise(rows, num_resamples=50)["minimum_detectable_effect"]
        return entry

    assert between("ngram", "eagle3-kl", "eagle3-ce")["between"] == "trained drafters"
    assert between("ngram", "eagle3-kl")["between"] == "drafters"
    lone = between("ngram")
    assert lone["between"] == "the drafter and the baseline"
    assert lone["speedup_pct"] > 0
    assert lone["tau_pct"] > 0
    assert (lone["mode"], lone["temperature"], lone["power"], lone["num_prompts"]) == ("greedy", 0.0, 0.8, 12)
    nothing = between("ngram", keep=lambda record: record.kind == "baseline")
    assert (nothing["speedup_pct"], nothing["tau_pct"]) == (None, None)
    assert between("ngram", keep=lambda record: record.kind == "drafter")["speedup_pct"] is None


def test_the_line_under_the_table(make_run):
    summary = summarise(make_run(modes=("greedy", "stochastic")), num_resamples=50)
    line = checks.detectable_line(summary)
    assert line.startswith("Smallest difference between drafters that these 12 prompts show with 80 % power: ")
    assert line.count("% in speed") == line.count("% in τ") == 2
    assert "at T = 0; " in line
    assert line.endswith("at T = 1.")
    assert checks.detectable_line(summarise(make_run(num_prompts=1), num_resamples=50)) is None


@pytest.mark.parametrize("verdict", ["equal", "near_tie", "violation"])
def test_a_baseline_that_answers_something_else_fails_the_run(make_record, verdict):
    records = repeated(make_record, np.ones(3), np.ones(3), names=("autoregressive",))
    gap = {"index": 2, "gap": 1.0, "kind": verdict, "reference_token": 1, "token": 2} if verdict != "equal" else None
    fields = {"method": "hf-generate", "kind": "baseline", "lossless": verdict, "divergence": gap}
    records += [make_record(prompt_id=f"p{i}", repeat=repeat, **fields) for i in range(3) for repeat in range(2)]
    summary = summarise(records)
    if verdict != "violation":
        checks.enforce([summary], strict=True)
        return
    with pytest.raises(GateError, match="6 answers of 'hf-generate' differ from plain decoding's"):
        checks.enforce([summary], strict=False)
