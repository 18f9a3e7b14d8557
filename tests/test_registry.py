"""Plug-ins are found by name, and a broken one says which it is and why."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Final

import pytest

from vsdbench import registry
from vsdbench.errors import ConfigError

GROUP: Final = "vsdbench.drafters"


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "plugin_good.py").write_text("BUILD = 'built'\n")
    (tmp_path / "plugin_broken.py").write_text("import plugin_nowhere\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    points = EntryPoints(
        EntryPoint(name=name, value=value, group=GROUP)
        for name, value in [
            ("ngram", "plugin_good:BUILD"),
            ("broken", "plugin_broken:BUILD"),
            ("absent", "plugin_good:NOTHING"),
        ]
    )
    monkeypatch.setattr(registry, "entry_points", lambda *, group: points.select(group=group))


@pytest.mark.usefixtures("plugins")
def test_names_are_listed_without_importing_anything() -> None:
    sys.modules.pop("plugin_good", None)
    assert registry.names(GROUP) == ["absent", "broken", "ngram"]
    assert registry.names("vsdbench.trainers") == []
    assert "plugin_good" not in sys.modules


@pytest.mark.usefixtures("plugins")
def test_a_plug_in_is_loaded_by_name() -> None:
    assert registry.load(GROUP, "ngram") == "built"


@pytest.mark.usefixtures("plugins")
def test_an_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"unknown drafter 'ngrma'\. Did you mean 'ngram'\?"):
        registry.load(GROUP, "ngrma")


@pytest.mark.usefixtures("plugins")
@pytest.mark.parametrize(
    ("name", "cause", "words"),
    [("broken", ModuleNotFoundError, "plugin_nowhere"), ("absent", AttributeError, "NOTHING")],
)
def test_a_broken_plug_in_says_its_name_and_its_cause(name: str, cause: type[Exception], words: str) -> None:
    with pytest.raises(ConfigError, match=f"the plug-in '{name}' .*group {GROUP}.*{words}") as caught:
        registry.load(GROUP, name)
    assert isinstance(caught.value.__cause__, cause)


def test_the_project_registers_its_own() -> None:
    assert {"ngram", "eagle3", "draft_model"} <= set(registry.names("vsdbench.drafters"))
    assert {"ce", "kl"} <= set(registry.names("vsdbench.objectives"))
