"""``vsdbench ablate`` from flags to files, with a tiny random target: cells, budgets, resuming, and what ends it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from tests.e2e.workspace import Result, Workspace, save_model, slow_second_repeats
from typer.testing import CliRunner

from vsdbench.ablation.analysis import analyse
from vsdbench.ablation.grid import Arm, family, load_base
from vsdbench.ablation.run import _write
from vsdbench.bench.run import RunStore
from vsdbench.cli import app
from vsdbench.paths import cache_dir, list_data, reports_dir
from vsdbench.store.store import load_manifest, load_records
from vsdbench_drafters.training import train as train_module
from vsdbench_drafters.training.loop import TrainingLoop
from vsdbench_drafters.training.recipe import load_recipe

WARM = {
    "name": "warm",
    "architecture": {"draft_vocab_size": 64},
    "objective": {"type": "kl", "ttt_steps": 2},
    "data": {"num_tokens": 100},
    "training": {"batch_tokens": 32, "autocast": False},
}
RECIPE = {
    "name": "whole",
    "objective": {"type": "vsd", "ttt_steps": 2, "options": {"anchors": 2, "paths": 2, "depth": 2}},
    "data": {"num_tokens": 100, "start_index": 100, "num_heldout": 2},
    "training": {"batch_tokens": 32, "lr": 0.001, "autocast": False},
}
TREE = {"kind": "dynamic", "budget": 4, "depth": 2, "top_k": 2}
CELLS = ("vsd@0", "no-car@0", "continual-kl@0", "onpolicy-rkl@0", "warm-start")


class Sequences(list):
    """Answers as ``TrainingData`` has them."""

    @property
    def lengths(self):
        return torch.tensor([len(sequence.ids) for sequence in self])


@pytest.fixture(scope="module", autouse=True)
def _surroundings(tmp_path_factory):
    """A cache of its own, answers that nobody generated, wide output and one thread."""
    generator = torch.Generator().manual_seed(5)
    answers = Sequences(
        SimpleNamespace(ids=torch.randint(4, 200, (length,), generator=generator).tolist(), prompt_len=4)
        for length in (12, 30, 15, 18, 20, 11, 25, 14)
    )

    def data(config, *_args, **_kwargs):
        name = f"toy{config.start_index}"
        return SimpleNamespace(sequences=answers, heldout=answers[:3], fingerprint=name, num_response_tokens=113)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VSDBENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("COLUMNS", "200")
        patch.setenv("VSDBENCH_REPORTS", str(tmp_path_factory.mktemp("reports")))
        patch.setattr(train_module, "ensure_data", data)
        patch.setattr(train_module, "data_key", lambda config, _target: f"key{config.start_index}")
        yield
    torch.set_num_threads(threads)


class Bench(Workspace):
    """A workspace that has a recipe to take apart, too."""

    def __init__(self, folder: Path, model: Path) -> None:
        super().__init__(folder, model)
        greedy = [{"name": "greedy", "temperature": 0, "rule": "greedy"}]
        drafters = [{"name": "any", "type": "eagle3", "recipe": "ablation-quickstart", "tree": TREE}]
        self.suite = self.write_suite("few", modes=greedy, drafters=drafters, baselines=["autoregressive"])
        warm = folder / "warm.yaml"
        self.recipe = folder / "whole.yaml"
        warm.write_text(yaml.safe_dump(WARM | {"target": str(model)}), encoding="utf-8")
        raw = RECIPE | {"target": str(model), "warm_start": str(warm)}
        self.recipe.write_text(yaml.safe_dump(raw), encoding="utf-8")

    def ablate(self, *words: str, recipe: str | None = None) -> Result:
        fixed = ["--device", "cpu", "--dtype", "fp32", "--results", str(self.results), "--suite", str(self.suite)]
        fixed += [] if "--report" in words else ["--no-report"]
        words = ("ablate", recipe or str(self.recipe), *fixed, *words)
        result = CliRunner().invoke(app, words, catch_exceptions=False)
        return Result(result.exit_code, result.stdout, result.stderr)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    return Bench(folder, save_model(folder / "model"))


@pytest.fixture
def trained(monkeypatch):
    """Recipes in the order in which they are trained."""
    names: list[str] = []
    run = train_module._run

    def watch(recipe, *args, **kwargs):
        names.append(recipe.name)
        return run(recipe, *args, **kwargs)

    monkeypatch.setattr(train_module, "_run", watch)
    return names


@pytest.fixture(scope="module")
def finished(bench):
    """One ablation that nothing disturbed: what was said, and its folder."""
    result = bench.ablate("--no-car", "--json", "--report")
    return result, bench.only_run


def test_a_dry_run_says_what_is_there_and_trains_nothing(bench, finished, trained):
    result = bench.ablate("--no-car", "--no-arw", "--dry-run", "--json")
    cells = json.loads(result.out)["cells"]
    assert [(cell["arm"], cell["seed"], cell["cached"]) for cell in cells] == [
        ("warm-start", None, True),
        ("vsd", 0, True),
        ("no-car", 0, True),
        ("no-arw", 0, False),
        ("continual-kl", 0, True),
        ("onpolicy-rkl", 0, True),
    ]
    assert [cell["change"] for cell in cells[2:4]] == [{"objective.options.car": 0}, {"objective.options.arw": False}]
    shown = bench.ablate("--no-car", "--no-arw", "--dry-run").out
    assert all(words in shown for words in ("no-arw", "arw off", "in the cache", "decoding", "in all", "memory"))
    assert trained == []


def test_one_run_has_all_cells(finished):
    result, run = finished
    assert result.code == 0, result.err
    records = load_records(run)
    assert {record.method for record in records} == {"autoregressive", *CELLS}
    assert {record.tree.budget for record in records if record.tree} == {TREE["budget"]}
    manifest = load_manifest(run)
    assert {entry["name"]: entry["objective"] for entry in manifest["methods"]} == {
        "autoregressive": None,
        "vsd@0": "vsd",
        "no-car@0": "vsd",
        "continual-kl@0": "kl",
        "onpolicy-rkl@0": "onpolicy",
        "warm-start": "kl",
    }
    assert {"forest_greedy.svg", "forest_greedy.png"} <= {path.name for path in (run / "figures").iterdir()}


def test_the_manifest_says_what_the_arms_were(finished):
    _, run = finished
    told = load_manifest(run)["ablation"]
    assert (told["reference"], told["recipe"]) == ("vsd", "whole")
    assert [arm["methods"] for arm in told["arms"]] == [[name] for name in CELLS]
    assert [arm["control"] for arm in told["arms"]] == [False, False, True, True, True]
    assert (told["arms"][1]["disabled"], told["arms"][1]["change"]) == (["car"], {"objective.options.car": 0})
    budgets = {arm["name"]: arm["budget"] for arm in told["arms"]}
    assert budgets["vsd"]["tokens"] == budgets["no-car"]["tokens"] == budgets["continual-kl"]["tokens"] > 0
    assert budgets["vsd"]["target_forwards"] > budgets["continual-kl"]["target_forwards"]  # the oracle's
    assert budgets["vsd"]["wall_s"] > 0
    assert budgets["warm-start"] == {"tokens": 0, "target_forwards": 0, "wall_s": 0.0}


def test_json_is_the_analysis_of_the_records(finished):
    result, run = finished
    printed = json.loads(result.out)
    assert printed == analyse(load_records(run), load_manifest(run))
    assert [arm["name"] for arm in printed["arms"]] == [name.partition("@")[0] for name in CELLS]
    assert printed["equal_tokens"]
    assert printed["arms"][1]["delta_tau_ci"] is not None


def test_the_run_shows_its_arms_again(finished):
    result, run = finished
    words = ["show", run.name, "--results", str(run.parent)]
    assert json.loads(CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False).stdout) == json.loads(
        result.out
    )
    shown = CliRunner().invoke(app, words, catch_exceptions=False).stdout
    assert "ablation of" in shown
    assert "no-car@0" in shown


def test_the_report_is_written_too(finished):
    result, run = finished
    pdf = reports_dir() / f"{run.name}.pdf"
    assert pdf.read_bytes().startswith(b"%PDF")
    assert f"report: {pdf}" in result.said


def test_the_contest_of_a_run_can_be_trained_again(finished, bench):
    _, run = finished
    recipe = load_recipe(f"{run / 'ablation.yaml'}:no-car@0")
    assert recipe.objective.options == RECIPE["objective"]["options"] | {"car": 0}
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert [entry["name"] for entry in config["drafters"]] == list(CELLS)
    assert config["target"] == str(bench.model)


def test_another_arm_trains_that_arm_alone(bench, finished, trained):
    result = bench.ablate("--no-car", "--paths", "1")
    assert result.code == 0, result.err
    assert trained == ["whole:paths-1@0"]
    assert all(words in result.out for words in ("no-car", "paths-1", "onpolicy-rkl", "Budget of one training seed"))
    assert "One training seed" in result.said


def test_another_seed_trains_what_is_new(bench, finished, trained):
    result = bench.ablate("--no-car", "--seeds", "2", "--limit", "2", "--json")
    assert result.code == 0, result.err
    assert trained == [f"whole:{name.replace('@0', '@1')}" for name in CELLS if "@" in name]
    arms = {arm["name"]: arm for arm in json.loads(result.out)["arms"]}
    assert (arms["no-car"]["seeds"], arms["warm-start"]["seeds"]) == ([0, 1], [])


def test_a_contest_of_objectives_is_one_command(bench, finished, trained):
    """Its drafters are those of ``vsdbench train CONTEST:ARM``, and of an ablation from the same start."""
    raw = {key: value for key, value in yaml.safe_load(bench.recipe.read_text()).items() if key != "objective"}
    policy = {"type": "onpolicy", "options": RECIPE["objective"]["options"] | {"divergence": "rkl"}}
    raw |= {"name": "toy", "objective": WARM["objective"]} | {
        "arms": {"kl": {}, "ce": {"objective": {"type": "ce"}}, "onpolicy-rkl": {"objective": policy},
                 "vsd": {"objective": RECIPE["objective"]}},
    }  # fmt: skip
    contest = bench.folder / "contest.yaml"
    contest.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    words = ["train", f"{contest}:ce@0", "--device", "cpu", "--dtype", "fp32", "--quiet"]
    assert CliRunner().invoke(app, words, catch_exceptions=False).exit_code == 0
    assert trained == ["toy:ce@0"]
    result = bench.ablate("--arms", "--no-car", "--limit", "2", "--json", recipe=str(contest))
    assert result.code == 0, result.err
    assert trained == ["toy:ce@0"]
    names = ["vsd", "kl", "ce", "onpolicy-rkl", "no-car", "warm-start"]
    told = json.loads(result.out)
    assert [(arm["name"], arm["control"]) for arm in told["arms"]] == [(name, name == names[-1]) for name in names]
    assert told["arms"][2]["change"]["objective"]["type"] == "ce"
    assert told["arms"][2]["delta_speedup_ci"] is not None
    assert "The control 'continual-kl' is the arm 'kl', so it runs once, as that." in result.said
    shown = bench.ablate("--arm", "ce", "--dry-run", recipe=str(contest)).out
    assert all(words in shown for words in ("objective ce", "in the cache", "continual-kl"))
    unknown = bench.ablate("--arm", "cee", recipe=str(contest))
    assert (unknown.code, unknown.out, "has no arm 'cee'. Did you mean 'ce'" in unknown.said) == (2, "", True)


def test_a_killed_training_and_a_killed_run_go_on(bench, finished, trained, monkeypatch):
    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    before = set(bench.runs)
    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoop, "run", interrupted)
        assert bench.ablate("--no-kl").code == 130
    assert set(bench.runs) == before
    append = RunStore.append

    def third_is_the_last(self, record, token_ids=None):
        if len(self.done) == 3:
            raise KeyboardInterrupt
        append(self, record, token_ids)

    with monkeypatch.context() as patch:
        patch.setattr(RunStore, "append", third_is_the_last)
        stopped = bench.ablate("--no-kl")
    assert (stopped.code, "3 of" in stopped.said, "--resume" in stopped.said) == (130, True, True)
    (manifest,) = set(bench.runs) - before
    trained.clear()
    result = bench.ablate("--no-kl", "--resume", "--json")
    assert result.code == 0, result.err
    assert set(bench.runs) == before | {manifest}
    assert trained == []
    assert json.loads(result.out)["run_id"] == manifest.parent.name
    assert load_manifest(manifest.parent)["ablation"]["arms"][1]["name"] == "no-kl"


def test_two_drafters_are_decoded_and_compared(bench, finished, trained, tmp_path):
    """A recipe against a folder of weights: both in one run, in its tree; without training what is there."""
    recipe = f"{finished[1] / 'ablation.yaml'}:no-car@0"
    weights = next(path for path in cache_dir().rglob("model.safetensors") if path.parent != bench.model).parent
    fixed = ["--suite", str(bench.suite), "--limit", "1", "--device", "cpu", "--dtype", "fp32", "--results", tmp_path]

    def compare(*words):
        return CliRunner().invoke(app, ["compare", *map(str, [*words, *fixed])], catch_exceptions=False)

    done = compare(recipe, f"eagle3:{weights}", "--json", "--quiet")
    assert done.exit_code == 0, done.stderr
    assert trained == []
    told = json.loads(done.stdout)
    (manifest,) = tmp_path.glob("*/manifest.json")
    assert (told["same_run"], told["a"]["run_id"]) == (True, manifest.parent.name)
    assert (told["a"]["method"], told["b"]["method"]) == ("whole-no-car@0", weights.name)
    assert told["rows"][0]["num_prompts"] == 1
    records = load_records(manifest.parent)
    assert {record.method for record in records} == {"autoregressive", "whole-no-car@0", weights.name}
    assert {record.tree.budget for record in records if record.tree} == {TREE["budget"]}
    same = compare(weights, weights)
    assert (same.exit_code, "needs two drafters" in same.stderr) == (2, True)
    unknown = compare("anyy", recipe)
    assert (unknown.exit_code, "'anyy' is no drafter of the suite 'few' (any)" in unknown.stderr) == (2, True)


def test_a_noisy_machine_is_told_of_and_strict_ends_with_1(bench, finished, monkeypatch):
    before = set(bench.runs)
    with monkeypatch.context() as patch:
        slow_second_repeats(patch)
        result = bench.ablate("--no-car", "--strict")
    assert result.code == 1
    assert "no-car" in result.out
    assert "Smallest difference between trained drafters" in result.out
    assert result.err.splitlines()[-1].startswith("error: A/A control: autoregressive at T = 0 was ")
    (manifest,) = set(bench.runs) - before
    again = bench.ablate("--no-car", "--run", manifest.parent.name)
    shown = CliRunner().invoke(app, ["show", manifest.parent.name, "--results", str(bench.results)])
    assert (again.code, shown.exit_code) == (0, 0)
    for told in (again.err, shown.stderr):
        assert "warning: A/A control: autoregressive at T = 0 was " in told


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sampler", "mhh"], "Did you mean 'mh'"),
        (["--suite", "quickstar"], "Did you mean 'quickstart'"),
        (["trainin.lr=1"], "Did you mean 'training'"),
        (["training.lrr=1"], "Did you mean 'lr'"),
        (["repeat=1"], "Did you mean 'repeats'"),
        (["target=x"], "use --target"),
        (["--together", "--no-car"], "at least two"),
        (["drafters.any.tree.kind=auto"], "drafters.any.tree.kind=dynamic"),
        (["other-recipe"], "2 are named"),
    ],
)
def test_mistakes_end_with_2_and_one_sentence(bench, words, said):
    result = bench.ablate(*words)
    assert result.code == 2
    assert result.out == ""
    assert said in result.said, result.said


def test_a_suite_without_a_tree_for_the_arms(bench):
    result = bench.ablate("--suite", str(bench.write_suite("other")))
    assert result.code == 2
    assert "measures no drafter of type 'eagle3'" in result.said


def test_only_vsd_can_be_taken_apart(bench):
    result = bench.ablate(recipe="eagle3-kl-start")
    assert result.code == 2
    assert "objective.type is 'kl', but an ablation takes VSD apart" in result.said


def test_overrides_reach_the_recipe_and_the_suite(bench):
    words = ("repeats=1", "generation.max_new_tokens=4", "training.epochs=2", "objective.options.omega=0.7")
    result = bench.ablate("--no-car", "--limit", "1", *words)
    assert result.code == 0, result.err
    run = max(bench.runs, key=lambda path: path.stat().st_mtime_ns).parent
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["repeats"], config["generation"]["max_new_tokens"]) == (1, 4)
    for name in ("vsd", "no-car", "onpolicy-rkl"):
        recipe = load_recipe(f"{run / 'ablation.yaml'}:{name}@0")
        assert (recipe.training.epochs, recipe.objective.options["omega"]) == (2, 0.7)


def test_the_contest_file_is_named_without_the_users_folder(bench, monkeypatch):
    monkeypatch.setenv("HOME", str(bench.folder))
    raw = family(base := load_base(str(bench.recipe)), [Arm(name="vsd")])
    written = _write(raw, bench.folder / "cache" / "contest.yaml")
    assert written == "~/cache/contest.yaml"
    assert load_recipe(f"{written}:vsd@0").objective.options == base.objective["options"]


def test_the_shipped_suite_and_recipes_fit_each_other():
    suite = yaml.safe_load(list_data("suites")["ablation"].read_text(encoding="utf-8"))
    for name in ("ablation-quickstart", "ablation-hour:vsd@0"):
        recipe = load_recipe(name)
        assert recipe.target == suite["target"]
        assert recipe.architecture.type == suite["drafters"][0]["type"]
    assert suite["drafters"][0]["recipe"] == "ablation-quickstart"
