"""What the reference runs recorded and what their reports print: plain lines that import nothing of the program.

``RUNS`` alone names runs. What kind of report each is, which arms it compares and what its tables hold follows from its
manifest and records, so that a run may be replaced by a newer one.
"""

from __future__ import annotations

import csv
import json
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
RUNS = {
    "quickstart": "quickstart-cpu-2026-11-27",
    "quickstart-native": "quickstart-fp32-cpu-2026-11-28",
    "mtbench-hour": "mtbench-hour-cpu-2026-11-26",
    "ablation-hour": "ablation-hour-cpu-2026-11-25",
    "contest-hour": "contest-hour-cpu-2026-11-26",
    "contest-grounded": "contest-grounded-cpu-2026-11-27",
    "trees": "trees-cpu-2026-11-27",
    "trees-native": "trees-fp32-cpu-2026-11-28",
    "pictures": "pictures-cpu-2026-11-27",
    "ablation-pictures": "ablation-pictures-cpu-2026-11-26",
    "ablation-pictures-vispec": "ablation-pictures-vispec-cpu-2026-11-27",
    "ablation-pictures-eagle3": "ablation-pictures-eagle3-cpu-2026-11-27",
}


# --- runs ----------------------------------------------------------------------------------------------------------


def folder(name):
    return ROOT / "results/reference" / RUNS[name]


@cache
def answers(name):
    return [json.loads(line) for line in (folder(name) / "records.jsonl").read_text(encoding="utf-8").splitlines()]


@cache
def manifest(name):
    return json.loads((folder(name) / "manifest.json").read_text(encoding="utf-8"))


@cache
def config(name):
    return yaml.safe_load((folder(name) / "config.yaml").read_text(encoding="utf-8"))


@cache
def examples(name):
    """The answers that a run keeps to be drawn; None in one from before that."""
    path = folder(name) / "examples.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


ABLATIONS = tuple(name for name in RUNS if "ablation" in manifest(name))
CONTESTS = tuple(name for name in RUNS if name not in ABLATIONS)


def methods(name):
    return {method["name"]: method for method in manifest(name)["methods"]}


def drafters(name):
    return [method for method, told in methods(name).items() if told["kind"] == "drafter"]


def baselines(name):
    return [method for method, told in methods(name).items() if told["kind"] == "baseline"]


def trained(name):
    """What training cost, of the drafters that were trained."""
    return {method: told["training"] for method, told in methods(name).items() if told["training"].get("tokens")}


@cache
def temperatures(name):
    return sorted({a["temperature"] for a in answers(name)})


@cache
def categories(name):
    """Of every prompt."""
    return {a["prompt_id"]: a["category"] for a in answers(name)}


@cache
def diagnosed(name):
    """Whether the records tell how drafting and decoding part; one of a drafter is read for it, not all."""
    with (folder(name) / "records.jsonl").open(encoding="utf-8") as lines:
        return bool(next(a for a in map(json.loads, lines) if a["kind"] == "drafter").get("diagnostics"))


@cache
def chosen(name, method, temperature, category=None):
    """The answers of a method, or of all seeds of an arm."""
    found = [
        a for a in answers(name)
        if method in {a["method"], a["method"].partition("@")[0]} and a["temperature"] == float(temperature)
        and category in {None, "all", a["category"]}
    ]  # fmt: skip
    assert found
    return found


def trees(name):
    """Of drafters that were measured with trees of several sizes: these, by size, under the name of the recipe."""
    groups = defaultdict(list)
    for drafter in drafters(name):
        tree = chosen(name, drafter, temperatures(name)[0])[0]["tree"]
        if weights := methods(name)[drafter]["drafter_fingerprint"]:
            groups[weights, tree["kind"]].append((tree["budget"], drafter))
    groups = {key: of for key, of in groups.items() if len({budget for budget, _ in of}) > 1}
    recipes = {key: methods(name)[of[0][1]]["training"].get("recipe", of[0][1]) for key, of in groups.items()}
    told = {key: f" ({key[1]})" if list(recipes.values()).count(recipes[key]) > 1 else "" for key in groups}
    return {recipes[key] + told[key]: sorted(of, key=lambda pair: pair[0]) for key, of in groups.items()}


