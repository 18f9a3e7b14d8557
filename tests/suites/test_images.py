"""Images are known by their pixels wherever they come from, opened late, and refused with a sentence."""

from __future__ import annotations

import pickle
from functools import partial
from pathlib import Path

import pytest
from PIL import Image
from tests.suites.pictures import encoded, picture

from vsdbench.errors import ConfigError
from vsdbench.suites.images import ImageRef, keep, kept, pixels_sha256, reference, references
from vsdbench.suites.prompts import make_prompt, prompts_sha256, with_images


def _refused(value: object, folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        list(references(value, folder=folder, where="column 'image'"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_same_pixels_are_the_same_image_wherever_they_come_from(tmp_path: Path) -> None:
    image = picture(1)
    image.save(tmp_path / "a.png")
    values = [
        "a.png",
        str(tmp_path / "a.png"),
        image,
        encoded(image),
        {"bytes": encoded(image, "BMP"), "path": "elsewhere.bmp"},
        {"bytes": None, "path": "a.png"},
        reference(partial(picture, 1), "a rendered one"),
    ]
    found = list(references(values, folder=tmp_path, where="w"))
    assert len(found) == len(values)
    assert len({*found}) == 1
    assert {one.sha256 for one in found} == {pixels_sha256(image)}
    assert all(one.open().tobytes() == image.tobytes() and one.open().mode == "RGB" for one in found)
    assert list(references(None, folder=tmp_path, where="w")) == []


def test_size_and_pixels_both_count() -> None:
    flat = Image.new("RGB", (6, 2))
    assert pixels_sha256(flat) != pixels_sha256(Image.new("RGB", (2, 6)))
    assert pixels_sha256(picture(1)) != pixels_sha256(picture(2))


def test_images_are_upright_and_in_rgb() -> None:
    turned = picture(3)
    exif = turned.getexif()
    exif[0x0112] = 6  # shown rotated by a quarter
    seen = reference(encoded(turned, "JPEG", exif=exif), "one").open()
    assert seen.size == (3, 4)
    grey = reference(Image.new("LA", (2, 2), (5, 0)), "one").open()
    assert (grey.mode, grey.getpixel((0, 0))) == ("RGB", (5, 5, 5))


def test_an_opened_image_may_be_changed(tmp_path: Path) -> None:
    image = picture(4)
    one = reference(image, "one")
    one.open().putpixel((1, 1), (0, 0, 0))
    assert one.open().tobytes() == image.tobytes()
    assert pickle.loads(pickle.dumps(one)).open().tobytes() == image.tobytes()


def test_an_exchanged_or_removed_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture(5).save(path)
    (one,) = references("a.png", folder=tmp_path, where="column 'image'")
    picture(6).save(path)
    with pytest.raises(ConfigError, match=r"column 'image': the image '.*a\.png' has changed"):
        one.open()
    path.unlink()
    with pytest.raises(ConfigError, match=r"a\.png' is not there"):
        one.open()


def test_what_is_not_an_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes(encoded(picture(1, (64, 64)))[:90])
    assert "column 'image': the image" in _refused("none.png", tmp_path)
    assert "is not there" in _refused("none.png", tmp_path)
    assert "cannot be read" in _refused("text.png", tmp_path)
    assert "cannot be read" in _refused("cut.png", tmp_path)
    assert "an image cannot be read" in _refused(b"no image", tmp_path)
    assert "'https://example.org/a.png' is an address" in _refused("https://example.org/a.png", tmp_path)
    assert "is an address" in _refused("data:image/png;base64,AAAA", tmp_path)
    assert "an image or a path is needed, not 3" in _refused([3], tmp_path)
    assert "an image or a path is needed, not None" in _refused({"bytes": None, "path": None}, tmp_path)
    assert "an image or a path is needed, not {'x': 1}" in _refused({"x": 1}, tmp_path)


def test_what_is_kept_comes_back(tmp_path: Path) -> None:
    one = reference(encoded(picture(7), "BMP"), "one")
    path = keep(one, tmp_path / "images")
    assert keep(one, tmp_path / "images") == path
    assert [file.name for file in path.parent.iterdir()] == [f"{one.sha256}.png"]
    back = kept(one.sha256, tmp_path / "images")
    assert back == one
    assert back.open().tobytes() == picture(7).tobytes()


def test_the_hashes_of_prompts_see_the_images() -> None:
    images = [reference(picture(number), "one") for number in range(3)]

    def made(*shown: ImageRef) -> tuple[str, str]:
        prompt = make_prompt(identifier="1", category="a", turns=["x"], source="s", images=shown)
        return prompt.hash, prompts_sha256([prompt])

    several = [made(), made(images[0]), made(images[1]), made(*images[:2]), made(images[1], images[0]), made(*images)]
    assert len({hashes[0] for hashes in several}) == len({hashes[1] for hashes in several}) == len(several)
    bare = make_prompt(identifier="1", category="a", turns=["x"], source="s")
    assert (with_images(bare, images).hash, prompts_sha256([with_images(bare, images)])) == made(*images)
    assert with_images(bare, ()) == bare


def test_hashes_of_prompts_without_images_are_what_they_were() -> None:
    """These stand in records and suites."""
    prompt = make_prompt(identifier="1", category="a", turns=["Say hello.", "Again."], source="s")
    assert prompt.hash == "488ff7f87a73d5d5"
    assert prompts_sha256([prompt]) == "b213e3c518740ab76d6300ccdade86f969b72e5657e3c4173c083b4c873c0bd4"
