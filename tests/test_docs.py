"""What the documents say is so: README's commands, the command line's reference, named files, no foreign path."""

import re
import subprocess
from pathlib import Path

import pytest
from typer.main import get_command

from vsdbench import clidoc
from vsdbench.catalog import validate
from vsdbench.cli import app
from vsdbench.errors import ConfigError
from vsdbench.paths import list_data

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = {
    "quickstart": "python -m venv .venv && . .venv/bin/activate && pip install -c constraints.txt . "
    "&& vsdbench run suites/quickstart.yaml",
    "tests": "python -m venv .venv-test && .venv-test/bin/pip install -c constraints.txt -e '.[test]' "
    "&& .venv-test/bin/python -m pytest",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_readme_has_its_commands_once(name):
    blocks = re.findall(rf"^<!-- command: {name} -->\n```sh\n(.*?)\n```$", README, flags=re.MULTILINE | re.DOTALL)
    assert blocks == [COMMANDS[name]]
    assert README.count(COMMANDS[name]) == 1


def test_readme_has_no_other_command_block():
    assert README.count("<!-- command:") == len(COMMANDS) == README.count("```sh")


def test_ci_reads_the_command_from_the_readme(tmp_path):
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    [program] = re.findall(r"tests=\$\((awk '[^']*' README\.md)\)", script)
    done = subprocess.run(["bash", "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == COMMANDS["tests"]
    assert "pytest" not in script.replace("PYTEST_ADDOPTS", "")


def test_readme_names_every_verb_and_suite():
    for name in get_command(app).commands:
        assert f"| `vsdbench {name}" in README
    shipped = {path.stem for path in ROOT.glob("suites/*.yaml")}
    assert shipped <= set(list_data("suites"))
    assert [name for name in sorted(shipped) if f"`{name}`" not in README] == []


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).is_file() or target.startswith("https://"), (page.name, target)


def test_the_guides_suite_is_valid(tmp_path):
    [suite] = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/guide.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    (tmp_path / "mine.yaml").write_text(suite, encoding="utf-8")
    assert validate(tmp_path / "mine.yaml") == "suite"


def test_readme_tree_leads_somewhere():
    [tree] = re.findall(r"```text\n(.*?)```", README, flags=re.DOTALL)
    parents: dict[int, Path] = {-2: ROOT}
    for line in tree.splitlines():
        indent = len(line) - len(line.lstrip())
        for name in re.split(r"\s{2,}", line.strip())[0].split(", "):
            path = parents[indent - 2] / name
            assert path.exists() or name == "results/", path
            parents[indent] = path


def test_cli_reference_agrees_with_the_help(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert (ROOT / clidoc.CLI_PAGE).read_text(encoding="utf-8") == clidoc.render()


def test_cli_reference_is_written_where_there_is_a_folder(tmp_path):
    assert clidoc.write(tmp_path / "cli.md").read_text(encoding="utf-8") == clidoc.render()
    with pytest.raises(ConfigError, match="run this from the checkout"):
        clidoc.write(tmp_path / "nowhere" / "cli.md")


def test_no_shipped_file_names_a_machine_path_or_registry_host():
    places = ["/" + "work/", "/" + "root/", "/" + "home/", "/" + "tmp/", "/" + "opt/"]
    hosts = [
        "pypi" + ".org",
        "python" + "hosted.org",
        "index" + "-url",
        "download." + "pytorch.org",
        "proxy." + "golang",
    ]
    files = [path for pattern in ("*.txt", "*.toml", "*.md", "*.yaml", ".ci/*") for path in ROOT.glob(pattern)]
    for folder in ("harness", "drafters", "suites", "docs"):
        files += [path for path in (ROOT / folder).rglob("*") if path.suffix in {".py", ".md", ".yaml", ".json"}]
    assert len(files) > 50
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert [word for word in places + hosts if word in text] == [], path
