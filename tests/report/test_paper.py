"""The report as files: the same bytes twice, no torch, every section of a real run, and its numbers recomputed."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vsdbench.cli import app
from vsdbench.errors import ConfigError
from vsdbench.report.paper import default_name, read, write_report
from vsdbench.report.render import FORMATS
from vsdbench.report.results import main_table

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "results/reference"
QUICKSTART, HOUR = REFERENCE / "quickstart-cpu-2026-11-27", REFERENCE / "mtbench-hour-cpu-2026-11-26"


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The report of the quickstart, and all its files."""
    output = tmp_path_factory.mktemp("report") / "quickstart.pdf"
    return output, write_report([QUICKSTART], output)


@pytest.fixture(scope="module")
def hour(tmp_path_factory):
    """The report of the hour's run."""
    output = tmp_path_factory.mktemp("report") / "mtbench-hour.pdf"
    return output, write_report([HOUR], output)


def rows_of(output, name):
    text = (output.with_suffix("") / "tables" / f"{name}.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def digests(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- bytes ---------------------------------------------------------------------------------------------------------


def test_two_builds_have_the_same_bytes_wherever_they_lie(quickstart, tmp_path):
    output, written = quickstart
    other = tmp_path / "elsewhere" / "quickstart.pdf"
    write_report([shutil.copytree(QUICKSTART, tmp_path / QUICKSTART.name)], other)
    first, second = digests(output.parent), digests(other.parent)
    assert first == second
    assert len(first) == len(written) == len(set(written))
    assert output.read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("fixture", ["quickstart", "hour"])
def test_the_reference_reports_are_what_is_written_today(fixture, request):
    """Their text and tables, which other tests recompute."""
    folder = request.getfixturevalue(fixture)[0].with_suffix("")
    reference = ROOT / "reports/reference" / folder.name
    for part in (Path("report.typ"), *(path.relative_to(reference) for path in reference.glob("tables/*"))):
        assert (folder / part).read_bytes() == (reference / part).read_bytes(), part


def test_every_table_and_figure_has_its_files_and_nothing_is_large(quickstart):
    _, written = quickstart
    names = {path.name for path in written}
    for suffix in FORMATS:
        assert {f"main{suffix}", f"lossless{suffix}", f"setup{suffix}", f"tau-by-category{suffix}"} <= names
    for figure in ("acceptance", "pareto", "time", "speedup-by-category-greedy"):
        assert {f"{figure}.svg", f"{figure}.pdf"} <= names
    assert all(path.is_file() and path.stat().st_size < 1_000_000 for path in written)


def test_reading_comparing_and_reporting_import_no_torch(tmp_path, make_run, store_run):
    """One process does all of it, since it is the start of a process that takes the time."""
    folder = store_run(make_run(num_prompts=3, num_repeats=1), "small")
    modules = [
        "provenance", "models.source", "store.records", "store.files", "store.frames", "store.store", "bench.metrics",
        "bench.stats", "bench.summary", "bench.diagnostics", "bench.compare", "bench.gates", "bench.spans",
        "report.tables", "report.figures", "report.comparison", "report.paper", "report.spans",
    ]  # fmt: skip
    code = (
        f"import sys; from pathlib import Path; import vsdbench.{', vsdbench.'.join(modules)};"
        f"vsdbench.provenance.machine(); folder = Path({str(folder)!r});"
        f"vsdbench.report.paper.write_report([folder], Path({str(tmp_path / 'r.pdf')!r}));"
        "sides = [vsdbench.bench.compare.load_side(f'{folder}:{name}', folder) for name in ('ngram', 'eagle3-kl')];"
        "vsdbench.bench.compare.compare(*sides, num_resamples=99);"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_second_report_leaves_nothing_of_the_first(tmp_path, make_run, store_run):
    output = tmp_path / "r.pdf"
    write_report([store_run(make_run(num_prompts=6), "one")], output)
    assert (tmp_path / "r/tables/tau-by-category.csv").is_file()
    plain = [record.model_copy(update={"category": "chat"}) for record in make_run(num_prompts=6)]
    write_report([store_run(plain, "two")], output)
    assert not (tmp_path / "r/tables/tau-by-category.csv").exists()
    assert (tmp_path / "r/tables/main.csv").is_file()


# --- numbers -------------------------------------------------------------------------------------------------------


def recomputed(folder):
    """tau, throughput and both speedups by (drafter, T), from the lines of records.jsonl and nothing else."""
    answers = [json.loads(line) for line in (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    emitted, steps, tokens, seconds = (defaultdict(float) for _ in range(4))
    cost = defaultdict(lambda: defaultdict(list))
    for a in answers:
        key = (a["method"], a["temperature"])
        emitted[key] += sum(a["steps"]["num_emitted"])
        steps[key] += len(a["steps"]["num_emitted"])
        tokens[key] += a["num_output_tokens"] - 1
        seconds[key] += a["decode_s"]
        if a["num_output_tokens"] > 1:
            cost[key][a["prompt_id"]].append((a["decode_s"], a["num_output_tokens"] - 1))

    def per_token(key, prompt):
        pairs = cost[key][prompt]
        return sum(s for s, _ in pairs) / sum(n for _, n in pairs)

    table = {}
    for method, temperature in {(a["method"], a["temperature"]) for a in answers if a["kind"] == "drafter"}:
        key = (method, temperature)
        speedups = {}
        for baseline in ("autoregressive", "hf-generate"):
            other = (baseline, temperature)
            logs = [math.log(per_token(other, p) / per_token(key, p)) for p in cost[key] if p in cost[other]]
            speedups[baseline] = math.exp(sum(logs) / len(logs))
        table[key] = {"τ": emitted[key] / steps[key], "tokens/s": tokens[key] / seconds[key]} | {
            f"speedup vs {name}": value for name, value in speedups.items()
        }
    return table


@pytest.mark.parametrize(("fixture", "folder"), [("quickstart", QUICKSTART), ("hour", HOUR)])
def test_the_main_table_is_what_the_records_say(fixture, folder, request):
    output, _ = request.getfixturevalue(fixture)
    found = {(row["drafter"], float(row["T"])): row for row in rows_of(output, "main")}
    expected = recomputed(folder)
    assert set(found) == set(expected)
    source = (output.with_suffix("") / "report.typ").read_text(encoding="utf-8")
    main = source[source.index('key: "main"') :].split("\n)\n")[0]
    for key, values in expected.items():
        for name, value in values.items():
            assert float(found[key][name]) == pytest.approx(value, rel=1e-9), (key, name)
            if name != "tokens/s":
                assert float(found[key][f"{name} low"]) < value < float(found[key][f"{name} high"])
        printed = next(line for line in main.splitlines() if f'cell("{key[0]}"), cell("{key[1]:g}")' in line)
        assert [f"{values[name]:.2f}" for name in ("τ", "speedup vs autoregressive", "speedup vs hf-generate")] == (
            re.findall(r'cell\("(\d+\.\d\d)", ends', printed)
        )
        assert f'cell("{values["tokens/s"]:.1f}")' in printed


def test_the_headline_and_losslessness_are_what_the_records_say(quickstart):
    source = (quickstart[0].with_suffix("") / "report.typ").read_text(encoding="utf-8").replace("\u00a0", " ")
    summary = source[source.index("summary:") : source.index("size:")]
    expected = recomputed(QUICKSTART)
    for temperature in (0.0, 1.0):
        of_mode = {name: values for (name, t), values in expected.items() if t == temperature}
        best = max(of_mode, key=lambda name: of_mode[name]["speedup vs autoregressive"])
        assert f'the fastest of 5 drafters, "; name("{best}"); ", decodes ' in summary
        assert f"decodes {of_mode[best]['speedup vs autoregressive']:.2f} times as fast" in summary
        assert f"with τ = {of_mode[best]['τ']:.2f}" in summary
    answers = [json.loads(line) for line in (QUICKSTART / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    verdicts = [a["lossless"] for a in answers if a["kind"] == "drafter"]
    assert f"Of {len(verdicts)} answers that were compared, {verdicts.count('equal')} equal the baseline's" in summary
    assert f"{verdicts.count('near_tie')} part from it at a near-tie" in summary
    for row in rows_of(quickstart[0], "lossless"):
        key = (row["drafter"], float(row["T"]))
        of = [a for a in answers if (a["method"], a["temperature"]) == key and a["divergence"]]
        gaps = sorted(abs(a["divergence"]["gap"]) for a in of)
        assert int(row["near-tie"]) == len(gaps)
        assert float(row["largest gap"]) == pytest.approx(gaps[-1], rel=1e-9)


def test_acceptance_and_time_shares_are_what_the_records_say(quickstart):
    answers = [json.loads(line) for line in (QUICKSTART / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    times = {(row["drafter"], row["T"]): row for row in rows_of(quickstart[0], "time")}
    for row in rows_of(quickstart[0], "acceptance"):
        of = [a for a in answers if (a["method"], a["temperature"]) == (row["drafter"], float(row["T"]))]
        columns = ("depth", "num_accepted", "num_emitted")
        steps = [step for a in of for step in zip(*(a["steps"][column] for column in columns), strict=True)]
        for depth in (1, 2, 3):
            goes_on = [(deepest, kept) for deepest, kept, emitted in steps if kept >= depth or emitted > kept]
            reached = [kept for deepest, kept in goes_on if deepest >= depth and kept >= depth - 1]
            share = sum(kept >= depth for kept in reached) / len(reached)
            assert float(row[f"depth {depth}"]) == pytest.approx(share, rel=1e-9)
        drafting = sum(sum(a["steps"]["draft_ms"]) for a in of) / 1e3 / sum(a["decode_s"] for a in of)
        assert float(times[row["drafter"], row["T"]]["drafter's share"]) == pytest.approx(drafting, rel=1e-9)


# --- what it says --------------------------------------------------------------------------------------------------


def headings(output):
    source = (output.with_suffix("") / "report.typ").read_text(encoding="utf-8")
    return re.findall(r'#heading\(level: 1, "(.*?)"\)', source)


def test_sections_appear_where_there_is_something_to_say(quickstart, hour):
    always = [
        "Set-up", "Results", "Acceptance by depth", "Accepted length against cost", "Where the time goes",
        "Accepted spans", "Losslessness", "Misalignment of drafting and decoding", "Training cost", "Published figures",
        "Accepted length by other definitions", "Limitations", "Reproduction",
    ]  # fmt: skip
    assert [title for title in headings(quickstart[0]) if title != "Numbers of the figures"] == always
    assert set(headings(hour[0])) - {"Numbers of the figures"} == {*always, "Tree budget", "Automatic trees"}
    source = (hour[0].with_suffix("") / "report.typ").read_text(encoding="utf-8")
    assert json.loads((HOUR / "manifest.json").read_text(encoding="utf-8"))["machine"]["git"]["commit"][:12] in source
    assert "What is reconstructed" not in source
    assert "What is reconstructed" in (quickstart[0].with_suffix("") / "report.typ").read_text(encoding="utf-8")


def test_bold_is_only_where_the_second_best_is_told_apart(make_run, store_run):
    apart = store_run(make_run(num_prompts=30, drafters=("slow", "mid", "fast")), "apart")
    same = make_run(num_prompts=30, drafters=("one",))
    twin = [r.model_copy(update={"method": "two"}) for r in same if r.method == "one"]
    alike = store_run([*same, *twin], "alike")

    def bold(folder):
        return [row[0].text for row in main_table(read([folder])).rows if any(cell.strong for cell in row)]

    assert bold(apart) == ["fast"]
    assert bold(alike) == []


def test_a_noisy_clock_is_said(tmp_path, make_run, store_run):
    records = [
        r.model_copy(update={"decode_s": r.decode_s * (1.5 if r.repeat else 1.0)}) if r.kind == "baseline" else r
        for r in make_run(num_prompts=12)
    ]
    write_report([store_run(records, "noisy", command="vsdbench run tiny repeats=2")], tmp_path / "r.pdf")
    source = (tmp_path / "r/report.typ").read_text(encoding="utf-8")
    assert "too noisy for speeds to be trusted" in source
    assert '"vsdbench run tiny repeats=2"' in source
    assert {row["drafter"] for row in rows_of(tmp_path / "r.pdf", "domains")} == {"ngram", "eagle3-kl"}


def test_names_that_are_markup_elsewhere_are_only_names(tmp_path, make_run, store_run):
    names = ("a_b%#$&", "*@x[y]*", "`q` \\n", "// {z}")
    write_report([store_run(make_run(num_prompts=6, drafters=names), "nasty")], tmp_path / "r.pdf")
    found = {row["drafter"] for row in rows_of(tmp_path / "r.pdf", "main")}
    assert found == set(names)


def test_a_run_without_baselines_or_drafters_is_reported_too(tmp_path, make_run, store_run):
    run = make_run(num_prompts=6, num_repeats=1)
    for kind in ("drafter", "baseline"):
        folder = store_run([record for record in run if record.kind == kind], f"only-{kind}")
        write_report([folder], tmp_path / f"{kind}.pdf")
    assert "no baseline was measured beside it" in (tmp_path / "drafter/report.typ").read_text().replace("\u00a0", " ")


# --- several runs --------------------------------------------------------------------------------------------------


def test_runs_on_the_same_prompts_are_paired(tmp_path, make_run, store_run):
    first = make_run(num_prompts=20, drafters=("ngram", "eagle3"), seed=1)
    second = [
        r.model_copy(update={"run_id": "run-2"}) for r in make_run(num_prompts=20, drafters=("eagle3", "new"), seed=2)
    ]
    output = tmp_path / "r.pdf"
    write_report([store_run(first, "run-1"), store_run(second, "run-2")], output)
    assert "Comparison of the runs" in headings(output)
    [row] = rows_of(output, "comparison")
    assert (row["drafter"], row["run"]) == ("eagle3", "B")

    def tau(records):
        chosen = [r for r in records if r.method == "eagle3"]
        return sum(sum(r.steps.num_emitted) for r in chosen) / sum(len(r.steps.num_emitted) for r in chosen)

    assert float(row["change of τ, %"]) == pytest.approx(100 * (tau(second) / tau(first) - 1), rel=1e-9)
    assert (output.with_suffix("") / "figures/comparison.svg").is_file()


def test_runs_on_other_prompts_stand_side_by_side(tmp_path, make_run, store_run):
    output = tmp_path / "r.pdf"
    first = make_run(num_prompts=6)
    second = [r.model_copy(update={"prompt_id": f"q{r.prompt_id}"}) for r in first]
    write_report([store_run(first, "run-1"), store_run(second, "run-2")], output)
    source = (tmp_path / "r/report.typ").read_text(encoding="utf-8")
    assert "nothing is paired" in source
    assert not (tmp_path / "r/tables/comparison.csv").exists()
    assert {row["run"] for row in rows_of(output, "main")} == {"A", "B"}


# --- use -----------------------------------------------------------------------------------------------------------


def test_mistakes_are_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match=r"ends in \.pdf"):
        write_report([QUICKSTART], tmp_path / "report.html")
    with pytest.raises(ConfigError, match="named twice"):
        read([QUICKSTART, QUICKSTART])
    with pytest.raises(ConfigError, match="No run was named"):
        read([])


def test_the_verb_writes_where_it_says(tmp_path, monkeypatch, make_run, store_run):
    monkeypatch.setenv("VSDBENCH_REPORTS", str(tmp_path))
    small = store_run(make_run(num_prompts=3, num_repeats=1), "small")
    done = CliRunner().invoke(app, ["report", "sma", "--results", str(small.parent), "--json", "--quiet"])
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert data["report"] == str(tmp_path / f"{default_name([small])}.pdf") == str(tmp_path / "small.pdf")
    assert all(Path(path).is_file() for path in data["files"])
    titled = CliRunner().invoke(
        app, ["report", str(small), "--title", "Mine & #yours", "--output", str(tmp_path / "t.pdf"), "--quiet"]
    )
    assert titled.exit_code == 0, titled.output
    assert 'title: "Mine & #yours"' in (tmp_path / "t/report.typ").read_text(encoding="utf-8")


def test_an_unknown_run_is_refused(tmp_path):
    done = CliRunner().invoke(app, ["report", "nothing", "--results", str(tmp_path)])
    assert done.exit_code == 2
    assert "No run 'nothing'" in done.stderr
