"""Tiny images for tests of suites, and what a data set with them looks like."""

from __future__ import annotations

import io
from typing import Any

import datasets
from PIL import Image


def picture(number: int, size: tuple[int, int] = (4, 3)) -> Image.Image:
    """Return a small image that no other number gives."""
    image = Image.new("RGB", size, (number % 256, 7, 9))
    image.putpixel((0, 0), (255, number // 256, 255))
    return image


def encoded(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    """Return the bytes of an image file."""
    stream = io.BytesIO()
    image.save(stream, format=file_format, **options)
    return stream.getvalue()


def image_dataset(rows: list[dict[str, Any]], images: dict[str, Any]) -> datasets.Dataset:
    """Return rows as a data set of the hub has them; ``images`` names the feature of every image column."""
    plain = datasets.Dataset.from_list([{key: row[key] for key in row if key not in images} for row in rows])
    features = datasets.Features({**plain.features, **images})
    return datasets.Dataset.from_dict({name: [row[name] for row in rows] for name in features}, features=features)
