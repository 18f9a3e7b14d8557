"""A run on disk: append-only records that survive a kill, found again by name, resumed without repeating anything.

A run folder holds ``manifest.json`` (machine and provenance, replaced atomically), ``config.yaml`` (resolved config),
``records.jsonl`` (one record a line), ``outputs.jsonl`` (token ids of each distinct output) and ``summary.parquet``
(derived, may be deleted).
"""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from vsdbench.errors import ConfigError, did_you_mean
from vsdbench.store.files import AppendLog, FileLock, read_lines, write_atomic
from vsdbench.store.records import Record, RecordKey, hash_tokens, parse_record

if TYPE_CHECKING:
    import pandas as pd

MANIFEST, CONFIG, RECORDS, OUTPUTS, SUMMARY = (
    "manifest.json",
    "config.yaml",
    "records.jsonl",
    "outputs.jsonl",
    "summary.parquet",
)
_log = logging.getLogger(__name__)


class RunStore:
    """The one writer of a run folder. Make it with ``create`` or ``open``; close it, or use it in a ``with``.

    Attributes:
        directory: The run folder.
        notes: What was repaired on opening, one sentence each, to be told to the user.
    """

    def __init__(self, directory: Path, manifest: Mapping[str, Any], lock: FileLock) -> None:
        self.directory = directory
        self._manifest = dict(manifest)
        self._lock = lock
        with ExitStack() as on_failure:
            self._records = on_failure.enter_context(closing(AppendLog(directory / RECORDS)))
            self._outputs = on_failure.enter_context(closing(AppendLog(directory / OUTPUTS)))
            self.notes = [note for note in (self._records.note, self._outputs.note) if note]
            self._done = {record.key for record in load_records(directory)}
            self._known_outputs = set(load_outputs(directory))
            on_failure.pop_all()

    @classmethod
    def create(cls, directory: Path, manifest: Mapping[str, Any], *, config: str = "") -> RunStore:
        """Make a new run folder and hold it for writing.

        Args:
            directory: Made with its parents; must not hold a run yet.
            manifest: Written as JSON; needs ``run_id``. ``device`` is read by the summary.
            config: The resolved configuration as YAML text.

        Raises:
            ConfigError: The folder holds a run already, or another process is writing it.
            EnvironmentProblemError: The disk is full or the folder may not be written.
        """
        if "run_id" not in manifest:
            raise ValueError("the manifest needs a run_id")
        lock = _lock(directory)
        try:
            _refuse_existing(directory)
            write_atomic(directory / CONFIG, config.encode())
            write_atomic(directory / MANIFEST, _to_json(manifest))
            return cls(directory, manifest, lock)
        except BaseException:
            lock.release()
            raise

    @classmethod
    def open(cls, directory: Path) -> RunStore:
        """Hold an existing run for more records; a torn last line is dropped and described in ``notes``.

        Raises:
            ConfigError: There is no run, another process is writing it, or a line in it is corrupt.
        """
        manifest = load_manifest(directory)
        lock = _lock(directory)
        try:
            return cls(directory, manifest, lock)
        except BaseException:
            lock.release()
            raise

    @property
    def done(self) -> Set[RecordKey]:
        """Keys of the records on disk, a live view: what a resumed run need not do."""
        return self._done

    @property
    def manifest(self) -> dict[str, Any]:
        """A copy of the manifest as it is on disk."""
        return json.loads(json.dumps(self._manifest))  # type: ignore[no-any-return]

    def append(self, record: Record, token_ids: Sequence[int] | None = None) -> None:
        """Write one record durably; its output first, so that no record on disk lacks the output it was given.

        Args:
            record: Of this run, with a key that is not in ``done``.
            token_ids: The output tokens; stored once for every distinct output.

        Raises:
            ValueError: The key is on disk already, the run is another, or the hash is not that of ``token_ids``.
            EnvironmentProblemError: The disk is full; the file ends with the record before this one.
        """
        if record.key in self._done:
            raise ValueError(f"a record of {record.key} is in {self.directory} already")
        if record.run_id != self._manifest["run_id"]:
            raise ValueError(f"a record of run {record.run_id!r} does not belong to run {self._manifest['run_id']!r}")
        if token_ids is not None:
            self._append_output(record.output_sha256, token_ids)
        self._records.append(record.to_line())
        self._done.add(record.key)

    def _append_output(self, digest: str, token_ids: Sequence[int]) -> None:
        if digest in self._known_outputs:
            return
        if hash_tokens(token_ids) != digest:
            raise ValueError(f"output_sha256 {digest} is not the hash of the {len(token_ids)} token ids given")
        line = json.dumps({"output_sha256": digest, "token_ids": [int(i) for i in token_ids]}, separators=(",", ":"))
        self._outputs.append(line + "\n")
        self._known_outputs.add(digest)

    def update_manifest(self, **changes: object) -> None:
        """Set top-level keys of the manifest (``run_id`` cannot change) and replace the file atomically."""
        if "run_id" in changes:
            raise ValueError("a run keeps its run_id")
        changed = self._manifest | changes
        write_atomic(self.directory / MANIFEST, _to_json(changed))
        self._manifest = changed

    def write_summary(self, frame: pd.DataFrame) -> Path:
        """Write ``summary.parquet``, a row a drafter x mode x category (``bench.summary.summary_frame``)."""
        path = self.directory / SUMMARY
        write_atomic(path, frame.to_parquet(None, index=False))
        return path

    def close(self) -> None:
        """Close the files and let go of the folder; more than once is fine."""
        self._records.close()
        self._outputs.close()
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load_manifest(directory: Path) -> dict[str, Any]:
    """Return the manifest of a run.

    Raises:
        ConfigError: There is none, or it is not a JSON object with a ``run_id``.
    """
    path = directory / MANIFEST
    try:
        data = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(f"{directory} is not a run: it has no {MANIFEST}; see `vsdbench list runs`.") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); restore it from a copy.") from error
    if not isinstance(data, dict) or "run_id" not in data:
        raise ConfigError(f"{path} has no run_id; restore it from a copy.")
    return data


