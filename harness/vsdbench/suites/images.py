"""Images of prompts: known by their pixels, and opened only when they are shown to a target.

A file, an encoded column of a data set and a rendered scene are the same image if they have the same pixels. What is
decoded is checked against the hash again, so that a file that was exchanged in the meantime is noticed.
"""

from __future__ import annotations

import hashlib
import io
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageOps

from vsdbench.config import short
from vsdbench.errors import ConfigError

ImageSource = Path | bytes | Image.Image | Callable[[], Image.Image]
"""A file, an encoded image, a decoded one, or something that renders one."""


@dataclass(frozen=True, slots=True)
class ImageRef:
    """An image of a prompt; two are equal if their pixels are.

    Attributes:
        sha256: Of the size and the RGB pixels.
        source: Where it comes from.
        name: What messages call it.
    """

    sha256: str
    source: ImageSource = field(compare=False, repr=False)
    name: str = field(compare=False)

    def open(self) -> Image.Image:
        """Return the image in RGB, upright; the caller may change it.

        Raises:
            ConfigError: It is no longer there, cannot be read, or is not the image that the prompt was made with.
        """
        image = _decoded(self.source, self.name)
        if pixels_sha256(image) != self.sha256:
            raise ConfigError(
                f"{self.name} has changed since the prompts were loaded: leave it as it is while a run goes on."
            )
        return image


def reference(source: ImageSource, name: str) -> ImageRef:
    """Return the reference of an image, which is decoded once to know its pixels.

    Args:
        source: A file, an encoded image, a decoded one, or something that renders one.
        name: What messages call it.

    Raises:
        ConfigError: It is not there, or not an image.
    """
    return ImageRef(pixels_sha256(_decoded(source, name)), source, name)


def pixels_sha256(image: Image.Image) -> str:
    """Return sha256 of the size and the pixels of an image in RGB."""
    digest = hashlib.sha256(f"{image.width}x{image.height}".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def references(value: object, *, folder: Path, where: str) -> Iterator[ImageRef]:
    """Yield the images of a column's value: none, one, or those of a list.

    Args:
        value: An image, ``{"bytes", "path"}``, encoded bytes, a path, what draws one, a list of these, or None.
        folder: What a relative path is relative to.
        where: What the sentence of an error starts with.

    Raises:
        ConfigError: Something is not an image, or not there.
    """
    if isinstance(value, list | tuple):
        for entry in value:
            yield from references(entry, folder=folder, where=where)
    elif isinstance(value, ImageRef):
        yield value
    elif value is not None:
        source = _source(value, folder, where)
        name = f"the image '{source}'" if isinstance(source, Path) else "an image"
        yield reference(source, f"{where}: {name}")


def keep(image: ImageRef, folder: Path) -> Path:
    """Write the image to ``folder`` under its hash, losslessly and only once, and return the file.

    Raises:
        OSError: It cannot be written.
    """
    path = folder / f"{image.sha256}.png"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as stream:
            image.open().save(stream, format="PNG", compress_level=1)
        Path(stream.name).replace(path)
    return path


def kept(sha256: str, folder: Path) -> ImageRef:
    """Return the reference of an image that was kept in ``folder``."""
    path = folder / f"{sha256}.png"
    return ImageRef(sha256, path, f"the kept image '{path}'")


def _source(value: object, folder: Path, where: str) -> ImageSource:
    """Return what one value of a column means."""
    if isinstance(value, Mapping) and {"bytes", "path"} & value.keys():
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes | Image.Image) or callable(value):
        return value
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{where}: an image or a path is needed, not {short(value)}.")
    if "://" in value or value.startswith("data:"):
        raise ConfigError(
            f"{where}: {short(value)} is an address, and images are never fetched: save it and give the file's path."
        )
    return folder / Path(value).expanduser()


def _decoded(source: ImageSource, name: str) -> Image.Image:
    """Return an image in RGB, upright."""
    try:
        if isinstance(source, Path | bytes):
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
                return _upright(opened)
        return _upright(source if isinstance(source, Image.Image) else source())
    except FileNotFoundError as error:
        raise ConfigError(f"{name} is not there: correct its path or bring the file back.") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{name} cannot be read ({str(error).rstrip('.')}): it should be an image file.") from error


def _upright(image: Image.Image) -> Image.Image:
    return (ImageOps.exif_transpose(image) or image).convert("RGB")
