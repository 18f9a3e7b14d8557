"""A build gives an ordinary transformers folder with its scores, goes on after a stop, and is found by its name."""

from __future__ import annotations

import io
import json
import shutil

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration
from typer.testing import CliRunner

from vsdbench.cli import app
from vsdbench.errors import EnvironmentProblemError
from vsdbench.models import source
from vsdbench.models.target import Target
from vsdbench.models.wheels import WheelFile
from vsdbench.pictures import build as building
from vsdbench.pictures import scoring, settings
from vsdbench.pictures.build import build
from vsdbench.pictures.scenes import CATEGORIES, Scene
from vsdbench.pictures.scoring import CAPTION_FACTS
from vsdbench.pictures.settings import built_folder, load_metadata
from vsdbench.pictures.training import Naming

from .conftest import tiny_settings


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VSDBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(building, "choose_dtype", lambda *_: torch.float32)
    monkeypatch.setattr(scoring, "_MAX_CAPTION_TOKENS", 4)
    return tmp_path / "cache"


@pytest.fixture
def seeing(cache, language_model, monkeypatch):
    """A target that is called seeing and is built in a second, from a language model that lies in the cache."""
    monkeypatch.setitem(settings.BUILT_MODELS, "seeing", tiny_settings())
    wheel = WheelFile(
        package="none", version="1", file="none", sha256="0" * 64, sha256_of="file", licence="MIT", size_bytes=1
    )
    monkeypatch.setitem(source.WHEEL_MODELS, "tiny-language-model", wheel)
    shutil.copytree(language_model, cache / "models" / "tiny-language-model-00000000")
    return "seeing"


def _console():
    return Console(file=io.StringIO(), width=200)


def test_a_build_is_an_ordinary_model_that_says_how_it_was_made(cache, language_model) -> None:
    folder, console = cache / "models" / "seeing-1", _console()
    scores = build("seeing", tiny_settings(), language_model, folder, console)
    assert "building seeing: about 1 minutes" in console.file.getvalue()
    assert set(scores) == {*CATEGORIES, CAPTION_FACTS}
    metadata = load_metadata(folder)
    assert metadata["scores"] == scores
    assert metadata["num_scenes"] == {"naming": 6, "answering": 4}
    assert metadata["trained"]["language_model"].startswith("pretrained; its layers tuned")
    assert set(metadata["seconds_since_last_resumed"]) == {"naming patches", "answering questions", "examining"}
    assert [path.name for path in folder.parent.iterdir()] == ["seeing-1"]

    model = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True)
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    assert type(model) is LlavaForConditionalGeneration
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    image = Scene(0, "suite").image()
    content = [{"type": "image", "image": image}, {"type": "text", "text": "Read the sign."}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 81
    with torch.inference_mode():
        own = model(**inputs).logits[0, -1]

    target = Target.load(folder, name="seeing", fingerprint="0", device=torch.device("cpu"), dtype=torch.float32)
    prompt = target.encode_chat([{"role": "user", "content": "Read the sign.", "images": [image]}])
    assert list(prompt) == inputs["input_ids"][0].tolist()
    torch.testing.assert_close(target.prefill(prompt, 256).next_logits, own, atol=1e-5, rtol=1e-4)


def test_a_build_that_was_stopped_goes_on(cache, language_model, monkeypatch) -> None:
    folder, steps = cache / "models" / "seeing-1", []
    run = Naming.run

    def stopped(self, saved, report):
        self.save_every_s = 0.0
        run(self, saved, lambda number, _: steps.append(number) or _stop_at(number, 2))

    monkeypatch.setattr(Naming, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        build("seeing", tiny_settings(), language_model, folder, _console())
    assert not folder.exists()
    monkeypatch.setattr(Naming, "run", lambda self, saved, report: run(self, saved, lambda n, _: steps.append(n)))
    build("seeing", tiny_settings(), language_model, folder, _console())
    assert steps == [1, 2, 2, 3]  # the second step was not yet saved
    monkeypatch.setattr(Naming, "run", None)  # what is there is not made again
    build("seeing", tiny_settings(), language_model, folder, _console())


def _stop_at(number, last):
    if number == last:
        raise KeyboardInterrupt


def test_what_is_being_built_is_waited_for_and_what_does_not_fit_is_refused(
    cache, language_model, monkeypatch, held_elsewhere
) -> None:
    folder = cache / "models" / "seeing-1"
    ready = {"scores": {"caption": {"picture": 1.0}}}

    def built() -> None:
        folder.mkdir()
        (folder / settings.METADATA).write_text(json.dumps(ready))

    console = held_elsewhere(folder.with_name(".building-seeing-1") / ".lock", built)
    assert build("seeing", tiny_settings(), language_model, folder, console) == ready["scores"]
    assert "The target 'seeing' is being built by another process" in console.file.getvalue()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    shutil.rmtree(folder)
    monkeypatch.setattr(building.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(EnvironmentProblemError, match=r"the build needs .* free some space"):
        build("seeing", tiny_settings(), language_model, folder, _console())


def test_a_name_is_built_once_and_listed(seeing, monkeypatch) -> None:
    assert source.resolve(seeing).kind == "built"
    assert "Tiny; built when first used" in CliRunner().invoke(app, ["models", "list"]).stdout
    built = CliRunner().invoke(app, ["models", "build", seeing, "--json"])
    assert built.exit_code == 0, built.output
    (entry,) = json.loads(built.stdout)["models"]
    monkeypatch.setattr(building, "build", None)
    files = source.fetch_model(seeing, progress=False)
    assert (files.path, files.kind, files.licence) == (built_folder(seeing), "built", "Apache-2.0")
    listed = CliRunner().invoke(app, ["models", "list"]).stdout
    assert "Tiny; in the cache" in listed
    assert "vision tower: from scratch" in listed
    share = f"{entry['scores'][CAPTION_FACTS]['picture']:.1%}"
    assert any(line.split()[:3] == ["caption", "facts", share] for line in listed.splitlines())


def test_other_settings_are_another_model(monkeypatch) -> None:
    keys = {
        tiny_settings(**changes).key
        for changes in ({}, {"seed": 1}, {"lessons": 9}, {"language_model_sha256": "1" * 64}, {"num_scored": 4})
    }
    assert len(keys) == 5
    assert tiny_settings(description="Other", minutes=2).key == tiny_settings().key
    assert tiny_settings(num_scored=4).naming_key == tiny_settings().naming_key


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["make"], "There is no 'vsdbench models make'"),
        (["list", "smolvision"], "takes no name"),
        (["build"], "No model was named"),
        (["build", "smolvisoin"], "Did you mean 'smolvision'"),
    ],
)
def test_mistakes_are_named(arguments, message) -> None:
    result = CliRunner().invoke(app, ["models", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