def load_records(directory: Path) -> list[Record]:
    """Return the records of a run in the order in which they were written; a torn last line is skipped and logged.

    Raises:
        ConfigError: No ``records.jsonl``, a corrupt line (file and line number are named), another schema, or two
            records with one key.
    """
    path = directory / RECORDS
    if not path.is_file():
        raise ConfigError(f"{directory} is not a run: it has no {RECORDS}; see `vsdbench list runs`.")
    lines, torn = read_lines(path)
    if torn:
        _log.warning("%s: skipped a torn last line (line %d)", path, len(lines) + 1)
    records: list[Record] = []
    seen: dict[RecordKey, int] = {}
    with _uncollected():
        for number, line in enumerate(lines, start=1):
            record = parse_record(line, where=f"{path} line {number}")
            first = seen.setdefault(record.key, number)
            if first != number:
                raise ConfigError(f"{path} line {number} repeats the record of line {first}; delete one of them.")
            records.append(record)
    return records


@contextmanager
def _uncollected() -> Iterator[None]:
    """Hold the garbage collector: records have no cycles, and looking for some takes a fifth of the time of reading."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Outputs(dict[str, list[int]]):
    """Token ids by ``output_sha256``; one that is not there is named with its file."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def __missing__(self, digest: str) -> list[int]:
        raise ConfigError(
            f"{self.path} has no output {digest[:16]}, which a record has; restore the file from a copy, or start a "
            "new run."
        )


def load_outputs(directory: Path) -> dict[str, list[int]]:
    """Return token ids by ``output_sha256`` (empty where a run has no outputs file).

    Raises:
        ConfigError: A corrupt line; file and line number are named. Also later, where an output is asked for that a
            record has and the file has not.
    """
    path = directory / OUTPUTS
    outputs = _Outputs(path)
    if not path.is_file():
        return outputs
    for number, line in enumerate(read_lines(path)[0], start=1):
        try:
            data = json.loads(line)
            outputs[data["output_sha256"]] = [int(i) for i in data["token_ids"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path} line {number} is corrupt ({error!r}); restore the file from a copy, or start a new run."
            ) from error
    return outputs


def list_runs(results_dir: Path) -> list[Path]:
    """Return the run folders of ``results_dir``, oldest first; those kept in its ``reference`` folder come before."""

    def runs_in(folder: Path) -> list[Path]:
        found = [path.parent for path in folder.glob(f"*/{MANIFEST}")]
        return sorted(found, key=lambda run: ((run / MANIFEST).stat().st_mtime_ns, run.name))

    return runs_in(results_dir / "reference") + runs_in(results_dir)


def find_run(results_dir: Path, name: str) -> Path:
    """Return the folder of the run called ``name``: its id, a prefix that only it has, ``latest``, or a path.

    Raises:
        ConfigError: No such run, or several begin with ``name``.
    """
    runs = list_runs(results_dir)
    if name == "latest":
        if not runs:
            raise ConfigError(f"There is no run in {results_dir} yet; make one with `vsdbench run`.")
        return runs[-1]
    exact = [run for run in runs if run.name == name]
    if exact:
        return exact[-1]
    if (Path(name) / MANIFEST).is_file():
        return Path(name)
    matches = [run for run in runs if name and run.name.startswith(name)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        names = ", ".join(run.name for run in matches)
        raise ConfigError(f"'{name}' begins the names of {len(matches)} runs ({names}); give more of it.")
    raise ConfigError(f"No run '{name}' in {results_dir}.{did_you_mean(name, [run.name for run in runs])}")


def _lock(directory: Path) -> FileLock:
    return FileLock(directory / ".lock", f"Run {directory} is being written")


def _refuse_existing(directory: Path) -> None:
    if (directory / MANIFEST).exists() or (directory / RECORDS).exists():
        raise ConfigError(f"{directory} holds a run already; continue it with --resume or choose another name.")


def _to_json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(dict(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
