"""Building a target that sees, on this machine: put together, taught in two stages, examined, kept in the cache.

What takes long is resumable: a build that was stopped goes on where it was, and one that is finished is found again.
The folder that comes out is an ordinary transformers model; ``build.json`` in it says how it was made and how well it
sees.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from vsdbench import provenance
from vsdbench.bars import counting_bars
from vsdbench.errors import EnvironmentProblemError
from vsdbench.models.device import choose_dtype, dtype_name
from vsdbench.models.source import fetch_model
from vsdbench.pictures.llava import assemble, make_processor
from vsdbench.pictures.scenes import Scene
from vsdbench.pictures.scoring import examine, num_reports
from vsdbench.pictures.settings import BUILT_MODELS, METADATA, BuildSettings, built_folder, load_metadata
from vsdbench.pictures.training import Answering, Naming, Stage
from vsdbench.store.files import FileLock, storage_errors

_BYTES_A_PARAMETER = (
    28  # the model's file, and two copies of a stage's weights and moments while one replaces the other
)
_SPARE_BYTES = 100_000_000


def build_target(name: str, *, progress: bool) -> None:
    """Build the target called ``name`` in the cache; its language model is fetched first where it is missing."""
    settings = BUILT_MODELS[name]
    language_model = fetch_model(settings.language_model, progress=progress).path
    build(name, settings, language_model, built_folder(name), Console(stderr=True, quiet=not progress, highlight=False))


def build(
    name: str, settings: BuildSettings, language_model: Path, folder: Path, console: Console
) -> dict[str, dict[str, float]]:
    """Write the built model to ``folder`` and return its scores (see ``scoring.examine``).

    Args:
        name: Of the target, for what is said.
        settings: How it is built.
        language_model: Folder of the language model.
        folder: Made here; what is half done lies beside it until then.
        console: For progress and notes.

    Raises:
        ConfigError: The language model does not fit.
        EnvironmentProblemError: The disk is full or the folder cannot be written.
    """
    work = folder.with_name(f".building-{folder.name}")
    with storage_errors(work):
        with FileLock(work / ".lock", f"The target '{name}' is being built", console=console):
            if not (folder / METADATA).is_file():
                _build(name, settings, language_model, work, console)
                (work / "model").rename(folder)
        shutil.rmtree(work, ignore_errors=True)
    return load_metadata(folder)["scores"]  # type: ignore[no-any-return]


def _build(name: str, settings: BuildSettings, language_model: Path, work: Path, console: Console) -> None:
    """Make the finished model in ``work / "model"``."""
    dtype = choose_dtype("auto", torch.device("cpu"))
    console.print(
        f"building {name}: about {settings.minutes} minutes on two free CPU cores with fast bf16 (here: "
        f"{torch.get_num_threads()} threads, {'bf16' if dtype == torch.bfloat16 else 'fp32, which takes longer'}); "
        "if it is stopped, the same command goes on from there",
        soft_wrap=True,
    )
    seconds: dict[str, float] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = assemble(language_model, settings.tower).eval()  # no layer of it behaves differently while it learns
    _check_space(work, sum(parameter.numel() for parameter in model.parameters()))
    scratch = work / "tokenizer"
    scratch.mkdir(exist_ok=True)
    processor = make_processor(language_model, scratch)
    stages = ((Naming, settings.naming, settings.naming_key), (Answering, settings.answering, settings.key))
    for kind, stage_settings, key in stages:
        stage: Stage = kind(model, stage_settings, dtype, processor.tokenizer)
        start = time.monotonic()
        with _bar(console, stage.name, stage_settings.num_steps) as advance:
            stage.run(work / f"{kind.__name__.lower()}-{key}.pt", advance)
        seconds[stage.name] = round(time.monotonic() - start, 1)
    scenes = [Scene(index, "heldout") for index in range(settings.num_scored)]
    start = time.monotonic()
    with _bar(console, "examining", num_reports(len(scenes))) as advance:  # in the dtype in which it will be run
        scores = examine(deepcopy(model).to(dtype), processor.tokenizer, scenes, report=advance)
    seconds["examining"] = round(time.monotonic() - start, 1)
    facts = _facts(name, settings, seconds, dtype_name(dtype))
    _write(model, processor, work / "model", facts | {"scores": scores})


def _facts(name: str, settings: BuildSettings, seconds: dict[str, float], dtype: str) -> dict[str, Any]:
    """Return what is to be known of a build, apart from its scores."""
    tuned = bool(settings.answering.language_learning_rate)
    return {
        "schema": 1,
        "name": name,
        "settings": asdict(settings),
        "trained": {
            "vision_tower": "from scratch, on drawn scenes",
            "projector": "from scratch, on drawn scenes",
            "language_model": "pretrained; its layers tuned on drawn scenes, embeddings and head as they were"
            if tuned
            else "pretrained; as it was",
        },
        "num_scenes": {
            stage: asked.num_steps * asked.batch_size
            for stage, asked in (("naming", settings.naming), ("answering", settings.answering))
        },
        "seconds_since_last_resumed": seconds,
        "dtype": dtype,
        "machine": provenance.cpu(),
        "versions": provenance.versions(),
    }


def _write(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path, metadata: dict[str, Any]
) -> None:
    if folder.exists():
        shutil.rmtree(folder)  # of a build that was stopped while it wrote
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / METADATA).write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def _check_space(folder: Path, num_parameters: int) -> None:
    needed, free = num_parameters * _BYTES_A_PARAMETER + _SPARE_BYTES, shutil.disk_usage(folder).free
    if free < needed:
        raise EnvironmentProblemError(
            f"the build needs {needed / 1e9:.1f} GB for a while, but {folder.parent} has {free / 1e9:.1f} GB left; "
            "free some space or set VSDBENCH_CACHE to a folder elsewhere."
        )


@contextmanager
def _bar(console: Console, text: str, total: int) -> Iterator[Any]:
    """Show a bar with the time left, and yield what moves it: a number of steps, and a loss if there is one."""
    with counting_bars(console) as progress:
        task = progress.add_task(text, total=total)

        def advance(done: int, loss: float | None = None) -> None:
            described = text if loss is None else f"{text} · loss {loss:.3f}"
            progress.update(task, description=f"{described:<34}", completed=done)

        yield advance