# --- arms of an ablation -------------------------------------------------------------------------------------------


@cache
def arms(name):
    return {arm["name"]: arm for arm in manifest(name)["ablation"]["arms"]}


def reference(name):
    return manifest(name)["ablation"]["reference"]


def control_arms(name):
    return [arm for arm, told in arms(name).items() if told["control"]]


def changed_arms(name):
    """Those in which a part is off or changed."""
    return [arm for arm in arms(name) if arm not in {reference(name), *control_arms(name)}]


def by_seed(name, arm, temperature):
    """The answers of an arm and of the reference, one entry a training seed; an untrained control meets every seed."""
    sides = [
        [chosen(name, method, temperature) for method in arms(name)[which]["methods"]]
        for which in (arm, reference(name))
    ]
    num_seeds = max(map(len, sides))
    return [side * (num_seeds // len(side)) for side in sides]


# --- reports -------------------------------------------------------------------------------------------------------


@cache
def source(name):
    """The text that the PDF is set from, with plain spaces."""
    text = (ROOT / "reports/reference" / name / "report.typ").read_text(encoding="utf-8")
    return text.replace("\u00a0", " ")


@cache
def table(name, of):
    text = (ROOT / "reports/reference" / name / "tables" / f"{of}.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def tables(name):
    return {path.stem for path in (ROOT / "reports/reference" / name / "tables").glob("*.csv")}


def figures(name):
    return {path.stem for path in (ROOT / "reports/reference" / name / "figures").glob("*.svg")}


def printed_rows(name):
    """By table: its rows as they are set, a cell being its text, both ends of its interval, and whether it is bold."""
    found = re.findall(
        r'#data-table\(\n  key: "([a-z0-9-]+)".*?\n  rows: \(\n(.*?)  \),\n\)', source(name), flags=re.DOTALL
    )
    cell = re.compile(r'cell\("((?:[^"\\]|\\.)*)"(?:, ends: \("([^"]*)", "([^"]*)"\))?(, bold: true)?')
    return {key: [cell.findall(line) for line in rows.splitlines()] for key, rows in found}


@cache
def prose(name):
    """All text but the rows of tables, drawn answers, commands and sources; what it refers to is left out."""
    text = re.sub(r"\n  header: .*?\n\)|#example\(.*?\n\)", "", source(name), flags=re.DOTALL)
    text = re.sub(r"#(commands|references)\(.*", "", text)
    text = re.sub(r'(ref\(label|read|key: )\(?"[^"]*"', "", text)
    return "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', text.partition("#show")[2]))


def headers(name):
    """By table: the names of its columns as they are set."""
    found = re.findall(
        r'#data-table\(\n  key: "([a-z0-9-]+)".*?\n  header: \((.*?),\),\n', source(name), flags=re.DOTALL
    )
    return {key: json.loads(f"[{columns}]") for key, columns in found}


def titles(name):
    """Of figures."""
    return dict(re.findall(r'#picture\(\n  key: "([^"]*)".*?\n  title: \{ "([^"]*)" \}', source(name), flags=re.DOTALL))


def number(text):
    """The number of a printed cell."""
    return float(text.translate({0x2212: "-", 0x202F: None, ord("+"): None}))


def fixed(value, digits):
    text = f"{value:.{digits}f}"
    return (text.lstrip("-") if float(text) == 0 else text).replace("-", "\N{MINUS SIGN}")


def signed(value):
    """A change, one decimal."""
    text = fixed(value, 1)
    return f"+{text}" if value > 0 and text != "0.0" else text


def size_of(tree):
    """A tree's size, and from which probabilities on it has nodes and levels, if it has such."""
    size = f"{tree['budget']}/{tree['depth']}/{tree['top_k']}"
    node, level = tree.get("min_node_prob", 0), tree.get("min_level_prob", 0)
    return f"{size} ≥ {node:g}/{level:g}" if node or level else size


def counted(value):
    """A whole number, thousands set apart."""
    return f"{value:,}".replace(",", "\u202f")


def spelled(value):
    return ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")[
        value
    ]


def listed(items):
    return " and ".join(filter(None, [", ".join(items[:-1]), *items[-1:]]))
