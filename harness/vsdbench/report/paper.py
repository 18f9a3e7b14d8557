"""Writes a report: the PDF, its Typst source, and every table and figure as files of their own. Needs no network.

The same records give the same bytes on every machine: fonts are those inside Typst (system fonts are not looked at),
text in figures is drawn as paths, and the date of the file is that of the last run.
"""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import typst

from vsdbench.errors import ConfigError
from vsdbench.report.document import build
from vsdbench.report.facts import Run, load_run
from vsdbench.report.figures import COLUMN, PAGE, freeze, save
from vsdbench.report.model import Document
from vsdbench.report.render import FORMATS, to_typst
from vsdbench.store.files import storage_errors, write_atomic
from vsdbench.store.store import load_manifest

SOURCE, TEMPLATE = "report.typ", "paper.typ"
_TABLES, _FIGURES = "tables", "figures"
_PICTURE_KINDS = ("svg", "pdf")
_PNG = ".png"  # pictures of prompts, as they are
_SIZES_PT = (9.4, 9.2, 9.6, 9.0, 9.8, 8.8, 10.0)
_FULL_ENOUGH = 0.8
"""Of the last page, both columns together: more than this and nobody sees where the text ends."""


def default_name(runs: Sequence[Path]) -> str:
    """Return the name of a report, without suffix: that of its run, or of its runs."""
    return "+".join(dict.fromkeys(str(load_manifest(run)["run_id"]) for run in runs))


def write_report(runs: Sequence[Path], output: Path, *, title: str | None = None) -> list[Path]:
    """Write ``output`` and, in a folder beside it that has its name, what it is made of; return all paths, PDF first.

    The folder has ``tables/`` (CSV with ten digits, Markdown, LaTeX), ``figures/`` (SVG, PDF) and the source
    (``report.typ``, ``paper.typ``), which ``typst compile`` sets again.

    Args:
        runs: Folders of runs; one, an ablation, or several that are compared with the first.
        output: Ends in ``.pdf``; folders are made.
        title: Of the document; made from the runs if None.

    Raises:
        ConfigError: No runs, one twice, one without records, or an output that is not a PDF.
        EnvironmentProblemError: The disk is full or the folder may not be written.
    """
    if output.suffix.lower() != ".pdf":
        raise ConfigError(f"The report '{output}' would be a PDF; give a name that ends in .pdf.")
    folder = output.with_suffix("")
    document = build(read(runs), title=title, files=f"{folder.name}/")
    with storage_errors(output):
        for part in (_TABLES, _FIGURES):
            (folder / part).mkdir(parents=True, exist_ok=True)
    written = _write_tables(document, folder / _TABLES) + _write_figures(document, folder / _FIGURES)
    source = _write_source(document, folder)
    write_atomic(output, typeset(folder, document.timestamp))
    return [output, *source, *written]


def read(runs: Sequence[Path]) -> list[Run]:
    """Return the runs, with letters where there are several.

    Raises:
        ConfigError: None, too many, or one of them twice.
    """
    if not runs:
        raise ConfigError("No run was named, for example: vsdbench report latest")
    names = [str(load_manifest(run)["run_id"]) for run in runs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"Run '{twice}' was named twice; name it once, or another run to compare it with.")
    if len(runs) > len(string.ascii_uppercase):
        raise ConfigError(f"{len(runs)} runs are more than one report can hold; name at most 26.")
    labels = list(string.ascii_uppercase[: len(runs)]) if len(runs) > 1 else [""]
    return [load_run(folder, label) for folder, label in zip(runs, labels, strict=True)]


def typeset(folder: Path, timestamp: int) -> bytes:
    """Return the PDF of the source in ``folder``; what Typst warns of is an error, so that no page is quietly wrong.

    Args:
        folder: Has the source, the template and the figures.
        timestamp: Of the document, seconds since 1970.
    """
    pdf, warnings = typst.compile_with_warnings(
        folder / SOURCE, root=folder, format="pdf", ignore_system_fonts=True, timestamp=timestamp
    )
    if warnings:
        raise RuntimeError(f"{folder / SOURCE}: " + "; ".join(str(warning) for warning in warnings))
    if not isinstance(pdf, bytes):
        raise TypeError(f"typst gave {type(pdf).__name__}, not the bytes of one file")
    return pdf


def _write_tables(document: Document, folder: Path) -> list[Path]:
    _clear(folder, tuple(FORMATS))
    paths = []
    for table in document.tables:
        for suffix, render in FORMATS.items():
            paths.append(folder / f"{table.name}{suffix}")
            write_atomic(paths[-1], render(table).encode())
    return paths


def _write_figures(document: Document, folder: Path) -> list[Path]:
    _clear(folder, (*(f".{kind}" for kind in _PICTURE_KINDS), _PNG))
    paths: list[Path] = []
    with storage_errors(folder):
        for file in document.files:
            paths.append(folder / file.name)
            write_atomic(paths[-1], file.read_bytes())
        for picture in document.pictures:
            layout = PAGE if picture.wide else COLUMN
            freeze(picture.figure, layout)
            paths += save(picture.figure, folder / picture.name, _PICTURE_KINDS, layout)
    return paths


def _write_source(document: Document, folder: Path) -> list[Path]:
    template = files("vsdbench.report").joinpath("template", TEMPLATE).read_bytes()
    write_atomic(folder / TEMPLATE, template)
    _write_fitting(document, folder)
    return [folder / SOURCE, folder / TEMPLATE]


def _write_fitting(document: Document, folder: Path) -> None:
    """Write the source with the first size of type that fills most of the last page, or the one that fills it best.

    The appendix is set where that helps: its tables lie beside the report in any case.
    """
    source, best, best_share = b"", b"", -1.0
    options = [(size, appendix) for size in _SIZES_PT for appendix in ([False, True] if document.appendix else [False])]
    for size, appendix in options:
        source, share = _write_whole(document, folder, size, appendix=appendix)
        if share > best_share:
            best, best_share = source, share
        if share >= _FULL_ENOUGH:
            break
    if best != source:
        write_atomic(folder / SOURCE, best)


def _write_whole(document: Document, folder: Path, size_pt: float, *, appendix: bool) -> tuple[bytes, float]:
    """Write the source, and return it with the share of the last page that its text fills.

    What Typst would squeeze into the gap that wide tables and figures leave in a column, over what stands below, is
    placed otherwise; each try has more of that, so it ends.
    """
    squeezed: frozenset[str] = frozenset()
    while True:
        text = to_typst(
            document, template=TEMPLATE, figures=_FIGURES, size_pt=size_pt, appendix=appendix, squeezed=squeezed
        )
        source = text.encode()
        write_atomic(folder / SOURCE, source)
        answer = typst.query(
            folder / SOURCE, "<layout>", field="value", one=True, root=folder, ignore_system_fonts=True
        )
        found = json.loads(answer)
        if not found["squeezed"]:
            return source, float(found["filled"])
        squeezed |= frozenset(found["squeezed"])


def _clear(folder: Path, suffixes: tuple[str, ...]) -> None:
    """Remove what an earlier report of this name left, so that no table outlives its run."""
    for path in folder.iterdir():
        if path.suffix in suffixes:
            path.unlink()
