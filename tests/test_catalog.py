"""Everything shipped is listed, found, valid and described."""

from pathlib import Path

import pytest

from vsdbench import catalog
from vsdbench.errors import ConfigError
from vsdbench.paths import list_data

ROOT = Path(__file__).parents[1]
SHIPPED = [*sorted(ROOT.glob("suites/*.yaml")), *sorted(ROOT.glob("drafters/recipes/*.yaml"))]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_file_is_valid_and_named_after_itself(path):
    assert catalog.validate(path) == ("recipe" if path.parent.name == "recipes" else "suite")
    kind, found, text = catalog.find(path.stem)
    assert found.name == path.name
    assert f"\nname: {path.stem}\n" in f"\n{text}"
    assert kind == catalog.validate(path)


def test_shipped_files_are_there():
    assert {"smoke", "quickstart", "mtbench"} <= {path.stem for path in SHIPPED}
    assert set(list_data("suites")) >= {path.stem for path in ROOT.glob("suites/*.yaml")}


@pytest.mark.parametrize("kind", catalog.KINDS)
def test_entries_have_names_and_descriptions(kind, tmp_path):
    found = catalog.entries(kind, tmp_path)
    assert bool(found) == (kind != "runs")
    assert all(entry["name"] and entry["description"] for entry in found)
    assert [entry["name"] for entry in found] == sorted(entry["name"] for entry in found)


def test_what_cannot_be_read_is_listed_as_such(tmp_path, monkeypatch):
    (tmp_path / "suites").mkdir()
    (tmp_path / "suites/broken.yaml").write_text("name: [", encoding="utf-8")
    monkeypatch.setenv("VSDBENCH_DATA", str(tmp_path))
    suites = {entry["name"]: entry["description"] for entry in catalog.entries("suites")}
    assert "broken.yaml:" in suites["broken"]
    assert "cannot be read" not in suites["smoke"]
    (tmp_path / "runs/torn").mkdir(parents=True)
    (tmp_path / "runs/torn/manifest.json").write_text("{", encoding="utf-8")
    [run] = catalog.entries("runs", tmp_path / "runs")
    assert "manifest.json is not JSON" in run["description"]


def test_models_are_said_to_be_what_they_are():
    said = {entry["name"]: entry["description"] for entry in catalog.entries("models")}
    assert said["smollm2-135m-q4"].startswith("SmolLM2-135M-Instruct, its 4-bit weights")
    assert said["smolvision"].startswith("SmolLM2-135M-Instruct with a SigLIP tower")


def test_plugins_are_all_listed():
    assert {"ngram", "draft_model", "eagle3"} <= {entry["name"] for entry in catalog.entries("drafters")}
    assert {"ce", "kl"} <= {entry["name"] for entry in catalog.entries("objectives")}


def test_copy_into_a_folder_makes_the_parents_of_a_file(tmp_path):
    assert catalog.copy("smoke", tmp_path) == tmp_path / "smoke.yaml"
    inside = catalog.copy("smoke", tmp_path / "a" / "b.yaml")
    assert inside.read_bytes() == (tmp_path / "smoke.yaml").read_bytes()


def test_a_suite_with_an_unknown_recipe_is_refused(tmp_path):
    text = (ROOT / "suites/mtbench.yaml").read_text(encoding="utf-8")
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("recipe: eagle3-ce-quickstart", "recipe: eagle3-cee-quickstart"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"'eagle3-cee-quickstart'.*Did you mean 'eagle3-ce-quickstart'\?"):
        catalog.validate(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("type: ngram", "type: ngrm", r"mine\.yaml: drafter 'ngram': unknown drafter 'ngrm'\. Did you mean 'ngram'\?"),
        (
            "type: ngram",
            "type: ngram\n    checkpoint: no/where",
            r"mine\.yaml: drafter 'ngram': checkpoint 'no/where' does not exist",
        ),
        ("drafters:", "peers: [{name: p, type: q}]\ndrafters:", r"mine\.yaml: peer 'p': unknown peer 'q'"),
    ],
)
def test_what_a_suite_names_must_be_there(tmp_path, old, new, message):
    text = (ROOT / "suites/smoke.yaml").read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        catalog.validate(path)


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="Did you mean 'quickstart'"):
        catalog.find("quikstart")
    with pytest.raises(ConfigError, match="Did you mean 'recipes'"):
        catalog.entries("recepies")
